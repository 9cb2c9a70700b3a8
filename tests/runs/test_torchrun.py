"""`torchrun -m bdclean`: two processes do what one does, the first alone tells, and none goes on without the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
DYING = str(Path(__file__).with_name("dying.py"))
MODEL, LABELED = str(SAMPLES / "signs-badnets.safetensors"), str(SAMPLES / "images" / "labeled")
SHARED = ["--trigger", "badnets", "--device", "cpu"]
SCAN = [
    "scan",
    MODEL,
    "--data",
    LABELED,
    "--limit",
    "300",
    "--detector",
    "stripes",
    "--trigger",
    "blend",
    *SHARED,
]
CLEANSE = [
    "cleanse", MODEL, "--data", LABELED, "--limit", "300", "--recipe", "ft", "--set", "epochs=2",
    "--set", "batch_size=50", "--precision", "fp32", *SHARED,
]  # fmt: skip


def call(*command):
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def torchrun(*command):
    return call("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command)


def both(*command):
    return torchrun("-m", "bdclean", *command)


def said(done):
    """The lines that bdclean, not torchrun, wrote to standard error."""
    return [line for line in done.stderr.splitlines() if line.startswith("bdclean: ")]


def read(path):
    return json.loads(Path(path).read_text())


def measured(record, side=None):
    """All that was measured, without what differs from run to run."""
    of = record[side] if side else record
    return {key: of[key] for key in ("verdict", "measures", "triggers", "findings")}


@pytest.mark.slow
def test_a_scan_by_two_processes_has_the_record_of_one():
    one = call("-m", "bdclean", *SCAN, "--record", "one.json")
    two = both(*SCAN, "--record", "two.json", "-q")
    assert one.returncode == 1 and two.stdout == one.stdout and len(said(two)) == len(said(one))
    alone, shared = read("one.json"), read("two.json")
    assert len(alone["triggers"]) == 2 and alone["verdict"] == "backdoored"
    left_out = {"started", "seconds", "argv"}
    assert {k: v for k, v in shared.items() if k not in left_out} == {
        k: v for k, v in alone.items() if k not in left_out
    }
    assert sorted(os.listdir()) == ["one.json", "two.json"]


@pytest.mark.slow
def test_a_repair_by_two_processes_measures_as_one_s_and_goes_on_after_a_kill():
    call("-m", "bdclean", *CLEANSE, "--out", "one.safetensors", "-q")
    both(*CLEANSE, "--out", "two.safetensors", "-q")
    alone, shared = read("one.json"), read("two.json")
    assert (
        alone["outcome"] == shared["outcome"] == "ran" and alone["precision"] == shared["precision"] == "fp32"
    )
    assert measured(alone, "before") == measured(shared, "before")
    for one, two in zip(alone["measures"], shared["measures"], strict=True):
        assert one["name"] == two["name"]
        if one["low"] is not None:
            assert one["low"] <= two["value"] <= one["high"]
    for one, two in zip(alone["triggers"], shared["triggers"], strict=True):
        assert (
            one["outcome"] == two["outcome"]
            and one["asr"]["low"] <= two["asr"]["value"] <= one["asr"]["high"]
        )
    for one, two in zip(alone["curve"], shared["curve"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)

    out = ["--out", "out.safetensors"]
    torchrun(DYING, "out.safetensors.resume.json", "0", "4", "9", *CLEANSE, *out)
    assert read("out.safetensors.resume.json")["done"] >= 4 and not Path("out.safetensors").exists()
    refused = call("-m", "bdclean", *CLEANSE, *out, "--resume")
    assert refused.returncode == 3 and "was made with processes 2, this run has 1" in refused.stderr
    both(*CLEANSE, *out, "--resume", "-q")
    assert Path("out.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
    assert not list(Path().glob("*.resume.*"))


@pytest.mark.slow
def test_where_one_process_dies_the_other_ends_with_a_sentence_and_leaves_what_resumes():
    before = Path(MODEL).stat().st_mtime
    done = torchrun(
        DYING, "out.safetensors.resume.json", "1", "3", "9", *CLEANSE, "--out", "out.safetensors", "-q"
    )
    record = read("out.json")
    assert done.returncode != 0 and done.stdout == ""
    assert len(said(done)) == 1 and record["problem"]["message"] in said(done)[0]
    assert "go on with --resume" in said(done)[0] or "as torchrun does" in said(done)[0]
    assert record["problem"]["exit_code"] in (3, 143) and record["verdict"] == "not-assessed"
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert sorted(os.listdir()) == [
        "out.json",
        "out.safetensors.resume.json",
        "out.safetensors.resume.safetensors",
    ]
    assert Path(MODEL).stat().st_mtime == before


@pytest.mark.slow
def test_a_recipe_that_cannot_be_shared_is_refused_before_any_work():
    done = both("cleanse", MODEL, "--data", LABELED, "--recipe", "fp", "--out", "out.safetensors", *SHARED)
    record = read("out.json")
    assert record["problem"]["exit_code"] == 3 and record["data"] is None and record["before"] is None
    assert said(done) == [f"bdclean: {record['problem']['message']}"]
    assert "fp cannot be shared by several processes: run it without torchrun" in said(done)[0]
    assert os.listdir() == ["out.json"]
