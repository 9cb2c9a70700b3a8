"""torchvision's other builders, found by the shipped fingerprint: their depths and widths are in their own code.

AlexNet, EfficientNets, GoogLeNet, Inception, MNASNets, MobileNets, ShuffleNets, SqueezeNets, and whatever a later
torchvision adds. A fingerprinted builder that the installed torchvision lacks is passed over.
"""

from __future__ import annotations

import inspect
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
    """The builders with exactly these tensors by the fingerprint, then those that it does not know yet."""
    listed = set(names())
    rows = known.find(shapes)
    for row in rows:
        if row.name in listed:
            yield proposal(row.name, shapes[row.head[0]][0], row.input)
    unlisted = listed - {row.name for row in known.table()}
    if not rows and unlisted:
        sizes = [s[0] for s in shapes.values() if len(s) == 2 and s[0]]
        for name in sorted(unlisted):
            yield proposal(name, sizes[-1] if sizes else 1000, side(name))


def proposal(name: str, classes: int, size: int) -> Proposal:
    """torchvision's builder with `classes`, without weights and auxiliary heads."""
    builder = models.get_model_builder(name)
    options: dict[str, object] = {"weights": None, "num_classes": classes}
    if name in IDLE:
        # Their own initial weights take seconds to draw and are replaced anyway.
        options["init_weights"] = False
    build = partial(builder, **options, **({"aux_logits": False} if name in IDLE else {}))
    whole = partial(builder, **options, aux_logits=True) if name in IDLE else None
    return Proposal(name, build, (3, size, size), idle=IDLE.get(name, ()), whole=whole)


def side(name: str) -> int:
    """The least image side that torchvision's weights of this builder were trained for; 224 where it does not say."""
    try:
        weights = models.get_model_weights(name)
        transforms = [w.transforms for w in weights]
    except (ValueError, AttributeError):
        return 224
    sizes = [t.keywords["crop_size"] for t in transforms if "crop_size" in getattr(t, "keywords", {})]
    return min((s for s in sizes if isinstance(s, int)), default=224)


def names() -> list[str]:
    """The builders that take any class count and that no other module here covers."""
    found = []
    for name in models.list_models(module=models):
        takes = inspect.signature(inspect.unwrap(models.get_model_builder(name))).parameters
        if not name.startswith(ELSEWHERE) and ("kwargs" in takes or "num_classes" in takes):
            found.append(name)
    return found


def named_proposals(classes: int) -> Iterator[Proposal]:
    """Every other classifier that torchvision names."""
    for name in names():
        yield proposal(name, classes, side(name))
