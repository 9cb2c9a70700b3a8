"""The use case behind `cleanse`, on a shipped model."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bdclean.data.loading import load_images
from bdclean.errors import Interrupted, Refused, UsageError
from bdclean.networks.ambiguity.choosing import Choice
from bdclean.networks.ambiguity.variant import Reading
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.progress import quiet
from bdclean.recipes import auto
from bdclean.recipes.inoculate import Inoculate
from bdclean.runs import suspect
from bdclean.runs.cleanse import cleanse
from bdclean.runs.images import at_own_size
from bdclean.runs.options import Inputs
from bdclean.runs.scan import scan
from bdclean.runs.split import open_images
from bdclean.runs.suspect import input_size
from bdclean.training.students import set_batch_statistics

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"


def test_a_destroyed_network_is_never_handed_over_without_a_word(tmp_path):
    """All weights re-drawn and next to no training: no trigger works on it any more, and nothing else either."""
    record = cleanse(
        SAMPLES / "signs-badnets.safetensors",
        Inputs(data=SAMPLES / "images" / "unlabeled", limit=300, precision="fp32", device="cpu"),
        recipe="bcu",
        settings={"ratios": "1", "head_ratio": "1", "epochs": "0.1"},
        triggers=("badnets:size=3",),
        out=tmp_path / "out.safetensors",
        tell=quiet,
    )
    agreement = [m for m in record.measures if m.name == "agreement"]
    assert len(agreement) == 1 and agreement[0].value < 0.5
    assert any("damaged" in warning for warning in record.warnings)
    state = tmp_path / "out.safetensors.resume.safetensors"
    assert state.exists()  # whoever writes the record deletes it: until then it can be made again


def test_a_second_copy_that_is_carried_over_keeps_an_output_from_passing(tmp_path):
    tensors = load_file(SAMPLES / "signs-clean.safetensors")
    both = {f"model.{name}": t for name, t in tensors.items()}
    both |= {f"ema.{name}": t + 1e-3 if t.is_floating_point() else t.clone() for name, t in tensors.items()}
    save_file(both, tmp_path / "two.safetensors")
    record = cleanse(
        tmp_path / "two.safetensors",
        Inputs(
            data=SAMPLES / "images" / "unlabeled",
            limit=400,
            precision="fp32",
            device="cpu",
            preprocess="half",
        ),
        recipe="clp",
        triggers=("badnets:size=3",),
        out=tmp_path / "out.safetensors",
        tell=quiet,
    )
    assert record.after.verdict == "no-evidence" and record.verdict == "not-assessed"
    assert "neither measured nor cleansed" in record.advice


@pytest.mark.slow
def test_auto_unlearns_what_fired_on_the_suspect_and_goes_on_once_where_it_still_does(tmp_path, monkeypatch):
    """With hardly any training the trigger fires on the first file that is written, and on the second."""
    quick = Inoculate(epochs=0.1, least_steps=4, batch_size=8, inversion_steps=0, peak=1e-3)
    monkeypatch.setattr(auto, "Inoculate", lambda: quick)
    data = Inputs(data=SAMPLES / "images" / "unlabeled", limit=300, precision="fp32", device="cpu")

    def run(name, recipe="auto", tell=quiet, **more):
        out, specs = tmp_path / name, ("badnets:size=3", "badnets:size=3,position=top-left")
        model = SAMPLES / "signs-badnets.safetensors"
        return cleanse(model, data, recipe=recipe, triggers=specs, out=out, tell=tell, **more)

    record = run("whole")
    rows = {row.trigger: row for row in record.triggers}
    told, other = rows["badnets"], rows["badnets:position=top-left"]
    assert record.before.triggers[0].trained_on and told.trained_on and not other.trained_on
    assert told.seen_family and told.outcome == "fails" and record.verdict == "backdoored"
    assert "1 trigger still fired: distilled for 2 updates more" in record.recipe.stages[-1]
    assert record.recipe.stages[-2].endswith("known") and record.curve[-1]["step"] == 4 + 2

    def stop(stage, done, total, **measures):
        if (stage.startswith("insist"), done) == (True, 1):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 1 of 2 of insist"):
        run("stopped", tell=stop)
    run("stopped", resume=True)
    assert (tmp_path / "stopped").read_bytes() == (tmp_path / "whole").read_bytes()

    few = {"epochs": "0.1", "least_steps": "4", "batch_size": "8", "inversion_steps": "0"}
    named = run("named", recipe="inoculate", settings=few)
    assert not any(row.trained_on for row in [*named.triggers, *named.before.triggers])
    assert not any("known" in stage or "still fired" in stage for stage in named.recipe.stages)


def pictures(folder: Path, seed: int, count: int = 24, prefix: str = "") -> Path:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"{prefix}{number:05d}.png")
    return folder


def by_class(folder: Path, seed: int) -> Path:
    for k in range(12):
        pictures(folder / str(k), 100 * seed + k, 2, "00000_")
    return folder


def table(path: Path, names) -> Path:
    path.write_text("file,label\n" + "".join(f"{name},{k % 12}\n" for k, name in enumerate(names)))
    return path


def test_a_csv_of_labels_is_about_what_is_measured_not_about_the_unlabeled_images(tmp_path):
    checkpoint = Checkpoint.read(SAMPLES / "signs-badnets.safetensors")
    data, test = pictures(tmp_path / "data", 1, 30), pictures(tmp_path / "test", 2)
    named = table(tmp_path / "test.csv", [f"{k:05d}.png" for k in range(24)])
    found, _, _ = open_images(checkpoint, Inputs(data=data, test=test, classes=named), quiet)
    assert len(found.unlabeled) == 30 and found.unlabeled.labels is None  # they have the same names
    by_name = dict(zip(found.held_out.paths, found.held_out.labels.tolist(), strict=True))
    assert by_name == {f"{k:05d}.png": k % 12 for k in range(24)}
    with pytest.raises(Refused, match="other.csv names no image of"):
        other = table(tmp_path / "other.csv", ["a.png", "b.png"])
        open_images(checkpoint, Inputs(data=data, test=test, classes=other), quiet)


def test_with_labeled_images_and_a_test_set_a_csv_may_be_about_one_of_them(tmp_path):
    checkpoint = Checkpoint.read(SAMPLES / "signs-badnets.safetensors")
    labeled, test = by_class(tmp_path / "labeled", 3), pictures(tmp_path / "test", 4)
    named = table(tmp_path / "test.csv", [f"test/{k:05d}.png" for k in range(24)])
    inputs = Inputs(labeled=labeled, test=test, classes=named)
    found, _, _ = open_images(checkpoint, inputs, quiet)
    assert found.unlabeled.labels.bincount().tolist() == [2] * 12
    assert found.held_out.labels.bincount().tolist() == [2] * 12


@pytest.mark.parametrize("labeled, where", [(300, "data"), (700, "labeled")])
def test_what_is_measured_on_is_held_out_where_there_is_enough(labeled, where, tmp_path):
    checkpoint = Checkpoint.read(SAMPLES / "signs-badnets.safetensors")
    for k in range(12):
        pictures(tmp_path / "labeled" / str(k), 100 + k, -(-labeled // 12))
    data = pictures(tmp_path / "data", 1, 700)
    found, _, _ = open_images(checkpoint, Inputs(data=data, labeled=tmp_path / "labeled"), quiet)
    assert len(found.held_out) == (233 if where == "data" else 236)  # a third
    assert (found.held_out.labels is not None) == (where == "labeled")
    assert len(found.unlabeled) == (467 if where == "data" else 700)


def test_scan_does_not_ignore_labeled_images_without_a_word(tmp_path):
    data = pictures(tmp_path / "data", 1)
    with pytest.raises(UsageError, match="one set of images"):
        scan(SAMPLES / "signs-badnets.safetensors", Inputs(data=data, labeled=data), tell=quiet)


def test_few_unlabeled_images_beside_more_labeled_ones_are_not_measured_on(tmp_path):
    checkpoint = Checkpoint.read(SAMPLES / "signs-badnets.safetensors")
    data, labeled = pictures(tmp_path / "data", 1, 30), by_class(tmp_path / "labeled", 3)
    for k in range(12):
        pictures(tmp_path / "labeled" / f"{k}" / "more", 500 + k, 10)
    found, _, _ = open_images(checkpoint, Inputs(data=data, labeled=labeled), quiet)
    assert found.held_out.labels is not None and len(found.unlabeled) == 30


def test_copies_of_what_is_measured_on_are_not_trained_on(tmp_path):
    """An exact copy under another name and a JPEG of a picture, in `--data` and in `--labeled`."""
    checkpoint = Checkpoint.read(SAMPLES / "signs-badnets.safetensors")
    whole = sorted((SAMPLES / "images" / "labeled").rglob("*.png"))[::7]
    assert len(whole) > 80
    test, data, labeled = tmp_path / "test", tmp_path / "data", tmp_path / "labeled"
    for number, path in enumerate(whole):
        place = test if number < 24 else data if number < 54 else labeled / str(number % 12)
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / f"{number}.png")
    for place in (data, labeled / "3"):
        shutil.copy(whole[0], place / "again.png")
        with Image.open(whole[1]) as picture:
            picture.save(place / "again.jpg", quality=95)
    found, entry, _ = open_images(checkpoint, Inputs(data=data, labeled=labeled, test=test), quiet)
    assert (len(found.held_out), len(found.unlabeled), len(found.labeled)) == (24, 30, len(whole) - 54)
    assert entry.duplicates == 4
    for kept in (found.unlabeled, found.labeled):
        assert not any("again" in path for path in kept.paths)


def test_labels_wherever_they_are_tell_how_the_network_is_read(tmp_path):
    checkpoint = Checkpoint.read(SAMPLES / "signs-badnets.safetensors")
    data, labeled = pictures(tmp_path / "data", 1, 30), by_class(tmp_path / "labeled", 3)
    test = by_class(tmp_path / "test", 9)
    for given, telling in (
        (Inputs(data=data), "unlabeled"),
        (Inputs(data=data, test=test), "held_out"),
        (Inputs(data=data, labeled=labeled, test=test), "labeled"),
        (Inputs(data=labeled, test=test), "unlabeled"),
        (Inputs(data=labeled, labeled=test), "labeled"),
    ):
        found = open_images(checkpoint, given, quiet)[0]
        assert found.telling() is getattr(found, telling)
    guessed = replace(found.unlabeled, labels_source="count")
    assert replace(found, unlabeled=guessed, labeled=None).telling() is found.held_out
    assert (
        replace(found, unlabeled=guessed, labeled=None, held_out=found.held_out.unlabeled()).telling()
        is guessed
    )


def unclear(monkeypatch, *names):
    """Plausible normalisations: by default the right one, and one under which the backdoor shows less."""
    kinds = [parse_preprocess(name) for name in names or ("raw255", "half")]
    found = [Choice(kind, 0.9, "first normalisation layer") for kind in kinds]
    monkeypatch.setattr(suspect, "choose", lambda *_: found)
    monkeypatch.setattr(suspect, "read_off", lambda checkpoint, *_: Reading(checkpoint.arch, [], None, None))


def test_scan_runs_under_each_plausible_normalisation_and_shows_the_worst(monkeypatch):
    unclear(monkeypatch)
    record = scan(
        SAMPLES / "signs-badnets.safetensors",
        Inputs(data=SAMPLES / "images" / "labeled", limit=300, device="cpu"),
        triggers=("badnets:size=3",),
        target="0",
        tell=quiet,
    )
    assert record.verdict == "backdoored" and record.checkpoint.preprocess == "half"
    (said,) = [w for w in record.warnings if "normalisation is unclear" in w]
    assert "raw255: " in said and "half: backdoored" in said and said.endswith("shown is half.")


def test_cleanse_asks_where_the_normalisation_is_unclear(monkeypatch, tmp_path):
    unclear(monkeypatch)
    with pytest.raises(Refused, match="unclear between raw255 or half: say which with --preprocess"):
        cleanse(
            SAMPLES / "signs-badnets.safetensors",
            Inputs(data=SAMPLES / "images" / "labeled", limit=300, device="cpu"),
            out=tmp_path / "out.safetensors",
            tell=quiet,
        )
    assert not list(tmp_path.iterdir())


def test_cleanse_takes_the_likeliest_of_normalisations_that_hardly_differ(monkeypatch, tmp_path):
    unclear(monkeypatch, "half", "mean=0.51/0.51/0.51,std=0.49/0.49/0.49")
    record = cleanse(
        SAMPLES / "signs-badnets.safetensors",
        Inputs(data=SAMPLES / "images" / "labeled", limit=300, device="cpu"),
        recipe="clp",
        triggers=("badnets:size=3",),
        out=tmp_path / "out.safetensors",
        tell=quiet,
    )
    assert record.checkpoint.preprocess == "half" and (tmp_path / "out.safetensors").exists()
    (said,) = [w for w in record.warnings if "normalisation is unclear" in w]
    assert "hardly differ: half is taken" in said


@pytest.mark.slow
def test_an_output_says_the_size_that_its_input_was_read_at(tmp_path):
    """torchvision's ResNet trained at 32 pixels: read alone, the output is not taken for one of 224."""
    from torchvision.models import resnet

    data = pictures(tmp_path / "data", 1, 120)
    torch.manual_seed(0)
    network = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    images = load_images(data, (32, 32), limit=64).images
    half = parse_preprocess("half")
    set_batch_statistics(Classifier(network, half), lambda: iter([images]))
    save_file(network.state_dict(), tmp_path / "m.safetensors", {"bdclean.preprocess": "half"})
    for preprocess in ("auto", "half"):
        record = cleanse(
            tmp_path / "m.safetensors",
            Inputs(data=data, test=SAMPLES / "images" / "labeled", limit=120, device="cpu", preprocess=preprocess),
            recipe="clp", triggers=("badnets:size=3",), out=tmp_path / "o.safetensors", tell=quiet,
        )  # fmt: skip
        assert record.checkpoint.input_size == [3, 32, 32]
        written = Checkpoint.read(tmp_path / "o.safetensors")
        assert input_size(written, Inputs()) == (32, 32)
        assert at_own_size(written, data, Inputs()) is written
