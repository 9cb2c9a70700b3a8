"""torchvision's MobileNets, MNASNets, ShuffleNets and EfficientNets of other widths than the named ones.

Of the first two names and depths are those of a named network, and the width is one number, which the shapes round: it
is looked for in hundredths. ShuffleNets and EfficientNets say their widths and depths outright.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn
from torchvision import models
from torchvision.models.efficientnet import EfficientNet, MBConvConfig

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


NETWORKS = (
    Scaled("mnasnet", models.MNASNet, "layers.14.weight", 320, "classifier.1.weight"),
    Scaled(
        "mobilenet_v2",
        partial(mobilenet, models.mobilenet_v2),
        "features.18.0.weight",
        320,
        "classifier.1.weight",
    ),
    *(
        Scaled(
            f"{name}{'-reduced-tail' * reduced}",
            partial(mobilenet, getattr(models, name), reduced_tail=reduced),
            last,
            channels // 2 if reduced else channels,
            "classifier.3.weight",
        )
        for name, last, channels in (
            ("mobilenet_v3_large", "features.16.0.weight", 160),
            ("mobilenet_v3_small", "features.12.0.weight", 96),
        )
        for reduced in (False, True)
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
    yield from efficientnets(shapes)


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


# (expansion, kernel, stride) of the stages of Tan and Le's EfficientNets (2019), whatever their widths and depths.
STAGES = ((1, 3, 1), (6, 3, 2), (6, 5, 2), (6, 3, 2), (6, 5, 1), (6, 5, 2), (6, 3, 1))


def efficientnets(shapes: Shapes) -> Iterator[Proposal]:
    """The EfficientNet whose stages have these depths and widths."""
    numbers = range(1, len(STAGES) + 1)
    depths = [numbered(shapes, rf"features\.{k}\.(\d{{1,3}})\.") for k in numbers]
    # A stage without expansion has a convolution less before the one that gives its channels.
    ends = [f"features.{k}.0.block.{2 if k == 1 else 3}.0.weight" for k in numbers]
    widths = [shapes.get(name, ()) for name in ("features.0.0.weight", *ends, "features.8.0.weight")]
    head = shapes.get("classifier.1.weight", ())
    if len(head) != 2 or not all(depths) or any(len(width) != 4 for width in widths):
        return
    channels = [width[0] for width in widths]
    plan = [
        MBConvConfig(*stage, inside, outside, depth)
        for stage, inside, outside, depth in zip(STAGES, channels, channels[1:-1], depths, strict=False)
    ]
    build = partial(EfficientNet, plan, 0.2, num_classes=head[0], last_channel=channels[-1])
    name = f"efficientnet-{'-'.join(map(str, depths))}-w{'-'.join(map(str, channels))}"
    yield Proposal(name, build, SIZE)


def named_proposals(classes: int) -> Iterator[Proposal]:
    """None: the named ones are in `builders`."""
    yield from ()
