"""Recognition by names and shapes, dialects, stages and taps, and the arithmetic of the families' own networks."""

import re
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdclean.architectures import describe, identify, recognise
from bdclean.architectures.recognition import FAMILIES
from bdclean.errors import Refused, UsageError

NAMED = {p.name: p for family in FAMILIES for p in family.named_proposals(7)}
QUICK = (
    "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg11 vgg16_bn resnet20-cifar-a resnet32-cifar-b resnet18-cifar "
    "resnet50-cifar preactresnet18 wrn-16-1 wrn-28-10 vgg13-bn-cifar vgg16-bn-cifar"
).split()


def shapes_of(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def on_meta(build):
    with torch.device("meta"):
        return build()


def check(name):
    network = on_meta(NAMED[name].build)
    match = recognise(shapes_of(network))[0]
    arch = match.arch
    assert (arch.name, arch.classes, match.unread) == (name, 7, ())
    assert arch.input == NAMED[name].input
    modules = dict(network.named_modules())
    staged = [m for stage in arch.stages for m in stage.modules]
    owners = [n for n, m in modules.items() if n and any(p.ndim >= 2 for p in m.parameters(recurse=False))]
    assert sorted(staged) == sorted(owners)
    assert arch.stages[0].modules == (staged[0],) and arch.stages[-1].modules == (arch.head,)
    assert all(t in modules for t in arch.taps) and len(arch.taps) >= 3
    return arch


@pytest.mark.parametrize("name", QUICK)
def test_a_named_network_is_recognised(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NAMED.keys() - set(QUICK)))
def test_every_other_named_network_is_recognised(name):
    check(name)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet18-cifar", "preactresnet18"])
def test_residual_stages_are_the_layers(name):
    arch = check(name)
    assert [s.name for s in arch.stages] == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert arch.taps == ("layer1", "layer2", "layer3", "layer4")
    for stage in arch.stages[1:-1]:
        assert all(m.startswith(stage.name + ".") for m in stage.modules)


def test_vgg_stages_follow_the_resolution_and_taps_the_activation():
    arch = check("vgg16_bn")
    assert [len(s.modules) for s in arch.stages] == [1, 1, 2, 3, 3, 3, 2, 1]
    assert arch.taps == ("features.5", "features.12", "features.22", "features.32", "features.42")


@pytest.mark.parametrize(
    "blocks, widths, stem, classes, name",
    [
        ((1, 1, 1), (8, 16, 32), 8, 12, "resnet8-cifar-b-w8"),
        ((1, 1, 1), (16, 32, 64), 16, 43, "resnet8-cifar-b"),
        ((1, 2, 2, 1), (64, 128, 256, 512), 64, 2, "resnet1-2-2-1-cifar"),
        ((2, 2, 2, 2), (10, 20, 40, 80), 10, 200, "resnet18-cifar-w10"),
        ((3, 3, 3), (5, 9, 23), 7, 3, "resnet20-cifar-b-w5-9-23"),
    ],
)
def test_widths_depths_and_classes_come_from_the_shapes(blocks, widths, stem, classes, name):
    from bdclean.architectures.residual import ResidualNetwork

    network = on_meta(lambda: ResidualNetwork(blocks, widths, stem, classes))
    arch = recognise(shapes_of(network))[0].arch
    assert (arch.name, arch.classes) == (name, classes)
    assert shapes_of(on_meta(arch.build)) == shapes_of(network)


# --- dialects -----------------------------------------------------------------------------------------------

