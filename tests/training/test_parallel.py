import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes says of what they computed together."""
    place = tmp_path_factory.mktemp("two") / "found.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        said = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        env = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in said.items()}}
        started.append(subprocess.Popen([sys.executable, str(PROGRAM), str(place)], env=env))
    assert [process.wait(100) for process in started] == [0, 0]
    return [json.loads(place.with_name(f"{place.name}.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("loss", ["cross-entropy", "coupled", "dropout", "three images"])
def test_two_processes_have_one_s_gradients_at_step_one(found, loss):
    for each in found:
        assert each["processes"] == 2 and each[loss] < 1e-5


def test_they_end_with_its_weights_up_to_rounding_and_with_the_same_in_both(found):
    assert found[0]["trained"] < 1e-3 and found[0]["losses"] == pytest.approx(
        found[0]["losses"][::-1], rel=1e-3
    )
    assert found[0]["weights"] == found[1]["weights"] and found[0]["losses"] == found[1]["losses"]


def test_answers_are_put_together_in_order_and_each_image_is_asked_once(found):
    for each, share in zip(found, (21, 20), strict=True):
        assert each["answers"] < 1e-5 and each["order"] and each["seen"] == [share, 41]


def test_what_one_refuses_all_refuse(found):
    assert found[0]["refusal"] == found[1]["refusal"] and "not all finite" in found[0]["refusal"]


def test_what_may_differ_is_the_first_process_s(found):
    assert [each["first's"] for each in found] == ["rank 0", "rank 0"]
