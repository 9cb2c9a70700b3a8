"""Pre-activation ResNets (He et al. 2016) and WideResNets (Zagoruyko and Komodakis 2016) for small images.

Names of tensors are kuangliu's with torchvision's `downsample` and `fc`; xternalz's `block1.layer.0.convShortcut`, as
ABL's networks have it, is read, too. meliketoy's WideResNets have biases, shortcuts of the block's input and the stride
on the second convolution; forks of his have the latter two without biases, which nothing in the shapes shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import layers, torchvision_name
from bdclean.networks.families.residual import DEPTHS


class Block(nn.Module):
    """norm-relu-conv twice (or the bottleneck), plus the input; the norm's output feeds a projected shortcut.

    `raw`: the shortcut takes the input itself and the stride is on the second convolution.
    """

    def __init__(self, inside: int, width: int, stride: int, bottleneck: bool, bias: bool, raw: bool) -> None:
        super().__init__()
        outside = width * 4 if bottleneck else width
        self.bottleneck, self.raw = bottleneck, raw
        self.act: nn.Module = nn.ReLU()
        self.bn1 = nn.BatchNorm2d(inside)
        if bottleneck:
            self.conv1 = nn.Conv2d(inside, width, 1, bias=bias)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=bias)
            self.bn3 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, outside, 1, bias=bias)
        else:
            first, second = (1, stride) if raw else (stride, 1)
            self.conv1 = nn.Conv2d(inside, width, 3, first, 1, bias=bias)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, outside, 3, second, 1, bias=bias)
        self.projects = stride != 1 or inside != outside
        if self.projects:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        active = self.act(self.bn1(x))
        out = self.conv2(self.act(self.bn2(self.conv1(active))))
        if self.bottleneck:
            out = self.conv3(self.act(self.bn3(out)))
        if self.projects:
            x = self.downsample(x if self.raw else active)
        return out + x


class PreActNetwork(nn.Module):
    """Stem without norm, stages `layer1`, ..., a last norm (`bn1`) where there is one, average pooling, `fc`."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        stem: int,
        classes: int,
        bottleneck: bool = False,
        last_norm: bool = True,
        conv_bias: bool = False,
        raw: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=conv_bias)
        inside = stem
        self.stage_names = tuple(f"layer{k + 1}" for k in range(len(blocks)))
        for name, count, width in zip(self.stage_names, blocks, widths, strict=True):
            stage = []
            for j in range(count):
                stride = 2 if j == 0 and name != "layer1" else 1
                stage.append(Block(inside, width, stride, bottleneck, conv_bias, raw))
                inside = width * 4 if bottleneck else width
            setattr(self, name, nn.Sequential(*stage))
        self.last_norm = last_norm
        self.act: nn.Module = nn.ReLU()
        if last_norm:
            self.bn1 = nn.BatchNorm2d(inside)
        self.fc = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for name in self.stage_names:
            x = getattr(self, name)(x)
        if self.last_norm:
            x = self.act(self.bn1(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def rename(name: str) -> str:
    """The family's own name for a tensor."""
    return torchvision_name(name)


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The pre-activation network that these shapes suggest, with both kinds of shortcut where both occur."""
    read = layers(shapes)
    if read is None or len(read.blocks) not in (3, 4):
        return
    blocks, widths, stem, bottleneck = read.blocks, read.widths, read.stem, read.bottleneck
    biased = "layer1.0.conv1.bias" in shapes
    last_norm = "bn1.weight" in shapes
    make = partial(
        PreActNetwork,
        blocks,
        widths,
        stem[0],
        read.classes,
        bottleneck=bottleneck,
        last_norm=last_norm,
        conv_bias=biased,
        raw=biased,
    )
    name = name_of(blocks, widths, stem[0], bottleneck, last_norm)
    size = (3, 32, 32)
    if biased:
        yield Proposal(f"{name}-bias", make, size)
    elif len(blocks) == 3 and last_norm and not bottleneck:
        raw = Proposal(f"{name}-raw", partial(make, raw=True), size)
        reason = (
            "shortcuts that take the block's input before its norm, with the stride on the second convolution"
        )
        yield Proposal(name, make, size, ((raw, reason),))
    else:
        yield Proposal(name, make, size)


def named_proposals(classes: int) -> Iterator[Proposal]:
    """Pre-activation ResNets of the usual depths, and the WideResNets that defences are tried on."""
    for (bottleneck, blocks), depth in DEPTHS.items():
        make = partial(
            PreActNetwork, blocks, (64, 128, 256, 512), 64, classes, bottleneck=bottleneck, last_norm=False
        )
        yield Proposal(f"preactresnet{depth}", make, (3, 32, 32))
    for depth, factor in ((16, 1), (16, 2), (28, 2), (28, 10), (40, 1), (40, 2), (34, 10)):
        count = (depth - 4) // 6
        widths = tuple(16 * factor << k for k in range(3))
        yield Proposal(
            f"wrn-{depth}-{factor}", partial(PreActNetwork, (count,) * 3, widths, 16, classes), (3, 32, 32)
        )


def name_of(
    blocks: tuple[int, ...], widths: tuple[int, ...], stem: int, bottleneck: bool, last_norm: bool
) -> str:
    """`preactresnet18`, `wrn-28-10`, `preactresnet20` (three stages without widening are a WideResNet of width 1)."""
    if len(blocks) == 3 and last_norm and not bottleneck and len(set(blocks)) == 1:
        depth = 6 * blocks[0] + 4
        if stem == 16 and widths == tuple(widths[0] << k for k in range(3)) and widths[0] % 16 == 0:
            return f"wrn-{depth}-{widths[0] // 16}"
        return f"wrn-{depth}-w{stem}-{'-'.join(map(str, widths))}"
    depth = (3 if bottleneck else 2) * sum(blocks) + 2
    regular = DEPTHS.get((bottleneck, blocks)) == depth
    name = f"preactresnet{depth}" if regular else f"preactresnet{'-'.join(map(str, blocks))}"
    if last_norm:
        name += "-norm"
    usual = 64 if len(blocks) == 4 else 16
    if stem == usual and widths == tuple(usual << k for k in range(len(blocks))):
        return name
    return f"{name}-w{stem}-{'-'.join(map(str, widths))}"
