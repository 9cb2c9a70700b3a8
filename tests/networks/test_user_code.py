"""Networks from the user's own code, run only because --arch names it."""

import sys

import pytest
import torch

from bdclean.errors import Refused, UsageError
from bdclean.networks.recognition.identify import identify
from bdclean.networks.recognition.recognition import recognise_as

CODE = """
import torch
from torch import nn
import neighbour

class Small(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        layers, inside = [], 3
        for width in neighbour.WIDTHS:
            for _ in range(2):
                layers += [nn.Conv2d(inside, width, 3, padding=1), nn.ELU(), nn.BatchNorm2d(width)]
                inside = width
            layers += [nn.MaxPool2d(2), nn.Dropout(0.2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inside * 16, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))

def required(num_classes):
    return Small(num_classes)

def fixed():
    return Small(4)

def broken():
    raise ValueError("no weights here")

class Grey(nn.Module):
    def __init__(self, side=28):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * (side - 2) ** 2, 10)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))

class TurnsGrey(Grey):
    def forward(self, x):
        red, green, blue = x.unbind(1)
        return super().forward((0.299 * red + 0.587 * green + 0.114 * blue)[:, None])

class Flat(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(28 * 28, 10))

class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, x):
        return self.conv(x).flatten(1)

class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x)

class Tuple(Small):
    def forward(self, x):
        return super().forward(x), x

class Mapping(Small):
    def forward(self, x):
        return {"logits": super().forward(x)}

number = 3
text = lambda: "no module"
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTHS = (8, 12, 16)\n")
    (tmp_path / "own.py").write_text(CODE)
    yield tmp_path / "own.py"
    for name in ("neighbour", "bdclean_user_own", "own"):
        sys.modules.pop(name, None)


def small_shapes(classes, prefix=""):
    shapes, inside, at = {}, 3, 0
    for width in (8, 12, 16):
        for _ in range(2):
            shapes[f"features.{at}.weight"] = (width, inside, 3, 3)
            for name in ("bias",):
                shapes[f"features.{at}.{name}"] = (width,)
            for name in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"features.{at + 2}.{name}"] = (width,)
            shapes[f"features.{at + 2}.num_batches_tracked"] = ()
            inside, at = width, at + 3
        at += 2
    shapes |= {"classifier.weight": (classes, 256), "classifier.bias": (classes,)}
    return {prefix + n: s for n, s in shapes.items()}


@pytest.mark.parametrize("maker, classes", [("Small", 10), ("Small", 43), ("required", 7), ("fixed", 4)])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_user_code_is_fitted(code, maker, classes, prefix):
    (match,) = recognise_as(small_shapes(classes, prefix), f"{code}:{maker}")
    arch = match.arch
    assert (arch.name, arch.classes, arch.input) == (f"user:{maker}", classes, (3, 32, 32))
    assert [len(s.modules) for s in arch.stages] == [1, 1, 2, 2, 1]
    # a tap is what the stage ends in before the next pool: here a norm, in place of the usual activation
    assert arch.taps == ("features.5", "features.13", "features.21")
    assert arch.head == "classifier"


def test_user_code_from_a_package(code, monkeypatch):
    assert recognise_as(small_shapes(10), "own:Small")[0].arch.name == "user:Small"


@pytest.mark.parametrize(
    "spec, kind, said",
    [
        (
            "own.py:Smal",
            UsageError,
            "has no Smal; it has Flat, Grey, Mapping, Maps, Small, Stacked, Tuple, TurnsGrey",
        ),
        ("missing.py:Small", UsageError, "missing.py does not exist"),
        ("no.such.package:Small", UsageError, "No module named 'no'"),
        ("own.py:number", UsageError, "not a class or function"),
        ("own.py:text", UsageError, "does not give a network but an object of type str: name a class"),
        ("own.py:broken", Refused, "cannot be built: ValueError: no weights here"),
        ("own.py:Maps", Refused, "does not have these"),
        ("own.py:Tuple", Refused, "own.py:Tuple returns a tuple: wrap it so that forward gives the logits"),
        ("own.py:Mapping", Refused, "own.py:Mapping returns a dict: wrap it so that forward gives the"),
        (":x", UsageError, "is not FILE.py:NAME"),
    ],
)
def test_user_code_that_does_not_serve(code, spec, kind, said):
    with pytest.raises(kind) as caught:
        recognise_as(small_shapes(10), spec)
    assert said.split(", nn")[0] in str(caught.value)


@pytest.mark.parametrize(
    "name, shapes, said",
    [
        (
            "Stacked",
            {"conv.weight": (4, 2, 3, 3), "conv.bias": (4,)},
            "takes images of 2 channels: bdclean reads",
        ),
        ("Maps", {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,)}, "not one row of logits"),
    ],
)
def test_user_networks_must_give_logits_for_grey_or_rgb_images(code, name, shapes, said):
    with pytest.raises(Refused, match=said):
        recognise_as(shapes, f"{code}:{name}")


@pytest.mark.parametrize(
    "name, size", [("Grey", (1, 28, 28)), ("TurnsGrey", (3, 28, 28)), ("Flat", (1, 28, 28))]
)
def test_user_code_gets_the_channels_that_it_takes(code, name, size):
    shapes = {
        "conv.weight": (4, 1, 3, 3), "conv.bias": (4,), "fc.weight": (10, 2704), "fc.bias": (10,)
    }  # fmt: skip
    if name == "Flat":
        shapes = {"1.weight": (10, 784), "1.bias": (10,)}
    (match,) = recognise_as(shapes, f"{code}:{name}")
    assert match.arch.input == size


def test_a_script_that_exits_is_refused_not_obeyed(tmp_path):
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(Refused, match="leaves.py failed when imported: SystemExit"):
        recognise_as(small_shapes(10), "leaves.py:Small")


def test_code_beside_a_file_is_not_run_without_being_asked(code, tmp_path):
    (tmp_path / "model.py").write_text("raise RuntimeError('ran')\n")
    with pytest.raises(Refused, match="no known architecture"):
        recognise_as(small_shapes(10))


def test_fitting_draws_no_random_numbers(code):
    before = torch.random.get_rng_state()
    recognise_as(small_shapes(10), f"{code}:Small")
    assert torch.equal(before, torch.random.get_rng_state())


TRUNKS = """
import torch
from torch import nn
from torchvision.models import resnet18, squeezenet1_0, vit_b_16, mobilenet_v2, VisionTransformer
import timm

