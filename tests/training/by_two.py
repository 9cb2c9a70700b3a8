"""Starts a program twice, as torchrun would, but without it: that takes seconds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = str(Path(__file__).parents[1])


def by_two(program, place, patience=100):
    """What each of two processes of `program`, a file, left in `place`.RANK, a JSON."""
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
        env["PYTHONPATH"] = os.pathsep.join([TESTS, *filter(None, [env.get("PYTHONPATH")])])
        started.append(subprocess.Popen([sys.executable, str(program), str(place)], env=env))
    try:
        assert [process.wait(patience) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [json.loads(place.with_name(f"{place.name}.{rank}").read_text()) for rank in range(2)]
