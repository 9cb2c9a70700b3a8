"""torchvision's MobileNets, MNASNets and ShuffleNets of other widths than the named ones.

Names and depths are those of a named network; the width is one number, which the shapes round: it is looked for in
hundredths. ShuffleNets say their widths outright.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn
from torchvision import models

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import numbered

SIZE = (3, 224, 224)


@dataclass(frozen=True)
class Scaled:
    """A constructor `build(width, num_classes=...)`.

    The tensor called `last` takes `channels` times the width, rounded to a multiple of 8. `head`: its last matrix.
    """

    name: str
    build: Callable[..., nn.Module]
    last: str
    channels: int
    head: str


def mobilenet(builder: Callable[..., nn.Module], width: float, **options: object) -> nn.Module:
    """torchvision's MobileNet, which takes the width by name."""
    return builder(width_mult=width, **options)


LARGE, SMALL = models.mobilenet_v3_large, models.mobilenet_v3_small
NETWORKS = (
    Scaled("mnasnet", models.MNASNet, "layers.14.weight", 320, "classifier.1.weight"),
    Scaled(
        "mobilenet_v2",
        partial(mobilenet, models.mobilenet_v2),
        "features.18.0.weight",
        320,
        "classifier.1.weight",
    ),
    Scaled(
        "mobilenet_v3_large", partial(mobilenet, LARGE), "features.16.0.weight", 160, "classifier.3.weight"
    ),
    Scaled(
        "mobilenet_v3_large-reduced-tail",
        partial(mobilenet, LARGE, reduced_tail=True),
        "features.16.0.weight",
        80,
        "classifier.3.weight",
    ),
    Scaled(
        "mobilenet_v3_small", partial(mobilenet, SMALL), "features.12.0.weight", 96, "classifier.3.weight"
    ),
    Scaled(
        "mobilenet_v3_small-reduced-tail",
        partial(mobilenet, SMALL, reduced_tail=True),
        "features.12.0.weight",
        48,
        "classifier.3.weight",
    ),
)


def rename(name: str) -> str:
    """torchvision's name for a tensor."""
    return name


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The networks whose last width these shapes have, for each hundredth that rounds to it; the ShuffleNet."""
    for network in NETWORKS:
        last, head = shapes.get(network.last, ()), shapes.get(network.head, ())
        if len(last) != 4 or len(head) != 2:
            continue
        low, high = ((last[1] + way * 4) / network.channels * 100 for way in (-1, 1))
        for hundredths in range(max(1, math.floor(low)), math.ceil(high) + 1):
            build = partial(network.build, hundredths / 100, num_classes=head[0])
            yield Proposal(f"{network.name}-x{hundredths / 100:g}", build, SIZE)
    yield from shufflenets(shapes)


def shufflenets(shapes: Shapes) -> Iterator[Proposal]:
    """The ShuffleNet V2 (Ma et al. 2018) whose stages have these numbers of units and channels."""
    head = shapes.get("fc.weight", ())
    units = [numbered(shapes, rf"stage{stage}\.(\d{{1,3}})\.") for stage in (2, 3, 4)]
    ends = ["conv1.0.weight", *(f"stage{stage}.0.branch2.5.weight" for stage in (2, 3, 4)), "conv5.0.weight"]
    widths = [shapes.get(name, ()) for name in ends]
    if len(head) != 2 or not all(units) or any(len(width) != 4 for width in widths):
        return
    # Half of a stage's channels go around each unit.
    channels = [w[0] * (2 if name.startswith("stage") else 1) for name, w in zip(ends, widths, strict=True)]
    build = partial(models.ShuffleNetV2, units, channels, num_classes=head[0])
    name = f"shufflenet_v2-{'-'.join(map(str, units))}-w{'-'.join(map(str, channels))}"
    yield Proposal(name, build, SIZE)


def named_proposals(classes: int) -> Iterator[Proposal]:
    """None: the named ones are in `builders`."""
    yield from ()