DIALECTS = {
    "akamaster": ("resnet20-cifar-b", [("downsample", "shortcut"), ("^fc", "linear"), ("^", "module.")]),
    "kuangliu": ("resnet18-cifar", [("downsample", "shortcut"), ("^fc", "linear")]),
    "weiaicunzai": (
        "resnet18-cifar",
        [
            (r"^conv1\.", "conv1.0."),
            (r"^bn1\.", "conv1.1."),
            (r"(layer\d\.\d+)\.conv1\.", r"\1.residual_function.0."),
            (r"(layer\d\.\d+)\.bn1\.", r"\1.residual_function.1."),
            (r"(layer\d\.\d+)\.conv2\.", r"\1.residual_function.3."),
            (r"(layer\d\.\d+)\.bn2\.", r"\1.residual_function.4."),
            ("downsample", "shortcut"),
            *((rf"^layer{k}\.", f"conv{k + 1}_x.") for k in range(1, 5)),
        ],
    ),
    "xternalz": (
        "wrn-16-2",
        [(r"^layer(\d)\.(\d)\.", r"block\1.layer.\2."), (r"downsample\.0", "convShortcut")],
    ),
    "backdoorbench": ("preactresnet18", [("downsample", "shortcut"), ("^fc", "linear")]),
    "classifier": ("preactresnet18", [("^fc", "classifier")]),
    "head": ("resnet18", [("^fc", "head")]),
    "timm-like": ("resnet18", [("^fc", "head.fc")]),
    "stacked": ("vgg11-bn-cifar", [("^", "_orig_mod.module.model.")]),
    "backbone": ("resnet20-cifar-a", [("^(?!fc)", "backbone.")]),
    "net": ("vgg13-bn-cifar", [("^classifier", "fc"), ("^", "net.")]),
    "old": ("resnet20-cifar-a", []),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_are_renamed(dialect):
    name, rules = DIALECTS[dialect]
    canonical = shapes_of(on_meta(NAMED[name].build))
    told = {}
    for key in canonical:
        if dialect == "old" and "num_batches" in key:
            continue
        renamed = key
        for pattern, to in rules:
            renamed = re.sub(pattern, to, renamed)
        told[renamed] = key
    match = recognise({new: canonical[key] for new, key in told.items()})[0]
    assert match.arch.name == name
    assert match.names == told


def test_what_lies_outside_the_wrapper_is_left_unread():
    shapes = {f"model.{n}": s for n, s in shapes_of(on_meta(NAMED["resnet20-cifar-a"].build)).items()}
    shapes["projector.0.weight"] = (128, 64)
    match = recognise(shapes)[0]
    assert match.unread == ("projector.0.weight",)
    assert "projector.0.weight" not in match.names


# --- arithmetic against plain transcriptions ----------------------------------------------------------------


def run_with(name_or_arch, seed=0):
    arch = name_or_arch
    torch.manual_seed(seed)
    network = arch.build().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network, network.state_dict(), torch.randn(2, *arch.input)


def norm(x, w, name):
    stats = (w[f"{name}.running_mean"], w[f"{name}.running_var"])
    return F.batch_norm(x, *stats, w[f"{name}.weight"], w[f"{name}.bias"])


def conv(x, w, name, stride=1):
    kernel = w[f"{name}.weight"]
    return F.conv2d(x, kernel, w.get(f"{name}.bias"), stride, kernel.shape[-1] // 2)


@pytest.mark.parametrize("reading", [0, 1])
def test_shortcut_a_slices_and_pads(reading):
    """akamaster: x[:, :, ::2, ::2] with planes // 4 zero channels on each side; the other reading: all at the end."""
    match = recognise(shapes_of(on_meta(NAMED["resnet20-cifar-a"].build)))[reading]
    network, w, x = run_with(match.arch)
    y = F.relu(norm(conv(x, w, "conv1"), w, "bn1"))
    for stage in (1, 2, 3):
        for j in range(3):
            p, stride = f"layer{stage}.{j}", 2 if stage > 1 and j == 0 else 1
            out = norm(
                conv(F.relu(norm(conv(y, w, f"{p}.conv1", stride), w, f"{p}.bn1")), w, f"{p}.conv2"),
                w,
                f"{p}.bn2",
            )
            if stride == 2:
                more = out.shape[1] - y.shape[1]
                side = (more // 2, more // 2) if reading == 0 else (0, more)
                y = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, *side))
            y = F.relu(out + y)
    logits = F.linear(y.mean((2, 3)), w["fc.weight"], w["fc.bias"])
    assert torch.allclose(network(x), logits, atol=1e-5)


@pytest.mark.parametrize("reading", [0, 1])
def test_wide_resnet_shortcuts_take_the_normed_input_or_the_raw_one(reading):
    match = recognise(shapes_of(on_meta(NAMED["wrn-16-2"].build)))[reading]
    assert match.arch.name == ("wrn-16-2", "wrn-16-2-raw")[reading]
    network, w, x = run_with(match.arch)
    y = conv(x, w, "conv1")
    for stage in (1, 2, 3):
        for j in range(2):
            p, stride = f"layer{stage}.{j}", 2 if stage > 1 and j == 0 else 1
            active = F.relu(norm(y, w, f"{p}.bn1"))
            out = conv(active, w, f"{p}.conv1", stride if reading == 0 else 1)
            out = conv(F.relu(norm(out, w, f"{p}.bn2")), w, f"{p}.conv2", 1 if reading == 0 else stride)
            if j == 0:
                kernel = w[f"{p}.downsample.0.weight"]
                y = F.conv2d(active if reading == 0 else y, kernel, stride=stride)
            y = out + y
    logits = F.linear(F.relu(norm(y, w, "bn1")).mean((2, 3)), w["fc.weight"], w["fc.bias"])
    assert torch.allclose(network(x), logits, atol=1e-4)


def test_biased_wide_resnet_is_the_raw_one():
    from bdclean.architectures.preact import PreActNetwork

    network = on_meta(lambda: PreActNetwork((1, 1, 1), (32, 64, 128), 16, 5, conv_bias=True, raw=True))
    match = recognise(shapes_of(network))
    assert [m.arch.name for m in match] == ["wrn-10-2-bias"]
    assert match[0].arch.build().layer2[0].conv2.stride == (2, 2)


def test_older_bottlenecks_have_their_stride_on_the_first_convolution():
    first, second = recognise(shapes_of(on_meta(NAMED["resnet50"].build)))
    assert [m.arch.name for m in (first, second)] == ["resnet50", "resnet50_stride1x1"]
    strides = [on_meta(m.arch.build).layer2[0].conv1.stride for m in (first, second)]
    assert strides == [(1, 1), (2, 2)]
    assert first.arch.alternatives[0][0] == "resnet50_stride1x1"


# --- small VGGs ---------------------------------------------------------------------------------------------


def vgg(plan, norm=True, head=((512, 10),), conv_bias=True, tail=True):
    layers, inside = [], 3
    for step in plan:
        if step == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(inside, step, 3, padding=1, bias=conv_bias)]
            layers += [nn.BatchNorm2d(step)] if norm else []
            layers += [nn.ReLU()]
            inside = step
    net = nn.Module()
    net.features = nn.Sequential(*layers)
    if len(head) == 1:
        net.classifier = nn.Linear(*head[0])
    else:
        rest = []
        for a, b in head:
            rest += [nn.Dropout(), nn.Linear(a, b), nn.ReLU()]
        net.classifier = nn.Sequential(*rest[:-1])
    return net


VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


@pytest.mark.parametrize(
    "plan, head, name, side",
    [
        ((32, "M", 64, "M", 64, "M"), ((64 * 16, 10),), "vgg-3x32-64-bn-cifar", 32),
        ((32, 32, "M", 64, 64, "M", 128, 128), ((128 * 64, 43),), "vgg-6x32-128-bn-cifar", 32),
        ((16, "M", 16, "M", 16), ((16 * 64, 5),), "vgg-3x16-16-bn-cifar", 32),
        ((16, "M", 16, "M", 16, "M"), ((16 * 9, 50), (50, 5)), "vgg-3x16-16-bn-24px", 24),
        (VGG11, ((512, 512), (512, 512), (512, 10)), "vgg11-bn-cifar", 32),
    ],
)  # fmt: skip
def test_a_small_vgg_is_read_off_its_places(plan, head, name, side):
    network = vgg(plan, head=head)
    match = recognise(shapes_of(network))[0]
    assert (match.arch.name, match.arch.input, match.arch.classes) == (name, (3, side, side), head[-1][1])
    built = match.arch.build().eval()
    built.load_state_dict({new: network.state_dict()[old] for old, new in match.names.items()})
    x = torch.randn(2, 3, side, side)
    network.eval()
    assert torch.allclose(built(x), network.classifier(network.features(x).flatten(1)), atol=1e-5)


