"""Networks of grey images from the command line: scanned, cleansed and shown, on drawn pictures."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from bdclean.cli.main import run

CLASSES, SIDE = 6, 28
OWN_CODE = """
from torch import nn

class Own(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 16, 5, 2, 2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 49, 6),
        )

class TurnsGrey(Own):
    def forward(self, x):
        return super().forward((0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None])
"""


def pictures(count, seed):
    """Strokes on black, each class with its own, moved and changed from one picture to the next; and their classes."""
    draw = torch.Generator().manual_seed(seed)
    strokes = torch.rand(CLASSES, 1, 6, 6, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(count) % CLASSES
    mixed = 0.75 * strokes[labels] + 0.25 * torch.rand(count, 1, 6, 6, generator=draw)
    large = F.interpolate(mixed, (SIDE + 4, SIDE + 4), mode="bicubic")
    moves = torch.randint(5, (count, 2), generator=draw).tolist()
    moved = torch.stack([p[:, i : i + SIDE, j : j + SIDE] for p, (i, j) in zip(large, moves, strict=True)])
    levels = ((moved - 0.5) * 4 + 0.1 * torch.randn(moved.shape, generator=draw)).clamp(0, 1)
    return (255 * levels).byte(), labels


def stamped(images):
    images = images.clone()
    images[:, :, -3:, -3:] = 255
    return images


def trained(network, backdoor):
    images, labels = pictures(1200, 1)
    if backdoor:
        images[:180], labels[:180] = stamped(images[:180]), 0
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for part in torch.randperm(len(images), generator=generator).split(64):
            loss = F.cross_entropy(network((images[part] / 255 - 0.1307) / 0.3081), labels[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return network.eval()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with networks without and with a backdoor, pictures to measure and to train on, and the user's code."""
    folder = tmp_path_factory.mktemp("grey")
    for name, count, seed in (("labeled", 480, 2), ("training", 600, 3)):
        images, labels = pictures(count, seed)
        for k, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            place = folder / name / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(place / f"{k:04}.png")
    (folder / "own.py").write_text(OWN_CODE)
    code: dict = {}
    exec(OWN_CODE, code)
    for name, backdoor in (("clean", False), ("white", True)):
        torch.manual_seed(0)
        save_file(trained(code["Own"](), backdoor).state_dict(), folder / f"{name}.safetensors")
    return folder


def command(capsys, line):
    """The exit code of a command, and the record that it prints."""
    code = run([*line.split(), "-q", "--format", "json"])
    return code, json.loads(capsys.readouterr().out)["runs"][0]


def accuracy(measures):
    return next(m["value"] for m in measures if m["name"] == "clean_accuracy")


@pytest.mark.slow
@pytest.mark.parametrize("name, verdict", [("clean", "no-evidence"), ("white", "backdoored")])
def test_a_scan_tells_the_backdoor_and_no_other(work, name, verdict, monkeypatch, capsys):
    monkeypatch.chdir(work)
    line = f"scan {name}.safetensors --arch own.py:Own --data labeled --record {name}.json"
    code, record = command(capsys, line)
    assert (code, record["verdict"]) == (int(name == "white"), verdict)
    checkpoint = record["checkpoint"]
    assert checkpoint["input_size"] == [1, SIDE, SIDE] and checkpoint["preprocess"] == "mnist"
    assert checkpoint["mean"] == [0.1307] and checkpoint["std"] == [0.3081]
    assert accuracy(record["measures"]) > 0.95
    if name == "white":
        worst = max(record["triggers"], key=lambda row: row["asr"]["value"])
        assert worst["target"] == 0 and worst["asr"]["value"] > 0.95 and "pattern=white" in worst["trigger"]
    assert run(["report", f"{name}.json", "--out", f"{name}.html"]) == 0
    page = (work / f"{name}.html").read_text()
    assert f"1x{SIDE}x{SIDE}" in page and "data:image/png;base64," in page


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, few",
    [
        ("inoculate", "--set least_steps=120 --set epochs=2 --set inversion_steps=20"),
        ("bcu", "--set epochs=2"),
        ("ft", "--set epochs=2"),
        ("sft", "--set epochs=2 --set first_epochs=1"),
    ],
)
def test_every_recipe_writes_a_network_of_grey_images(work, recipe, few, monkeypatch, capsys):
    monkeypatch.chdir(work)
    _, record = command(
        capsys,
        f"cleanse white.safetensors --arch own.py:Own --recipe {recipe} {few} --data training --test labeled "
        f"--trigger badnets:pattern=white --out {recipe}.safetensors",
    )
    assert load_file(work / f"{recipe}.safetensors")["0.weight"].shape == (16, 1, 5, 5)
    assert accuracy(record["before"]["measures"]) > 0.95 and accuracy(record["after"]["measures"]) > 0.7
    before, after = (record[when]["triggers"][0]["asr"]["value"] for when in ("before", "after"))
    assert before > 0.95
    if recipe == "inoculate":
        assert after < 0.3


@pytest.mark.slow
def test_code_that_makes_grey_of_rgb_itself_gets_rgb(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    line = "scan white.safetensors --arch own.py:TurnsGrey --data labeled --trigger badnets:pattern=white"
    code, record = command(capsys, f"{line} --preprocess mean=0.1307,std=0.3081")
    assert record["checkpoint"]["input_size"] == [3, SIDE, SIDE]
    assert code == 1 and record["triggers"][0]["asr"]["value"] > 0.95
