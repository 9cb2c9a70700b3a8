"""ResNets for small images: a 3x3 stem without pooling, then three or four stages.

Covers ResNet-20/32/44/56/110 (He et al. 2015, section 4.2; shortcuts A and B) and the 3x3-stem ResNet-18/34/50/101/152.
Names of tensors are torchvision's. A bottleneck's stride is on its 3x3 convolution, as in torchvision.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import layers, torchvision_name

DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


class Block(nn.Module):
    """conv-norm-relu twice (or the 1x1-3x3-1x1 bottleneck), plus the input, cast to the same shape."""

    def __init__(
        self, inside: int, width: int, outside: int, stride: int, bottleneck: bool, shortcut: str
    ) -> None:
        super().__init__()
        if bottleneck:
            self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, outside, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outside)
        else:
            self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
        self.bottleneck = bottleneck
        self.act: nn.Module = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            if shortcut == "b":
                self.downsample = nn.Sequential(
                    nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
                )
            else:
                self.downsample = PadChannels(stride, outside - inside, at_end=shortcut == "a-end")

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.bottleneck:
            out = self.bn3(self.conv3(self.act(out)))
        return self.act(out + self.downsample(x))


class PadChannels(nn.Module):
    """Shortcut A: every `stride`-th pixel, and channels of zeros, half before and half after (or all after)."""

    def __init__(self, stride: int, channels: int, at_end: bool = False) -> None:
        super().__init__()
        self.stride = stride
        before = 0 if at_end else channels // 2
        self.pad = (0, 0, 0, 0, before, channels - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.pad)


class ResidualNetwork(nn.Module):
    """Stem, stages `layer1`, ..., global average pooling, `fc`.

    `outside`: the channels that each stage gives, `widths` (of bottlenecks four times those) where it is not given.
    `first_stride`: that of `layer1`.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        stem: int,
        classes: int,
        bottleneck: bool = False,
        shortcut: str = "b",
        bias: bool = True,
        outside: tuple[int, ...] | None = None,
        first_stride: int = 1,
    ) -> None:
        super().__init__()
        outside = outside or tuple(width * 4 if bottleneck else width for width in widths)
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act: nn.Module = nn.ReLU()
        inside = stem
        self.stage_names = tuple(f"layer{k + 1}" for k in range(len(blocks)))
        for name, count, width, out in zip(self.stage_names, blocks, widths, outside, strict=True):
            stage = []
            stride = first_stride if name == "layer1" else 2
            for j in range(count):
                stage.append(Block(inside, width, out, stride if j == 0 else 1, bottleneck, shortcut))
                inside = out
            setattr(self, name, nn.Sequential(*stage))
        self.fc = nn.Linear(inside, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def rename(name: str) -> str:
    """torchvision's name for a tensor."""
    return torchvision_name(name)


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The small-image ResNet that these shapes suggest; for shortcut A, also with all zero channels at the end.

    akamaster's has half of them on each side, the Lua original and forks of akamaster's all at the end.
    """
    read = layers(shapes)
    if read is None or len(read.blocks) not in (3, 4):
        return
    blocks, widths, stem, bottleneck = read.blocks, read.widths, read.stem, read.bottleneck
    plain = not any(".downsample." in name for name in shapes)
    make = partial(
        ResidualNetwork,
        blocks,
        widths,
        stem[0],
        read.classes,
        bottleneck=bottleneck,
        bias="fc.bias" in shapes,
    )
    three = len(blocks) == 3
    name = partial(name_of, blocks, widths, stem[0], bottleneck)
    size = (3, 32, 32)
    if plain and len(set(widths)) > 1:
        end = Proposal(name("-a-end"), partial(make, shortcut="a-end"), size)
        reason = "shortcut A with all zero channels at the end instead of half on each side"
        yield Proposal(name("-a"), partial(make, shortcut="a"), size, ((end, reason),))
    else:
        yield Proposal(name("-b" if three else ""), make, size)


def named_proposals(classes: int) -> Iterator[Proposal]:
    """The ResNets of the paper's CIFAR section, and the larger ones with a small stem."""
    for count in (3, 5, 7, 9, 18):
        for shortcut in ("a", "b"):
            make = partial(ResidualNetwork, (count,) * 3, (16, 32, 64), 16, classes, shortcut=shortcut)
            yield Proposal(f"resnet{6 * count + 2}-cifar-{shortcut}", make, (3, 32, 32))
    for (bottleneck, blocks), depth in DEPTHS.items():
        make = partial(ResidualNetwork, blocks, (64, 128, 256, 512), 64, classes, bottleneck=bottleneck)
        yield Proposal(f"resnet{depth}-cifar", make, (3, 32, 32))


def name_of(
    blocks: tuple[int, ...], widths: tuple[int, ...], stem: int, bottleneck: bool, shortcut: str
) -> str:
    """`resnet20-cifar-a`, `resnet18-cifar-w16` (another base width than usual), `resnet1-2-2-1-cifar`."""
    layers = (3 if bottleneck else 2) * sum(blocks) + 2
    usual = 16 if len(blocks) == 3 else 64
    regular = (len(blocks) == 3 and len(set(blocks)) == 1) or DEPTHS.get((bottleneck, blocks)) == layers
    name = f"resnet{layers if regular else '-'.join(map(str, blocks))}-cifar{shortcut}"
    if stem == usual and widths == tuple(usual << k for k in range(len(blocks))):
        return name
    doubling = widths == tuple(widths[0] << k for k in range(len(blocks)))
    return f"{name}-w{widths[0]}" if doubling else f"{name}-w{'-'.join(map(str, widths))}"
