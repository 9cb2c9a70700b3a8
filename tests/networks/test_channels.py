"""Networks of grey images: recognised by the first convolution, at MNIST's side, and of one candidate normalisation."""

import copy
import json

import pytest
import torch
from networks.on_meta import on_meta, shapes_of
from safetensors.torch import load_file, save_file
from torch import nn

from bdclean.errors import Refused
from bdclean.networks.ambiguity.choosing import choose
from bdclean.networks.ambiguity.normalisation import decide
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import GREY_CANDIDATES, NAMED, parse_preprocess
from bdclean.networks.recognition.channels import STEMS, as_rgb, first_convolution_takes
from bdclean.networks.recognition.identify import accepts, identify
from bdclean.networks.recognition.recognition import FAMILIES, recognise

NAMES = {p.name: p for family in FAMILIES for p in family.named_proposals(7)}
QUICK = (
    "resnet18 densenet121 mobilenet_v2 mobilenet_v3_small squeezenet1_1 vgg11_bn vit_b_16 swin_t convnext_tiny "
    "shufflenet_v2_x0_5 mnasnet0_5 googlenet regnet_y_400mf resnet20-cifar-a resnet18-cifar preactresnet18 wrn-16-1 "
    "vgg16-bn-cifar"
).split()


def check(name):
    network = on_meta(NAMES[name].build)
    stem = next(n for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    assert f"{stem}.weight" in STEMS and as_rgb(shapes_of(network)) == (shapes_of(network), 3)
    rgb, grey = (
        recognise(shapes_of(network))[0].arch,
        recognise(shapes_of(first_convolution_takes(1, network))),
    )
    assert grey[0].arch.name == name and all(match.arch.input[0] == 1 for match in grey)
    assert grey[0].arch.stages == rgb.stages and grey[0].arch.taps == rgb.taps
    usual = NAMES[name].input[1]
    assert grey[0].arch.input[1] in ((28, 32) if usual == 32 else (usual,))
    return grey[0].arch


@pytest.mark.parametrize("name", QUICK)
def test_a_known_network_with_one_input_channel_is_recognised(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NAMES.keys() - set(QUICK)))
def test_every_other_known_network_with_one_input_channel_is_recognised(name):
    check(name)


def test_small_networks_are_for_mnists_side_where_they_run_on_it():
    assert check("resnet20-cifar-a").input == (1, 28, 28)
    assert check("vgg16-bn-cifar").input == (1, 32, 32), "five pools leave nothing of 28 pixels"
    assert check("resnet18").input == (1, 224, 224)


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channel_counts_are_refused_in_a_sentence(channels):
    network = first_convolution_takes(channels, on_meta(NAMES["resnet20-cifar-b"].build))
    with pytest.raises(
        Refused, match=rf"takes images of {channels} channels: bdclean reads images as grey .1 channel."
    ):
        recognise(shapes_of(network))


def test_a_near_miss_of_a_grey_network_differs_only_where_it_does():
    shapes = shapes_of(first_convolution_takes(1, on_meta(NAMES["resnet18-cifar"].build)))
    shapes["layer3.0.bn2.weight"] = (7,)
    with pytest.raises(Refused, match="nearest is resnet18-cifar .1 differs: layer3.0.bn2.weight"):
        recognise(shapes)


def grey_network(seed=0):
    torch.manual_seed(seed)
    return first_convolution_takes(1, ResidualNetwork((1, 1, 1), (8, 16, 32), 8, 10)).eval()


def digits(count=200, side=28, seed=0):
    """Bright strokes on black, uint8 [n 1 h w]: grey levels as uneven as MNIST's."""
    draw = torch.Generator().manual_seed(seed)
    field = nn.functional.interpolate(
        torch.rand(count, 1, 7, 7, generator=draw), (side, side), mode="bicubic"
    )
    return (255 * ((field - 0.6) * 5).clamp(0, 1)).byte()


def test_a_grey_file_is_built_run_and_written_back(tmp_path):
    network = grey_network()
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    assert checkpoint.arch.input == (1, 28, 28)
    assert accepts(checkpoint.arch, (32, 32)) and not accepts(checkpoint.arch, (0, 0))
    x = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(checkpoint.build()(x), network(x))
    checkpoint.write(checkpoint.build(), tmp_path / "out.safetensors", {"preprocess": "mnist"})
    assert load_file(tmp_path / "out.safetensors")["conv1.weight"].shape == (8, 1, 3, 3)
    (choice,) = choose(Checkpoint.read(tmp_path / "out.safetensors"), digits(), "mnist")
    assert choice.preprocess == NAMED["mnist"]


@pytest.mark.parametrize("name", [p.name for p in GREY_CANDIDATES])
def test_the_first_layers_statistics_tell_a_grey_networks_normalisation(name):
    network = grey_network()
    preprocess = NAMED[name].of_channels(1)
    with torch.no_grad():
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the average of all batches
        for seed in range(8):
            network(preprocess.normalise(digits(seed=seed + 1)))
    kept, margin, source = decide(network.eval(), digits(seed=99), None)
    assert kept == [preprocess] and margin > 1 and source == "first normalisation layer"


def test_claims_of_three_values_are_averaged_for_grey_images(tmp_path):
    save_file(grey_network().state_dict(), tmp_path / "model.safetensors")
    for mean, std, name in [
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "imagenet"),
        ([0.1307], [0.3081], "mnist"),
        (0.5, 0.5, "half"),
        ([0.2, 0.3, 0.4], [0.1, 0.2, 0.3], "mean=0.3,std=0.2"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
        choices = choose(Checkpoint.read(tmp_path), digits(), "auto")
        claimed = [c.preprocess for c in choices if c.source == "config.json"]
        assert [p.title for p in claimed] == [name] and len(claimed[0].mean) == 1


@pytest.mark.parametrize(
    "text", ["mean=0.1307,std=0.3081", "mnist", "fashion-mnist", "none", "mean=33,std=79,scale=255"]
)
def test_a_grey_spec_is_read_back(text):
    found = parse_preprocess(text).of_channels(1)
    assert len(found.mean) == len(found.std) == 1
    assert parse_preprocess(found.spec()).of_channels(1) == found
    x = torch.rand(2, 1, 3, 3)
    scale = 255 if "255" in text else 1
    assert torch.allclose(found.normalise(x), (scale * x - found.mean[0]) / found.std[0])
    rgb = parse_preprocess(text).of_channels(3)
    assert torch.allclose(rgb.normalise(x.expand(-1, 3, -1, -1)), found.normalise(x).expand(-1, 3, -1, -1))


def test_timms_in_chans_is_read_off_the_first_convolution(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is an extra")
    for name, settings in (
        ("resnet10t", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}),
    ):
        network = timm.create_model(name, pretrained=False, num_classes=7, in_chans=1, **settings).eval()
        config = {"architecture": name, "num_classes": 7, "model_args": settings,
                  "pretrained_cfg": {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5]}}  # fmt: skip
        (match,) = identify(shapes_of(network), None, config)[0]
        assert match.arch.name == f"timm:{name}" and match.arch.input == (1, 32, 32)
        built = match.arch.build().eval()
        built.load_state_dict(copy.deepcopy(network.state_dict()))
        x = torch.randn(2, 1, 32, 32)
        with torch.no_grad():
            assert torch.equal(built(x), network(x))
    pair = timm.create_model("resnet10t", pretrained=False, num_classes=7, in_chans=2)
    with pytest.raises(Refused, match="timm:resnet10t takes images of 2 channels"):
        identify(shapes_of(pair), "timm:resnet10t", None)
