"""The bench of encoders: names in its files, cells that are kept, and the table."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bdclean.bench import encoders
from bdclean.errors import Refused, UsageError


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


def test_cells_are_made_once_and_end_in_a_table(pictures, tmp_path, capsys):
    work = tmp_path / "work"
    arguments = [
        "--data", str(pictures), "--work", str(work), "--epochs", "1", "--device", "cpu",
        "--attacks", "badencoder:target=1/epochs=1/batch_size=16,ctrl:target=1/rate=0.5",
    ]  # fmt: skip
    assert encoders.main(arguments) == 0
    first = capsys.readouterr().out
    lines = first.strip().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| clean", "| badencoder:target=1/epochs=1/batch_size=16", "| ctrl:target=1/rate=0.5",
    ]  # fmt: skip
    assert len({line.count("|") for line in lines}) == 1
    files = {file: file.stat().st_mtime_ns for file in work.iterdir()}
    assert len(files) == 6
    assert encoders.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert {file: file.stat().st_mtime_ns for file in work.iterdir()} == files
    record = json.loads((work / "simclr-ctrl-target-1-rate-0.5.json").read_text())
    assert record["n"] == 10 and record["images"] == 20 and 0 <= record["asr"] <= 1


def test_a_trigger_that_is_learnt_lies_beside_its_encoder(pictures, tmp_path):
    bench = encoders.Bench(tmp_path, encoders.Images(pictures, 0), "simclr", 1, 48, 0, torch.device("cpu"))
    bench.make("clean", None)
    for name in ("blto:target=1/batch_size=16/epochs=1", "inactive:target=1/batch_size=16/epochs=1"):
        attack = bench.placed(name, encoders.attacks_of(name)[name])
        bench.make(name, attack)
        assert 0 <= bench.measured(name, attack)["asr"] <= 1
    learnt = {file.name for file in tmp_path.glob("*.trigger.safetensors")}
    assert learnt == {
        f"simclr-{name}-target-1-batch_size-16-epochs-1.trigger.safetensors" for name in ("blto", "inactive")
    }


def test_an_attack_that_cannot_be_used_here_is_refused(pictures, tmp_path):
    with pytest.raises(Refused, match="badnets poisons labels"):
        bench = encoders.Bench(
            tmp_path, encoders.Images(pictures, 0), "simclr", 1, 48, 0, torch.device("cpu")
        )
        bench.make("badnets", encoders.attacks_of("badnets")["badnets"])
    with pytest.raises(UsageError, match="no attack is called"):
        encoders.attacks_of("badencodr")
