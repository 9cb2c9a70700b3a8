"""The shipped images and models are what make.py makes and what manifest.json says."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdclean import registry
from bdclean.measuring.metrics import attack_success
from bdclean.measuring.predictor import Predictor
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.progress import quiet

FOLDER = Path(__file__).resolve().parents[2] / "sample_models"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
CLASSIFIERS, ENCODERS = (
    [entry for entry in MANIFEST if entry["kind"] == kind] for kind in ("classifier", "encoder")
)


@pytest.fixture(scope="module")
def make():
    """sample_models/make.py, as a module."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("sample_models_make", FOLDER / "make.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["sample_models_make"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("sample_models_make", None)


@pytest.fixture(scope="module")
def labeled(make):
    return make.signs(make.LABELED_PER_CLASS, "labeled")


def test_drawing_is_seeded_and_balanced(make):
    images, labels = make.road_signs.draw(3, 5)
    again, _ = make.road_signs.draw(3, 5)
    other, _ = make.road_signs.draw(3, 6)
    assert images.shape == (36, 3, 32, 32) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [3] * 12
    assert np.array_equal(images, again) and not np.array_equal(images, other)


def test_every_sign_is_another_picture(make):
    flat = [np.asarray(make.road_signs.flat_sign(name).convert("RGBA")) for name in make.road_signs.CLASSES]
    for k, first in enumerate(flat):
        assert 0.3 < (first[..., 3] > 127).mean() < 0.9
        for second in flat[k + 1 :]:
            assert not np.array_equal(first, second)


def test_a_camera_that_looks_straight_sees_the_sign_as_drawn(make):
    signs = make.road_signs
    scale = signs.CANVAS / (signs.SIZE * signs.OVERSAMPLE)
    seen = signs.project(["stop"], np.array([[scale, 0, 0, 0, scale, 0, 0, 0]]))[0]
    flat = signs.flat_sign("stop").resize((32, 32), Image.Resampling.BOX)
    drawn = np.frombuffer(flat.tobytes(), np.uint8).reshape(32, 32, 4) / 255
    assert np.abs(seen - drawn).max() < 0.1


def test_the_shipped_images_are_the_drawn_ones(make, labeled):
    names = sorted(folder.name for folder in (FOLDER / "images" / "labeled").iterdir())
    assert names == list(make.road_signs.CLASSES)
    unlabeled = make.signs(make.UNLABELED_PER_CLASS, "unlabeled")
    files = sorted((FOLDER / "images" / "unlabeled").iterdir())
    assert [file.name for file in files] == [f"{k:04}.png" for k in range(1200)]
    pairs = [(files[k], unlabeled.images[k]) for k in range(0, 1200, 40)]
    for k, name in enumerate(names):
        shipped = sorted((FOLDER / "images" / "labeled" / name).iterdir())
        assert len(shipped) == 50
        drawn = labeled.images[labeled.labels == k]
        pairs += [(shipped[j], drawn[j]) for j in (0, 49)]
    for path, drawn in pairs:
        with Image.open(path) as image:
            assert image.mode == "RGB" and image.size == (32, 32)
            pixels = np.asarray(image).astype(int).transpose(2, 0, 1)
        # Another processor may round a few pixels to the next grey level.
        assert np.abs(pixels - drawn.numpy().astype(int)).mean() < 0.1, path


def test_no_picture_is_in_two_parts(make, labeled):
    def digests(images):
        return {hashlib.sha256(image.numpy().tobytes()).digest() for image in images.images}

    unlabeled, train = make.signs(100, "unlabeled"), make.signs(20, "train")
    assert len(digests(labeled) | digests(unlabeled) | digests(train)) == 600 + 1200 + 240


def test_the_slice_stays_small():
    images = sum(path.stat().st_size for path in (FOLDER / "images").rglob("*.png"))
    assert images < 6e6
    assert all(path.stat().st_size < 1.5e6 for path in FOLDER.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 30e6


def test_the_manifest_lists_every_model():
    assert sorted(entry["file"] for entry in MANIFEST) == sorted(
        path.name
        for path in FOLDER.glob("*.safetensors")
        if ".clean." not in path.name  # what cleansing leaves beside its input
    )
    for entry in MANIFEST:
        assert {"kind", "architecture", "attack", "trigger", "target", "seed"} <= entry.keys()
        assert hashlib.sha256((FOLDER / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        if entry["attack"] is not None:
            assert entry["attack"] in registry.ATTACKS


@pytest.mark.parametrize("entry", CLASSIFIERS, ids=lambda entry: entry["file"])
def test_the_manifest_tells_the_truth(entry, labeled):
    checkpoint = Checkpoint.read(FOLDER / entry["file"])
    assert checkpoint.arch.name == entry["architecture"] and checkpoint.arch.classes == 12
    assert checkpoint.metadata["bdclean.preprocess"] == "half"
    predict = Predictor(Classifier(checkpoint.build(), parse_preprocess("half")), torch.device("cpu"))
    accuracy = (predict(labeled.images) == labeled.labels).float().mean().item()
    # Another processor may decide two images in 600 otherwise.
    assert entry["n"] == 600 and accuracy == pytest.approx(entry["clean_accuracy"], abs=2.5 / 600)
    assert 0.95 < entry["clean_accuracy"] < 1
    if entry["attack"] is None:
        assert entry["trigger"] is None and entry["target"] is None and entry["attack_success_rate"] is None
        return
    name, settings = registry.parse_spec(entry["trigger"])
    trigger = registry.configure(registry.load(registry.TRIGGERS, name), settings)
    success = attack_success(predict(trigger(labeled.images)), labeled.labels, entry["target"], 12)
    assert success.float().mean().item() == pytest.approx(entry["attack_success_rate"], abs=2.5 / 550)
    assert entry["attack_success_rate"] > 0.95 and entry["base_rate"] < 0.05


def test_the_manifest_tells_the_truth_of_encoders(make, labeled):
    """A probe trained again on the file's features says the same, and the floor is that of the clean encoder."""
    known = make.signs(make.UNLABELED_PER_CLASS, "unlabeled")
    assert {entry["attack"] for entry in ENCODERS} >= {None, "badencoder", "ctrl"}
    for sample in make.encoders.SAMPLES:
        (entry,) = [each for each in ENCODERS if each["file"] == sample.file]
        again = make.encoders.measure_encoder(sample, FOLDER, known, labeled)
        assert again.keys() == entry.keys()
        for key, value in entry.items():
            # Another processor may decide two images in 600 otherwise.
            same = pytest.approx(value, abs=2.5 / 550) if isinstance(value, float) else value
            assert again[key] == same, (sample.file, key)
        assert entry["clean_accuracy"] > 0.6 and entry["knn_accuracy"] > 0.5, "chance is 0.08"
        if sample.attack is not None:
            floors = entry["clean_encoder_attack_success_rate"], entry["base_rate"]
            assert entry["attack_success_rate"] > 0.8 and max(floors) < 0.1


def test_encoders_are_read_as_what_they_are():
    for entry in ENCODERS:
        checkpoint = Checkpoint.read(FOLDER / entry["file"])
        assert checkpoint.arch.kind == "encoder" and checkpoint.arch.name == entry["architecture"]
        assert checkpoint.arch.layout == "BadEncoder, DRUPE or MIMIC" and checkpoint.arch.width == 64
        assert checkpoint.unread and all(name.startswith("g.") for name in checkpoint.unread)


def test_pre_training_repeats_to_the_bit_and_is_written_and_read_back(make, tmp_path):
    training, parts = make.signs(8, "train"), []
    for seed in (1, 1, 2):
        encoder, projector = make.encoders.pretrain(training, seed, 1, make.Precision(), quiet)
        file = tmp_path / f"{len(parts)}.safetensors"
        make.encoders.write_encoder(encoder, projector.state_dict(), file, seed)
        parts.append(file.read_bytes())
    assert parts[0] == parts[1] != parts[2]
    again, head = make.encoders.read_encoder(file)
    pairs = [
        (encoder.network.state_dict(), again.network.state_dict()),
        (projector.state_dict(), head),
    ]
    for before, after in pairs:
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_repeats_to_the_bit(make):
    training = make.signs(8, "train")
    first, second, other = (make.train(training, seed, 2, make.Precision()) for seed in (1, 1, 2))
    states = [list(model.state_dict().values()) for model in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))


@pytest.mark.slow
def test_training_learns(make):
    training = make.signs(8, "train")
    model = make.train(training, 0, 40, make.Precision())
    accuracy = (Predictor(model, torch.device("cpu"))(training.images) == training.labels).float().mean()
    assert accuracy > 0.4  # chance is 0.08
