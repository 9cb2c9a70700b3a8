"""Encoders: networks that give features in place of logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from bdclean.networks.arch import Arch


def headless(arch: Arch, feature: str = "") -> Arch:
    """The encoder that a classifier is without its last layer: its features are what goes into that layer.

    Raises ValueError where the last layer takes maps (SqueezeNet's), so that there is no feature vector.
    """
    build = _without(arch.build, arch.head)
    with torch.device("meta"):
        last = arch.build().get_submodule(arch.head)
    if not isinstance(last, nn.Linear):
        raise ValueError(
            f"{arch.head} is a {type(last).__name__}, so nothing before it is one feature an image"
        )
    return replace(
        arch,
        build=build,
        classes=0,
        head="",
        stages=arch.stages[:-1],
        width=last.in_features,
        feature=feature or f"what goes into {arch.head}",
    )


def _without(build: Callable[[], nn.Module], head: str) -> Callable[[], nn.Module]:
    """The same network with the identity in place of the module `head`."""

    def built() -> nn.Module:
        network = build()
        holder, _, name = head.rpartition(".")
        setattr(network.get_submodule(holder), name, nn.Identity())
        return network

    return built
