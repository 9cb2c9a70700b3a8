"""Recognition by names and shapes, dialects, stages and taps, and the arithmetic of the families' own networks."""

import re

import pytest
import torch
from networks.on_meta import on_meta, shapes_of
from torch import nn
from torch.nn import functional as F

from bdclean.errors import Refused, UsageError
from bdclean.networks.recognition.recognition import FAMILIES, recognise, recognise_as
from bdclean.networks.stages import NO_WEIGHTS

NAMED = {p.name: p for family in FAMILIES for p in family.named_proposals(7)}
QUICK = (
    "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg11 vgg16_bn resnet20-cifar-a resnet32-cifar-b resnet18-cifar "
    "resnet50-cifar preactresnet18 wrn-16-1 wrn-28-10 vgg13-bn-cifar vgg16-bn-cifar"
).split()


def check(name):
    network = on_meta(NAMED[name].build)
    match = recognise(shapes_of(network))[0]
    arch = match.arch
    assert (arch.name, arch.classes, match.unread) == (name, 7, ())
    assert arch.input == NAMED[name].input
    modules = dict(network.named_modules())
    staged = [m for stage in arch.stages for m in stage.modules]
    # tables of positions, tokens and scales are no weights, whatever their shape
    owners = [
        n
        for n, m in modules.items()
        if n and any(p.ndim >= 2 and not NO_WEIGHTS.search(k) for k, p in m.named_parameters(recurse=False))
    ]
    assert sorted(staged) == sorted(owners)
    assert arch.stages[0].modules == (staged[0],) and arch.stages[-1].modules == (arch.head,)
    assert all(t in modules for t in arch.taps) and len(arch.taps) >= 2
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


@pytest.mark.parametrize("name", ["wrn-16-1", "wrn-28-10", "resnet20-cifar-a"])
def test_three_stages_end_in_their_layers(name):
    assert check(name).taps == ("layer1", "layer2", "layer3")


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
    from bdclean.networks.families.residual import ResidualNetwork

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


@pytest.mark.parametrize("candidate", [0, 1])
def test_shortcut_a_slices_and_pads(candidate):
    """akamaster: x[:, :, ::2, ::2] with planes // 4 zero channels on each side; the other candidate: all at the end."""
    match = recognise(shapes_of(on_meta(NAMED["resnet20-cifar-a"].build)))[candidate]
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
                side = (more // 2, more // 2) if candidate == 0 else (0, more)
                y = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, *side))
            y = F.relu(out + y)
    logits = F.linear(y.mean((2, 3)), w["fc.weight"], w["fc.bias"])
    assert torch.allclose(network(x), logits, atol=1e-5)


@pytest.mark.parametrize("candidate", [0, 1])
def test_wide_resnet_shortcuts_take_the_normed_input_or_the_raw_one(candidate):
    match = recognise(shapes_of(on_meta(NAMED["wrn-16-2"].build)))[candidate]
    assert match.arch.name == ("wrn-16-2", "wrn-16-2-raw")[candidate]
    network, w, x = run_with(match.arch)
    y = conv(x, w, "conv1")
    for stage in (1, 2, 3):
        for j in range(2):
            p, stride = f"layer{stage}.{j}", 2 if stage > 1 and j == 0 else 1
            active = F.relu(norm(y, w, f"{p}.bn1"))
            out = conv(active, w, f"{p}.conv1", stride if candidate == 0 else 1)
            out = conv(F.relu(norm(out, w, f"{p}.bn2")), w, f"{p}.conv2", 1 if candidate == 0 else stride)
            if j == 0:
                kernel = w[f"{p}.downsample.0.weight"]
                y = F.conv2d(active if candidate == 0 else y, kernel, stride=stride)
            y = out + y
    logits = F.linear(F.relu(norm(y, w, "bn1")).mean((2, 3)), w["fc.weight"], w["fc.bias"])
    assert torch.allclose(network(x), logits, atol=1e-4)


