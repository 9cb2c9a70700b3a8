"""What only an accelerator can show: the same answers there as on the CPU, and recipes that run there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdclean.data.loading import load_images
from bdclean.measuring.predictor import Predictor
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.progress import quiet
from bdclean.record.run import RAN, RunRecord
from bdclean.registry import FAMILIES

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
LABELED = SAMPLES / "images" / "labeled"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def images():
    return load_images(LABELED, (32, 32), labeled=True, tell=quiet)


def cleanse(tmp_path, name, *arguments):
    out = tmp_path / f"{name}.safetensors"
    ran = subprocess.run(
        [
            sys.executable, "-m", "bdclean", "cleanse", str(SAMPLES / "signs-badnets.safetensors"), "--data",
            str(LABELED), "--test", str(LABELED.parent / "unlabeled"), "--device", "cuda", "--out", str(out), "-q",
            "--trigger", "badnets", *arguments,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode in (0, 1), ran.stderr
    record = RunRecord.from_json(json.loads(out.with_suffix(".json").read_text()))
    assert record.outcome == RAN and record.device.startswith("cuda")
    return record


def test_predictions_are_those_of_the_cpu(images):
    checkpoint = Checkpoint.read(SAMPLES / "signs-badnets.safetensors")
    answers = {}
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        model = Classifier(checkpoint.build(device), parse_preprocess("half")).eval().to(device)
        with torch.inference_mode():
            answers[name] = model(images.images[:128].to(device)).cpu()
        assert len(Predictor(model, device, 64)(images.images)) == len(images)
    assert torch.allclose(answers["cpu"], answers["cuda"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_corruptions_stay_on_the_device(family, images):
    pixels = images.images[:32].cuda().float() / 255
    drawn = [FAMILIES[family](pixels, torch.Generator("cuda").manual_seed(1)) for _ in range(2)]
    assert drawn[0].device == pixels.device and torch.equal(*drawn)
    assert drawn[0].min() >= 0 and drawn[0].max() <= 1 and not torch.equal(drawn[0], pixels)


@pytest.mark.parametrize("recipe", ["bcu", "ft", "sft"])
def test_recipes_run(recipe, tmp_path):
    cleanse(tmp_path, recipe, "--recipe", recipe, "--set", "epochs=1", "--set", "batch_size=32")


def test_inoculation_takes_the_backdoor_out(tmp_path):
    record = cleanse(tmp_path, "inoculate")
    assert record.before.triggers[0].asr.value > 0.9 and record.triggers[0].asr.value < 0.1