def trunk():
    network = resnet18(num_classes=10)
    network.fc = nn.Identity()
    return network

def listed():
    return nn.Sequential(*list(resnet18().children())[:-1], nn.Flatten())

def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def tokens():
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, depth=2)

def headed():
    return resnet18(num_classes=10)

def maps():
    return squeezenet1_0(num_classes=10)

def softmaxed():
    return nn.Sequential(resnet18(num_classes=10), nn.Softmax(1))

def classes():
    return timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, patch_size=8, depth=2)

def pooled():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.mark.parametrize(
    ("maker", "kind"),
    [
        *((name, "encoder") for name in ("trunk", "listed", "plain", "tokens")),
        *((name, "classifier") for name in ("headed", "maps", "softmaxed", "classes", "pooled")),
    ],
)
def test_code_without_a_head_is_read_as_an_encoder(tmp_path, maker, kind):
    """A feature is no class: a ResNet's 512 were taken for 512 classes."""
    if maker in ("tokens", "classes"):
        pytest.importorskip("timm")
    text = TRUNKS if "timm" in sys.modules else TRUNKS.replace("import timm\n", "")
    file = tmp_path / "trunks.py"
    file.write_text(text, encoding="utf-8")
    namespace = {}
    exec(compile(text, str(file), "exec"), namespace)
    shapes = {k: tuple(v.shape) for k, v in namespace[maker]().state_dict().items()}
    (match,), notes = identify(shapes, f"{file}:{maker}", None)
    assert match.arch.kind == kind
    assert ("ends without a head" in " ".join(notes)) == (kind == "encoder")
    assert identify(shapes, f"{file}:{maker}", None, "classifier")[0][0].arch.kind == "classifier"
