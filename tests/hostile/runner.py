"""The command line in a child of a process that has everything imported: exit code, output, time and memory.

Starting Python and torch anew takes seconds a run. Here they are started once; each run is a fork, which is killed
after a while, and whose peak memory the system tells apart from that of its parent.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hostile.case import IMAGES, MODEL, prepare

HERE = Path(__file__).resolve()
GOOD_SCAN = ("scan", MODEL, "--data", IMAGES, "-q", "--trigger", "badnets")
LARGEST = 6 * 2**30  # bytes of address space beyond the parent's: a bomb shall not take the machine


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `code` is None where it hung; `cpu` in seconds; `peak`: bytes beyond a run's on good files."""

    code: int | None
    out: str
    err: str
    cpu: float
    peak: int


class Runner:
    """A process that runs command lines in forks of itself."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        paths = [str(HERE.parents[1]), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.idle = 0
        good = scratch / "good"
        good.mkdir()
        prepare(good)
        self.idle = self.run([*GOOD_SCAN], good).peak

    def run(self, argv: list[str], folder: Path, wait: float = 60) -> Outcome:
        """Runs `bdclean ARGV` in `folder`; after `wait` seconds it is killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        out, err = self.scratch / "out", self.scratch / "err"
        order = {"argv": argv, "folder": str(folder), "out": str(out), "err": str(err), "wait": wait}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that runs the cases ended"
        code, cpu, peak = json.loads(answer)
        texts = [path.read_bytes().decode("utf-8", "backslashreplace") for path in (out, err)]
        return Outcome(code, *texts, cpu, peak - self.idle)

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


def _serve() -> None:
    import torch

    from bdclean.cli.main import run
    from bdclean.errors import Refused
    from bdclean.networks.recognition.recognition import recognise

    torch.set_num_threads(1)
    with contextlib.suppress(Refused):  # what is built to be compared with is built once, or in every child
        recognise({"conv1.weight": (4, 3, 3, 3), "fc.weight": (10, 16), "x": (1,)})
    quiet, kept = os.open(os.devnull, os.O_WRONLY), [os.dup(1), os.dup(2)]
    for number in (1, 2):
        os.dup2(quiet, number)
    with tempfile.TemporaryDirectory() as folder:  # what is imported and built late, too
        prepare(Path(folder))
        os.chdir(folder)
        assert run([*GOOD_SCAN]) in (0, 1, 3)
        os.chdir("/")
    for number, file in zip((1, 2), kept, strict=True):
        os.dup2(file, number)
    gc.collect()
    gc.freeze()  # a child that collects garbage would copy every page that it looks at
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_child(order, run))
        end = time.monotonic() + order["wait"]
        done, status, usage = os.wait4(child, os.WNOHANG)
        while not done and time.monotonic() < end:
            time.sleep(0.005)
            done, status, usage = os.wait4(child, os.WNOHANG)
        if not done:
            os.kill(child, 9)
            _, _, usage = os.wait4(child, 0)
        code = os.waitstatus_to_exitcode(status) if done else None
        print(
            json.dumps([code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]),
            file=answers,
            flush=True,
        )


def _child(order: dict, run) -> int:
    import resource

    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + LARGEST, size + LARGEST))
    os.chdir(order["folder"])
    for number, path in ((1, order["out"]), (2, order["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["bdclean", *order["argv"]]
    try:
        code = run(order["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
        return code
    except BaseException:
        import traceback

        traceback.print_exc()
        return 99


if __name__ == "__main__":
    _serve()
