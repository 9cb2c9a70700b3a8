"""The installed command, killed and told to go on, ends in the same file."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
ARGUMENTS = [
    "cleanse", str(SAMPLES / "signs-badnets.safetensors"), "--data", str(SAMPLES / "images" / "unlabeled"),
    "--limit", "100", "--recipe", "inoculate", "--set", "epochs=1", "--set", "least_steps=1",
    "--set", "inversion_steps=2", "--set", "leave_out=patch/warp/tone",
    "--set", "batch_size=8", "--set", "adversary_steps=1", "--trigger", "badnets:size=3", "--precision", "fp32",
    "--device", "cpu", "--format", "json", "-q",
]  # fmt: skip

# Imports once, then forks a child for every run: `bdclean` as it is, but saving after every step. A run is
# (out, resume, step, signal): once the state on disk has reached the step, the signal is sent after a random while.
DRIVER = """
import json, os, random, sys, time
import bdclean.training.resume
from bdclean.cli.main import run
import bdclean.runs.cleanse
import torch._dynamo  # what an optimiser would import in every child

bdclean.training.resume.SAVE_EVERY_SECONDS = -1.0
arguments, runs = json.load(sys.stdin)
drawn = random.Random(0)
codes = []
for out, resume, step, number in runs:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(run([*arguments, "--out", out, *(["--resume"] if resume else [])]))
    while number:
        try:
            with open(out + ".resume.json") as file:
                reached = json.load(file)["done"]
        except (OSError, ValueError):
            reached = 0
        if reached >= step:
            time.sleep(drawn.random() * 0.05)
            os.kill(child, number)
            break
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("the run ended before it was killed")
        time.sleep(0.002)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def call(command, **how):
    # glibc hands large blocks back to the system at once, and a third of these short runs went into getting them again
    memory = {f"MALLOC_{name}_": str(2**30) for name in ("MMAP_THRESHOLD", "TRIM_THRESHOLD")}
    environment = {**os.environ, **memory, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **how,
    )


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_run_killed_and_interrupted_goes_on_to_the_same_file(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = tmp_path / "whole" / "out.safetensors"
    done = call(["-m", "bdclean", *ARGUMENTS, "--out", str(whole)])
    record = json.loads(whole.with_name("out.json").read_text())
    assert record["outcome"] == "ran", done.stderr
    assert sorted(p.name for p in whole.parent.iterdir()) == ["out.json", "out.safetensors"]

    (tmp_path / "stopped").mkdir()
    out = tmp_path / "stopped" / "out.safetensors"
    first, second, third = sorted(random.Random(1).sample(range(1, 8), 3))
    runs = [
        (str(out), False, first, signal.SIGKILL),
        (str(out), True, second, signal.SIGINT),
        (str(out), True, third, signal.SIGKILL),
        (str(out), True, 0, 0),
    ]
    done = call(["-c", DRIVER], input=json.dumps([ARGUMENTS, runs]))
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    assert codes[:3] == [-signal.SIGKILL, 130, -signal.SIGKILL], done.stderr
    assert "go on with --resume" in done.stderr
    again = json.loads(out.with_name("out.json").read_text())
    assert again["outcome"] == "ran" and digest(out) == digest(whole)
    for key in ("curve", "triggers", "measures", "verdict", "findings"):
        assert again[key] == record[key], key
    assert not list(out.parent.glob("*.resume.*"))  # deleted on success
