"""Hugging Face's classifiers: networks whose names were translated, as the config beside the weights settles them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bdclean.errors import Refused
from bdclean.files.text import shown
from bdclean.networks.arch import Arch, Shape
from bdclean.networks.recognition import recognition, timm_models
from bdclean.networks.recognition.channels import as_rgb, check_readable, with_channels
from bdclean.networks.recognition.dialects import views
from bdclean.networks.recognition.matching import Match, Part, differences, listed
from bdclean.networks.recognition.transformers_names import Translation, translate
from bdclean.networks.recognition.variants import with_epsilon
from bdclean.networks.stages import describe

CODE = "give the network's own code with --arch FILE.py:NAME"
# The only activation that the networks read from transformers' names have here; gelu for the other kinds.
ACTIVATIONS = {"resnet": "relu", "regnet": "relu"}
# Whether the first stage lowers the resolution, where a config does not say.
FIRST_STAGE_LOWERS = {"resnet": False, "regnet": True}
# transformers' epsilon of layer norms, of all of them or of the last alone, where a config does not say: that of
# google/vit-base-patch16-224 and facebook/convnext-tiny-224.
EPSILON = {"vit": (1e-12, ""), "convnext": (1e-12, "classifier.0"), "convnextv2": (1e-12, "head.norm")}


def translated(
    shapes: Mapping[str, Shape], arch: str | None, claim: Mapping[str, Any]
) -> tuple[list[Match], list[str]] | None:
    """The networks that have these tensors under transformers' names; None where the names are not transformers'."""
    for short, unread in views(shapes):
        there = translate({new: tuple(shapes[old]) for old, new in short.items()})
        if there is None:
            continue
        found = known(there, arch)
        own = claim if claim.get("model_type", there.kind) == there.kind else {}
        notes = []
        if own is not claim:
            notes.append(f"config.json says {shown(claim['model_type'])}, the names are {there.kind}'s.")
        # What the user says is above any claim.
        found = settle(found, there.kind, own if arch is None else {})
        return [back(m, short, unread, there) for m in found], notes
    return None


def known(there: Translation, arch: str | None) -> list[Match]:
    """The networks for names that were translated."""
    if there.kind != "convnextv2":
        found = recognition.recognise_as(there.shapes, arch)
        if found[0].unread:
            raise Refused(f"{shown(found[0].unread[0])} is not part of a {there.kind} that is known: {CODE}.")
        return found
    rgb, channels = as_rgb(there.shapes)
    proposal = timm_models.convnextv2(rgb)
    differing = ["its stages or its head are not whole"]
    if proposal is not None:
        proposal = with_channels(proposal, channels)
        try:
            network, expected = timm_models.on_meta(proposal.build)
        except Exception as error:  # a builder may refuse numbers in any way
            raise Refused(f"no ConvNeXt V2 has these numbers ({shown(error)}): {CODE}.") from None
        differing = differences(there.shapes, expected)
        if not differing:
            check_readable(f"this {proposal.name}", channels)
            made = describe(proposal.name, proposal.build, proposal.input, (), network)
            return [Match(made, {name: name for name in there.shapes}, ())]
    raise Refused(f"these {len(there.shapes)} tensors are no ConvNeXt V2 ({listed(differing)}): {CODE}.")


def settle(found: list[Match], kind: str, claim: Mapping[str, Any]) -> list[Match]:
    """The candidates that the claim allows, with its epsilon; raises Refused for what is not built here."""
    activation = claim.get("hidden_act", ACTIVATIONS.get(kind, "gelu"))
    if activation != ACTIVATIONS.get(kind, "gelu"):
        usual_one = ACTIVATIONS.get(kind, "gelu")
        raise Refused(
            f"config.json says hidden_act {shown(activation)}; only {usual_one} is known for {kind}: {CODE}."
        )
    lowers = claim.get("downsample_in_first_stage")
    if kind in FIRST_STAGE_LOWERS and isinstance(lowers, bool) and lowers != FIRST_STAGE_LOWERS[kind]:
        found = [with_first_stride(m, kind, 2 if lowers else 1) for m in found]
    if claim.get("model_type") == kind:
        found = [chosen(found, kind, claim)]
    side = claim.get("image_size")
    if kind != "vit" and isinstance(side, int) and 32 <= side <= 2048:
        # A transformer's position embedding shows it; for the others it is what the network was trained at.
        found = [replace(m, arch=replace(m.arch, input=(m.arch.input[0], side, side))) for m in found]
    if kind not in EPSILON:
        return found
    usual, last = EPSILON[kind]
    value = claim.get("layer_norm_eps", usual)
    if not isinstance(value, float) or not 0 < value < 0.1:
        value = usual
    return [replace(m, arch=replace(m.arch, build=with_epsilon(m.arch.build, value, last))) for m in found]


def with_first_stride(match: Match, kind: str, stride: int) -> Match:
    """The network with this stride in its first stage, which shapes show only where that changes no width."""
    arch = match.arch
    if kind == "regnet":
        block, strided, shortcut = "trunk_output.block1.block1-0", "f.b.0", "proj.0"
    else:
        inner = "layer1.0.conv3.weight" in match.names.values() and "stride1x1" not in arch.name
        block, strided, shortcut = "layer1.0", "conv2" if inner else "conv1", "downsample.0"
    places = [f"{block}.{place}" for place in (strided, shortcut)]
    places = [place for place in places if f"{place}.weight" in match.names.values()]
    build = partial(restrided, arch.build, places, stride)
    made = describe(arch.name, build, arch.input, arch.alternatives)
    return replace(match, arch=replace(made, unusual=arch.unusual))


def restrided(build: Callable[[], nn.Module], places: Sequence[str], stride: int) -> nn.Module:
    """The network with this stride in the convolutions at `places`."""
    network = build()
    for place in places:
        convolution = network.get_submodule(place)
        assert isinstance(convolution, nn.Conv2d)
        convolution.stride = (stride, stride)
    return network


def chosen(found: list[Match], kind: str, claim: Mapping[str, Any]) -> Match:
    """The candidate that the claim names; the others stay among its alternatives."""
    if kind == "resnet":
        first_convolution = claim.get("downsample_in_bottleneck") is True
        return next((m for m in found if ("stride1x1" in m.arch.name) == first_convolution), found[0])
    heads = claim.get("num_attention_heads")
    if kind == "vit" and isinstance(heads, int):
        for match in found:
            if attention_heads(match.arch) == heads:
                return match
        if (made := with_heads(found[0], heads)) is not None:
            return made
        raise Refused(
            f"config.json says {heads} attention heads, which these tensors do not allow: correct it."
        )
    return found[0]


def with_heads(match: Match, heads: int) -> Match | None:
    """The transformer with this number of heads, more or narrower ones than are tried unasked; None where none fits."""
    arch = match.arch
    with torch.device("meta"):
        first = next(m for m in arch.build().modules() if isinstance(m, nn.MultiheadAttention))
    if heads < 1 or first.embed_dim % heads:
        return None

    def build() -> nn.Module:
        network = arch.build()
        for module in network.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.num_heads, module.head_dim = heads, module.embed_dim // heads
        return network

    return replace(match, arch=replace(arch, name=re.sub(r"-h\d+-", f"-h{heads}-", arch.name), build=build))


def attention_heads(arch: Arch) -> int | None:
    """The number of heads of the first attention that says so."""
    with torch.device("meta"):
        network = arch.build()
    return next((int(m.num_heads) for m in network.modules() if isinstance(m, nn.MultiheadAttention)), None)


def back(match: Match, short: dict[str, str], unread: tuple[str, ...], there: Translation) -> Match:
    """The same match for the names that the file has."""
    names: dict[str, str] = {}
    parts: dict[str, Part] = {}
    left = list(unread)
    for name, inner in short.items():
        to = match.names.get(there.names[inner])
        if to is None:
            left.append(name)
            continue
        names[name] = to
        if inner in there.parts:
            parts[name] = there.parts[inner]
    return Match(match.arch, names, tuple(left), parts)
