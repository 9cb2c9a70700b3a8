"""Threads are as many as a container's quota lets run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bdclean
from bdclean.data.processors import usable

BOUND = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def system(folder, files, own="0::/\n"):
    """A tree of control groups with these files, and the file that says which one is ours."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "own").write_text(own)
    return folder, folder / "own"


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({}, "", BOUND),
        ({"cpu.max": "max 100000\n"}, "0::/\n", BOUND),
        ({"cpu.max": "50000 100000\n"}, "0::/\n", 1),
        ({"cpu.max": "1000 100000\n"}, "0::/\n", 1),
        ({"cpu.max": "6400000 100000\n"}, "0::/\n", BOUND),
        ({"cpu.max": "garbage\n"}, "0::/\n", BOUND),
        ({"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 1),
        ({"a/cpu.max": "max 100000\n", "a/b/cpu.max": "100000 100000\n"}, "0::/a/b\n", 1),
        ({"c/cpu.max": "100000 100000\n"}, "0::/a/b\n", BOUND),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu:/\n", 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu:/\n", BOUND),
    ],
)
def test_the_quota_of_the_group_or_of_one_around_it_counts(tmp_path, files, own, expected):
    assert usable(*system(tmp_path, files, own)) == expected


def test_torch_takes_no_more_threads_and_those_that_are_asked_for():
    code = (
        "import torch; from bdclean.data import processors; torch.set_num_threads(3); "
        "processors.usable = lambda: 2; processors.use_usable(); print(torch.get_num_threads())"
    )
    for asked, threads in (({}, "2"), ({"OMP_NUM_THREADS": "3"}, "3")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= {"PYTHONPATH": str(Path(bdclean.__file__).parents[1]), **asked}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == threads, done.stderr
