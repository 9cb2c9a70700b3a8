"""The bench of encoders: names in its files, cells that are kept, and the table."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bdclean.bench import encoders
from bdclean.errors import Refused, UsageError
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.record.run import REFUSED, Measure, Problem, Rate, RunRecord, TriggerRow


@pytest.fixture
def pictures(tmp_path):
    """Two classes in CIFAR-10's folders: bright above, bright below."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 10)):
        for label, rows in (("above", slice(0, 16)), ("below", slice(16, 32))):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 90, (32, 32, 3))
                pixels[rows] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    return tmp_path / "data"


def test_a_file_has_badencoder_s_names_and_is_read_back(tmp_path):
    encoder = encoders.small_encoder(3).eval()
    projector = {"0.weight": torch.ones(2, 2)}
    encoders.write(encoder, projector, tmp_path / "e.safetensors")
    names = load_file(tmp_path / "e.safetensors").keys()
    assert {"f.f.0.weight", "f.f.1.running_mean", "f.f.4.0.downsample.0.weight", "g.0.weight"} <= names
    assert sum(t.numel() for t in encoder.parameters()) < 750_000
    again, kept = encoders.read(tmp_path / "e.safetensors")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(again(images), encoder(images)) and again(images).shape == (2, 128)
    assert torch.equal(kept["0.weight"], projector["0.weight"])


@pytest.mark.parametrize("network", encoders.NETWORKS)
def test_an_encoder_of_any_family_is_read_back_and_known_by_its_names(network, tmp_path):
    encoder = encoders.small_encoder(3, network).eval()
    encoders.write(encoder, {"0.weight": torch.ones(2, 2)}, tmp_path / "e.safetensors")
    again, _ = encoders.read(tmp_path / "e.safetensors", network)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    read = Checkpoint.read(tmp_path / "e.safetensors", None, False, "encoder")
    known = Classifier(read.build(), encoder.preprocess).eval()
    with torch.no_grad():
        assert torch.equal(again(images), encoder(images))
        assert torch.equal(known(images), encoder(images))


def commands(monkeypatch):
    """The command lines that the bench runs, each of which only writes a record: measured elsewhere, and slow."""
    ran = []

    def write(*arguments):
        ran.append(arguments)
        settled = "--out" in arguments
        asr = 0.07 if any("inoculate" in str(word) for word in arguments[1:3]) else 0.95
        probes = {"mlp/0": Rate(0.1), "mlp/1": Rate(0.3), "mlp/2": Rate(0.2), "knn": Rate(0.4)}
        row = TriggerRow(
            "badencoder",
            asr=Rate(asr, 10),
            base_rate=Rate(0.05, 10),
            reference_rate=Rate(0.06, 10),
            probes=probes,
        )
        record = RunRecord(
            "cleanse" if settled else "scan",
            triggers=[row],
            measures=[Measure("clean_accuracy", 0.56, 20)],
            seconds=61.4,
        )
        place = Path(arguments[arguments.index("--out" if settled else "--record") + 1])
        record.write(place.with_suffix(".json"))
        return 1

    monkeypatch.setattr(encoders, "bdclean", write)
    return ran


def test_cells_are_made_once_and_end_in_a_table(pictures, tmp_path, capsys, monkeypatch):
    work, ran = tmp_path / "work", commands(monkeypatch)
    attack, recipe = "badencoder:target=1/epochs=1/batch_size=16", "inoculate:epochs=1/least_steps=1"
    arguments = [
        "--data", str(pictures), "--work", str(work), "--epochs", "1", "--device", "cpu", "--clean",
        "--attacks", attack, "--recipes", f"{recipe},sft", "--unlabeled", "24",
    ]  # fmt: skip
    assert encoders.main(arguments) == 0
    first = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.strip().splitlines()]
    assert {len(row) for row in rows} == {len(encoders.COLUMNS)}
    assert [row[:2] for row in rows[2:]] == [
        [name, how] for name in (attack, "clean") for how in ("none", recipe, "sft")
    ]
    assert rows[2][2:] == ["56.0", "95.0", "20.0", "40.0", "6.0", "5.0", "", "", "", "10"]
    assert rows[3][2:] == ["56.0", "7.0", "20.0", "40.0", "6.0", "5.0", "0.94", "0.99", "61", "10"]
    said = [" ".join(map(str, words)) for words in ran]
    assert len(said) == 10 and sum("--reference" in words for words in said) == 4
    assert all(
        "--set epochs=1 --set least_steps=1" in words for words in said if "--recipe inoculate" in words
    )
    assert all("-unlabeled" in words for words in said if "--recipe inoculate" in words)
    assert all(
        "--head new" in words and "-unlabeled" not in words for words in said if "--recipe sft" in words
    )
    assert encoders.main(arguments) == 0
    assert capsys.readouterr().out == first and len(ran) == 10


def test_a_run_that_was_refused_is_a_row_that_says_so():
    record = RunRecord("cleanse", outcome=REFUSED, problem=Problem("no images.", 3))
    said = encoders.line("clean", "bcu", record)
    assert said.startswith("| clean | bcu | no images. |") and said.count("|") == len(encoders.COLUMNS) + 1


def test_the_images_of_two_draws_are_others_and_the_flat_ones_say_no_class(pictures, tmp_path):
    first = encoders.folders(pictures, tmp_path, "train", 24, 0)
    last = encoders.folders(pictures, tmp_path, "train", 24, 0, last=True)
    held = [{file.resolve() for file in folder.glob("*/*")} for folder in (first, last)]
    assert len(held[0]) == len(held[1]) == 24 and not held[0] & held[1]
    plain = encoders.flat(first)
    assert {file.resolve() for file in plain.iterdir()} == held[0]
    classes = [file.resolve().parent.name for file in sorted(plain.iterdir())]
    assert 2 < sum(a != b for a, b in zip(classes, classes[1:], strict=False))


def test_a_trigger_that_is_learnt_lies_beside_its_encoder(pictures, tmp_path):
    images = encoders.Images(pictures, 0)
    bench = encoders.Bench(tmp_path, images, "simclr", "resnet18", 1, 48, 24, 0, torch.device("cpu"))
    bench.make("clean", None)
    for name in ("blto:target=1/batch_size=16/epochs=1", "inactive:target=1/batch_size=16/epochs=1"):
        attack = encoders.placed(encoders.attacks_of(name)[name], bench.file(name))
        bench.make(name, attack)
        stamped = attack.trigger(bench.images.test.images)
        assert stamped.shape == bench.images.test.images.shape
    learnt = {file.name for file in tmp_path.glob("*.trigger.safetensors")}
    assert learnt == {
        f"simclr-{name}-target-1-batch_size-16-epochs-1.trigger.safetensors" for name in ("blto", "inactive")
    }


def test_an_attack_that_cannot_be_used_here_is_refused(pictures, tmp_path):
    with pytest.raises(Refused, match="badnets poisons labels"):
        bench = encoders.Bench(
            tmp_path, encoders.Images(pictures, 0), "simclr", "resnet18", 1, 48, 24, 0, torch.device("cpu")
        )
        bench.make("badnets", encoders.attacks_of("badnets")["badnets"])
    with pytest.raises(UsageError, match="no attack is called"):
        encoders.attacks_of("badencodr")
