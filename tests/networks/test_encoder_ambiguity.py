"""An encoder's pixels, size and stem are told by its statistics and its authors, never by features as answers."""

import math

import pytest
import torch
from networks.layout_files import read, small, under

from bdclean.networks.ambiguity import size
from bdclean.networks.ambiguity.choosing import AUTHORS, choose
from bdclean.networks.ambiguity.size import own_size
from bdclean.networks.ambiguity.variant import read_off
from bdclean.networks.families.token_transformer import Form, TokenTransformer
from bdclean.networks.normalisation import parse_preprocess


def pictures(count=256, side=32):
    """Smooth colours, so that neighbours are alike as in photographs."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * torch.tensor([1.0, 0.8, 0.5]).view(1, 3, 1, 1)
    return (torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def trained(network, spec):
    """`network` with the running statistics of pictures under this normalisation."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    network.train()
    with torch.no_grad():
        network(parse_preprocess(spec).normalise(pictures()))
    return network.eval()


def tokens():
    torch.manual_seed(0)
    form = Form(width=64, depth=1, heads=1, patch=8, inner=128, positions=17)
    network = TokenTransformer(form, 2)
    network.head = torch.nn.Identity()
    torch.nn.init.normal_(network.cls_token)
    return network.eval()


BAD = "mean=0.4914/0.4822/0.4465,std=0.2023/0.1994/0.2010"


@pytest.mark.parametrize("spec, first", [("imagenet", "imagenet"), ("none", "none")])
def test_the_first_norm_decides_and_the_authors_come_first_among_the_plausible(spec, first, tmp_path):
    state = under("backbone.", trained(small(), spec)) | {"proj_head.0.weight": torch.randn(4, 32)}
    checkpoint = read(tmp_path / "m.safetensors", state)
    assert checkpoint.arch.usual_preprocess == ""
    choices = choose(checkpoint, pictures())
    assert choices[0].preprocess.name == first and choices[0].source == "first normalisation layer"
    state = under("f.f.", trained(small(), spec), renumbered)
    choices = choose(read(tmp_path / "m.safetensors", state), pictures())
    # What BadEncoder's authors use is contradicted by these statistics: it is no claim that a file makes.
    assert choices[0].preprocess.name == first
    assert all(c.source != AUTHORS for c in choices)


def renumbered(name):
    from networks.layout_files import numbered

    return numbered(name, 0, 3)


def test_the_authors_values_where_the_statistics_allow_them(tmp_path):
    state = under("f.f.", trained(small(), BAD), renumbered)
    first = choose(read(tmp_path / "m.safetensors", state), pictures())[0]
    assert first.source == AUTHORS and first.preprocess.gap(parse_preprocess(BAD)) < 1e-9


def test_without_a_norm_the_claim_else_the_authors(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint = read(path, under("", tokens()))
    (choice,) = choose(checkpoint, pictures(), labels=torch.zeros(256, dtype=torch.long))
    assert choice.preprocess.name == "imagenet" and choice.source == AUTHORS and math.isnan(choice.margin)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5,0.5,0.5], "image_std": [0.5,0.5,0.5]}'
    )
    (choice,) = choose(type(checkpoint).read(path), pictures())
    assert choice.preprocess.name == "half" and choice.source == "config.json"
    (choice,) = choose(checkpoint, pictures(), given="clip")
    assert choice.source == "given"


def test_nothing_known_leaves_several(tmp_path):
    state = under("backbone.vit.", tokens())
    choices = choose(read(tmp_path / "m.safetensors", state), pictures())
    assert len(choices) > 1 and {c.source for c in choices} == {"no evidence"}


def test_size_and_architecture_of_a_transformer_are_left_alone(tmp_path):
    checkpoint = read(tmp_path / "m.safetensors", under("", tokens()))
    assert own_size(checkpoint, lambda arch: pictures(8, arch.input[1])) is checkpoint
    reading = read_off(
        checkpoint, choose(checkpoint, pictures())[0], pictures(), torch.zeros(256).long(), False
    )
    assert reading.arch == checkpoint.arch and not reading.doubt and not reading.warning


@pytest.mark.parametrize("padding", [1, 2])
def test_statistics_tell_the_padded_stem(padding, tmp_path):
    network = small()
    network.conv1.padding = (padding, padding)
    state = under("backbone.", trained(network, "cifar10")) | {"projector.0.weight": torch.randn(4, 32)}
    checkpoint = read(tmp_path / "m.safetensors", state)
    choice = choose(checkpoint, pictures(), given="cifar10")[0]
    reading = read_off(checkpoint, choice, pictures(), None, False)
    assert reading.arch.name.endswith("+pad2") == (padding == 2), reading


@pytest.mark.parametrize(("misfits", "side"), [({32: 9.0, 48: 0.8}, 48), ({32: 9.0, 48: 1.5}, 32)])
def test_another_size_of_an_encoder_must_fit_not_only_fit_better(misfits, side, tmp_path, monkeypatch):
    """Attacks leave statistics that fit no size: the least ill fitting one is often wrong."""
    checkpoint = read(tmp_path / "m.safetensors", under("backbone.", small()))
    monkeypatch.setattr(size, "misfit_of_statistics", lambda c, *_: misfits.get(c.arch.input[1], 99.0))
    found = own_size(checkpoint, lambda arch: pictures(8, arch.input[1]))
    assert found.arch.input[1:] == (side, side)