def test_a_vgg_with_its_norm_after_the_activation_is_not_guessed():
    network = nn.Module()
    network.features = nn.Sequential(
        *(m for a, b in ((3, 8), (8, 8), (8, 8)) for m in (nn.Conv2d(a, b, 3), nn.ELU(), nn.BatchNorm2d(b)))
    )
    network.classifier = nn.Linear(8, 10)
    with pytest.raises(Refused, match="no known architecture has these 23 tensors"):
        recognise(shapes_of(network))


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_near_miss_names_the_nearest_and_what_differs():
    shapes = shapes_of(on_meta(NAMED["resnet18"].build))
    assert len(shapes) == 122
    shapes["layer3.0.bn2.weight"] = (7,)
    with pytest.raises(Refused) as caught:
        recognise(shapes)
    assert str(caught.value).startswith(
        "no known architecture has these 122 tensors; "
        "nearest is resnet18 (1 differs: layer3.0.bn2.weight is [7], expected [256])"
    )


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"fc.bias": None, "fc.weight": None},
            "nearest is resnet18 (2 differ: fc.bias is missing; fc.weight",
        ),
        ({"layer5.x\x1b[31m": (3,)}, "nearest is resnet18 (1 differs: layer5.x?[31m is not part of it)"),
        (
            {"conv1.weight": (64, 1, 7, 7)},
            "(1 differs: conv1.weight is [64, 1, 7, 7], expected [64, 3, 7, 7])",
        ),
    ],
)
def test_other_near_misses(change, said):
    shapes = shapes_of(on_meta(NAMED["resnet18"].build)) | change
    with pytest.raises(Refused) as caught:
        recognise({n: s for n, s in shapes.items() if s is not None})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"weight": (3, 4)},
        {"": ()},
        {f"layer{k}.0.conv1.weight": (2**50,) * 4 for k in (1, 2, 3)}
        | {"conv1.weight": (2**60, 3, 3, 3), "fc.weight": (2**62, 1)},
        {f"layer{k}.0.conv1.weight": (0,) * 4 for k in (1, 2, 3)} | {"conv1.weight": (0,) * 4, "fc.weight": (0, 0)},
        {f"features.{k}.weight": (0, 0, 3, 3) for k in (0, 3, 6)} | {"classifier.weight": (0, 0)},
        {f"features.{3 * k}.weight": (4, 4, 3, 3) for k in range(60)} | {"classifier.weight": (10, 4)},
    ],
)  # fmt: skip
def test_senseless_shapes_are_refused(shapes):
    with pytest.raises(Refused, match="no known architecture"):
        recognise(shapes)


def test_a_name_settles_the_reading_or_is_refused():
    shapes = shapes_of(on_meta(NAMED["resnet20-cifar-a"].build))
    assert [m.arch.name for m in identify(shapes, "resnet20-cifar-a-end")] == ["resnet20-cifar-a-end"]
    with pytest.raises(Refused, match="resnet18 does not have these .* they fit resnet20-cifar-a"):
        identify(shapes, "resnet18")
    with pytest.raises(UsageError, match="did you mean .*resnet20-cifar"):
        identify(shapes, "resnet20-cifer-a")
    assert (
        identify(shapes_of(on_meta(NAMED["resnet18"].build)), "torchvision:resnet18")[0].arch.name
        == "resnet18"
    )


# --- the user's own code ------------------------------------------------------------------------------------

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
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        return self.conv(x).flatten(1)

class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x)

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
    (match,) = identify(small_shapes(classes, prefix), f"{code}:{maker}")
    arch = match.arch
    assert (arch.name, arch.classes, arch.input) == (f"user:{maker}", classes, (3, 32, 32))
    assert [len(s.modules) for s in arch.stages] == [1, 1, 2, 2, 1]
    # a tap is what the stage ends in before the next pool: here a norm, in place of the usual activation
    assert arch.taps == ("features.5", "features.13", "features.21")
    assert arch.head == "classifier"


