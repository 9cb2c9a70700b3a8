"""torchvision's other builders, found by the shipped fingerprint: their depths and widths are in their own code.

AlexNet, EfficientNets, GoogLeNet, Inception, MNASNets, MobileNets, ShuffleNets, SqueezeNets.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torchvision import models

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families import known

# What other modules here build from the shapes alone.
ELSEWHERE = (
    "convnext_",
    "densenet",
    "maxvit_",
    "regnet_",
    "resnet",
    "resnext",
    "swin_",
    "vgg",
    "vit_",
    "wide_resnet",
)
# Heads that only help training: they never run on an image that is to be judged.
IDLE = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def rename(name: str) -> str:
    """torchvision's name for a tensor."""
    return name


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The builders with exactly these tensors by the fingerprint."""
    listed = set(names())
    for row in known.find(shapes):
        if row.name in listed:
            yield proposal(row.name, shapes[row.head[0]][0], row.input)


def proposal(name: str, classes: int, size: int) -> Proposal:
    """torchvision's builder with `classes`, without weights and auxiliary heads."""
    builder = models.get_model_builder(name)
    options: dict[str, object] = {"weights": None, "num_classes": classes}
    if name in IDLE:
        # Their own initial weights take seconds to draw and are replaced anyway; left open, torchvision warns.
        options["init_weights"] = False
    build = partial(builder, **options, **({"aux_logits": False} if name in IDLE else {}))
    whole = partial(builder, **options, aux_logits=True) if name in IDLE else None
    return Proposal(name, build, (3, size, size), idle=IDLE.get(name, ()), whole=whole)


def side(name: str) -> int:
    """The least image side that torchvision's weights of this builder were trained for."""
    return min(weights.transforms.keywords["crop_size"] for weights in models.get_model_weights(name))


def names() -> list[str]:
    """The builders that no other module here covers."""
    return [name for name in models.list_models(module=models) if not name.startswith(ELSEWHERE)]


def named_proposals(classes: int) -> Iterator[Proposal]:
    """Every other classifier that torchvision names."""
    for name in names():
        yield proposal(name, classes, side(name))
