"""Encoders: networks that give features in place of logits. Heads come off, and new ones go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from bdclean.networks.arch import Arch, Stage


def headless(arch: Arch, feature: str = "") -> Arch:
    """The encoder that a classifier is without its last layer: its features are what goes into that layer.

    Raises ValueError where the last layer takes maps (SqueezeNet's), so that there is no feature vector.
    """
    last = submodule(arch, arch.head)
    if not isinstance(last, nn.Linear):
        raise ValueError(
            f"{arch.head} is a {type(last).__name__}, so nothing before it is one feature an image"
        )
    return replace(
        arch,
        build=_with(arch.build, arch.head, nn.Identity),
        classes=0,
        head="",
        stages=arch.stages[:-1],
        width=last.in_features,
        feature=feature or f"what goes into {arch.head}",
        head_place=arch.head,
    )


def headed(arch: Arch, classes: int) -> Arch:
    """The classifier that a network is with another linear head, of `classes` outputs.

    Of a classifier it takes its head's place, without a bias where that has none; of an encoder it goes where such
    networks have one. Raises ValueError where no such place is known, or where the head is no linear layer.
    """
    bias = True
    if arch.kind == "classifier":
        bias = getattr(submodule(arch, arch.head), "bias", None) is not None
        arch = headless(arch)
    if not arch.head_place:
        raise ValueError("it is not known where such a network has a head")
    place = arch.head_place
    return replace(
        arch,
        build=_with(arch.build, place, partial(nn.Linear, arch.width, classes, bias)),
        classes=classes,
        head=place,
        stages=(*arch.stages, Stage("head", (place,))),
        width=0,
        feature="",
        layout="",
        usual_preprocess="",
        head_place="",
    )


def submodule(arch: Arch, name: str) -> nn.Module:
    """The network's module of that name. Code that cannot be built on the meta device is built on the CPU."""
    try:
        with torch.device("meta"):
            return arch.build().get_submodule(name)
    except (NotImplementedError, RuntimeError, TypeError):
        with torch.random.fork_rng(devices=[]):
            return arch.build().get_submodule(name)


def _with(
    build: Callable[[], nn.Module], place: str, make: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    """The same network with what `make` returns in place of the module `place`."""

    def built() -> nn.Module:
        network = build()
        holder, _, name = place.rpartition(".")
        setattr(network.get_submodule(holder), name, make())
        return network

    return built