def test_user_code_from_a_package(code, monkeypatch):
    assert identify(small_shapes(10), "own:Small")[0].arch.name == "user:Small"


@pytest.mark.parametrize(
    "spec, kind, said",
    [
        ("own.py:Smal", UsageError, "has no Smal; it has Grey, Maps, Small, broken, fixed, nn, required"),
        ("missing.py:Small", UsageError, "missing.py does not exist"),
        ("no.such.package:Small", UsageError, "No module named 'no'"),
        ("own.py:number", UsageError, "not a class or function"),
        ("own.py:text", UsageError, "gives a str, not a torch.nn.Module"),
        ("own.py:broken", Refused, "cannot be built: ValueError: no weights here"),
        ("own.py:Maps", Refused, "does not have these"),
        (":x", UsageError, "is not FILE.py:NAME"),
    ],
)
def test_user_code_that_does_not_serve(code, spec, kind, said):
    with pytest.raises(kind) as caught:
        identify(small_shapes(10), spec)
    assert said.split(", nn")[0] in str(caught.value)


@pytest.mark.parametrize(
    "name, shapes, said",
    [
        ("Grey", {"conv.weight": (4, 1, 3, 3), "conv.bias": (4,)}, "takes images of 1 channels"),
        ("Maps", {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,)}, "not one row of logits"),
    ],
)
def test_user_networks_must_give_logits_for_rgb_images(code, name, shapes, said):
    with pytest.raises(Refused, match=said):
        identify(shapes, f"{code}:{name}")


def test_a_script_that_exits_is_refused_not_obeyed(tmp_path):
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(Refused, match="leaves.py failed when imported: SystemExit"):
        identify(small_shapes(10), "leaves.py:Small")


def test_code_beside_a_file_is_not_run_without_being_asked(code, tmp_path):
    (tmp_path / "model.py").write_text("raise RuntimeError('ran')\n")
    with pytest.raises(Refused, match="no known architecture"):
        identify(small_shapes(10))


# --- stages of unusual networks -----------------------------------------------------------------------------


class Gated(nn.Module):
    """A convolution with a squeeze-and-excitation branch, whose 1x1 layer runs on pooled features."""

    def __init__(self, stride):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(8, 8, 3, stride, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.conv(x)
        return x * self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid()


class Squeeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), Gated(1), Gated(2)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        for layer in (self.stem, self.a, self.b):
            x = self.act(layer(x))
        return self.fc(x.mean((2, 3)))


def test_a_pooled_side_branch_stays_in_its_stage():
    arch = describe("se", Squeeze, (3, 16, 16))
    assert [s.modules for s in arch.stages[1:-1]] == [("a.conv", "a.gate"), ("b.conv", "b.gate")]
    # `act` runs three times: its output is no tap
    assert arch.taps == ("a", "b")


class Tokens(nn.Module):
    """A small transformer: resolution never changes, and attention hides a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(4)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_a_network_of_one_resolution_is_cut_into_equal_parts():
    arch = describe("vit", Tokens, (3, 32, 32))
    assert [s.name for s in arch.stages] == ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    assert all(len(s.modules) == 4 for s in arch.stages[1:-1])
    assert [m.split(".")[1] for s in arch.stages[1:-1] for m in s.modules] == [
        k for k in "0123" for _ in range(4)
    ]


def test_code_without_a_meta_form_runs_on_the_cpu():
    class Looks(Squeeze):
        def forward(self, x):
            if float(x.sum()) > 1e9:
                raise ValueError("too bright")
            return super().forward(x)

    assert describe("looks", Looks, (3, 16, 16)).classes == 3


def test_recognition_draws_no_random_numbers(code):
    before = torch.random.get_rng_state()
    identify(small_shapes(10), f"{code}:Small")
    recognise(shapes_of(on_meta(NAMED["resnet20-cifar-a"].build)))
    assert torch.equal(before, torch.random.get_rng_state())
