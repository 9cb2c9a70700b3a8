from pathlib import Path

import pytest
from training.by_two import by_two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes says of what they computed together."""
    place = tmp_path_factory.mktemp("two") / "found.json"
    return by_two(Path(__file__).with_name("two_processes.py"), place)


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


def test_the_first_process_is_told_why_another_cannot_go_on(found):
    assert [each["told"] for each in found] == [["no room for a share.", False], ["", False]]