def test_biased_wide_resnet_is_the_raw_one():
    from bdclean.networks.families.preact import PreActNetwork

    network = on_meta(lambda: PreActNetwork((1, 1, 1), (32, 64, 128), 16, 5, conv_bias=True, raw=True))
    match = recognise(shapes_of(network))
    assert [m.arch.name for m in match if not m.arch.unusual] == ["wrn-10-2-bias"]
    assert match[0].arch.name == "wrn-10-2-bias"
    assert match[0].arch.build().layer2[0].conv2.stride == (2, 2)


def test_older_bottlenecks_have_their_stride_on_the_first_convolution():
    found = recognise(shapes_of(on_meta(NAMED["resnet50"].build)))
    first, second = (m for m in found if not m.arch.unusual)
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


def test_a_vgg_that_averages_its_last_maps_is_of_no_tiny_pictures():
    """It was taken for one of 8 x 8 pixels. A pool before the average is in no file: both are offered."""
    network = vgg((8, "M", 16, "M", 32), head=((32, 4),))
    found = recognise(shapes_of(network))
    assert [m.arch.name for m in found][0] == "vgg-3x8-32-bn-cifar"
    assert "vgg-3x8-32-bn-cifar-pooled" in [m.arch.name for m in found]
    assert {m.arch.input for m in found} == {(3, 32, 32)}
    built = found[0].arch.build().eval()
    built.load_state_dict({new: network.state_dict()[old] for old, new in found[0].names.items()})
    x = torch.randn(2, 3, 32, 32)
    expected = network.eval().classifier(network.features(x).mean((2, 3)))
    assert torch.allclose(built(x), expected, atol=1e-5)


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
        (
            {"layer5.x\x1b[31m": (3,)},
            "the file has all 102 of resnet18, and 1 more (layer5.x\\x1b[31m): give",
        ),
        (
            {"conv1.weight": (64, 3, 5, 5)},
            "(1 differs: conv1.weight is [64, 3, 5, 5], expected [64, 3, 3, 3])",
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


def test_a_name_settles_which_it_is_or_is_refused():
    shapes = shapes_of(on_meta(NAMED["resnet20-cifar-a"].build))
    assert [m.arch.name for m in recognise_as(shapes, "resnet20-cifar-a-end")] == ["resnet20-cifar-a-end"]
    with pytest.raises(Refused, match="resnet18 does not have these .* they fit resnet20-cifar-a"):
        recognise_as(shapes, "resnet18")
    with pytest.raises(UsageError, match="did you mean .*resnet20-cifar"):
        recognise_as(shapes, "resnet20-cifer-a")


def test_recognition_draws_no_random_numbers():
    before = torch.random.get_rng_state()
    recognise(shapes_of(on_meta(NAMED["resnet20-cifar-a"].build)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_variants_that_nobody_names_keep_names_and_shapes():
    found = recognise(shapes_of(on_meta(NAMED["resnet18"].build)))
    expected = shapes_of(on_meta(found[0].arch.build))
    names = [m.arch.name for m in found]
    assert {"resnet18+silu", "resnet18+no-pool", "resnet18+stride1-no-pool"} <= set(names)
    assert [m.arch.unusual for m in found] == [False] + [True] * (len(found) - 1)
    for match in found:
        network = on_meta(match.arch.build)
        assert shapes_of(network) == expected
    network = on_meta(next(m for m in found if m.arch.name == "resnet18+stride1-no-pool").arch.build)
    assert isinstance(network.maxpool, nn.Identity) and network.conv1.stride == (1, 1)
    chosen = recognise_as(expected, "resnet18+silu+64px")[0].arch
    assert (chosen.name, chosen.input) == ("resnet18+silu+64px", (3, 64, 64))
    assert any(isinstance(m, nn.SiLU) for m in on_meta(chosen.build).modules())
