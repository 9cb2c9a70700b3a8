"""Third-party networks on real images, through the installed command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKPOINTS = Path(os.environ.get("BDCLEAN_CHECKPOINTS", "."))


@pytest.mark.skipif("BDCLEAN_CHECKPOINTS" not in os.environ, reason="BDCLEAN_CHECKPOINTS names no folder")
def test_a_clean_network_of_somebody_else_passes_on_real_images(cifar10):
    """Option A, `module.` prefix, `linear` head, ImageNet statistics that only the first layer tells of."""
    triggers = ["badnets:size=3", "badnets:size=4,pattern=white", "badnets:size=3,position=corners"]
    command = [sys.executable, "-m", "bdclean", "scan", str(CHECKPOINTS / "akamaster-resnet20.safetensors")]
    command += ["--data", str(cifar10), "--limit", "500", "--format", "json", "-q"]
    for trigger in triggers:
        command += ["--trigger", trigger]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)["runs"]
    assert record["verdict"] == "no-evidence" and record["checkpoint"]["preprocess"] == "imagenet"
    accuracy = next(m for m in record["measures"] if m["name"] == "clean_accuracy")
    # 81.0 % on all 10,000 of these JPEG images
    assert accuracy["low"] < 0.81 < accuracy["high"]
    assert all(row["outcome"] == "passes" for row in record["triggers"])
    # A blended picture moves every network: that it was asked for and decides nothing is no pass.
    done = subprocess.run(
        [*command, "--trigger", "blend:alpha=0.2"], capture_output=True, text=True, check=False
    )
    (record,) = json.loads(done.stdout)["runs"]
    assert (done.returncode, record["verdict"]) == (3, "not-assessed") and "blend" in record["advice"]
