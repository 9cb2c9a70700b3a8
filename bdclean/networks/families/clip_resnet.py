"""OpenAI's ResNets of CLIP: three convolutions as a stem, average pools for strides, attention as the last pool.

Names are OpenAI's; BadEncoder's poisoned CLIP encoders are such files without the `visual.` before them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import depths

# (blocks, width of the stem's output) -> OpenAI's name.
KNOWN = {
    ((3, 4, 6, 3), 64): "clip-rn50",
    ((3, 4, 23, 3), 64): "clip-rn101",
    ((4, 6, 10, 6), 80): "clip-rn50x4",
    ((6, 8, 18, 8), 96): "clip-rn50x16",
    ((3, 15, 36, 10), 128): "clip-rn50x64",
}
# Input pixels a step of the last map, and the width of an attention head.
STEP, HEAD = 32, 64


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; an average pool lowers the resolution before the last and in the shortcut."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.act = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inside != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.pool(self.act(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        short = x if isinstance(self.downsample, nn.Identity) else self.downsample(self.pool(x))
        return self.act(out + short)


class AttentionPool(nn.Module):
    """The answer of one attention layer to the mean of all places; only images of the training size fit."""

    def __init__(self, side: int, width: int, out: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(side * side + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, out)
        self.heads = width // HEAD

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        n, t, c = x.shape
        query = self.q_proj(x[:, :1]).reshape(n, 1, self.heads, -1).transpose(1, 2)
        key = self.k_proj(x).reshape(n, t, self.heads, -1).transpose(1, 2)
        value = self.v_proj(x).reshape(n, t, self.heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, c)
        return self.c_proj(out)


class ClipResNet(nn.Module):
    """Images [n 3 h w] of one size to `fc` of the feature [n out]."""

    def __init__(self, blocks: tuple[int, ...], width: int, side: int, out: int, classes: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(3, half, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, width, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.avgpool = nn.AvgPool2d(2)
        inside = width
        self.stage_names = tuple(f"layer{k + 1}" for k in range(len(blocks)))
        for k, count in enumerate(blocks):
            stage = []
            for j in range(count):
                stage.append(Bottleneck(inside, width << k, 2 if k and not j else 1))
                inside = 4 * (width << k)
            setattr(self, self.stage_names[k], nn.Sequential(*stage))
        self.attnpool = AttentionPool(side, inside, out)
        self.fc = nn.Linear(out, classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = self.act(norm(conv(x)))
        x = self.avgpool(x)
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return self.fc(self.attnpool(x))


def rename(name: str) -> str:
    """OpenAI's name for a tensor."""
    return name


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The network that these shapes suggest."""
    stem, table = shapes.get("conv3.weight", ()), shapes.get("attnpool.positional_embedding", ())
    out, head = shapes.get("attnpool.c_proj.weight", ()), shapes.get("fc.weight", ())
    blocks = depths(shapes)
    if len(blocks) != 4 or len(stem) != 4 or len(table) != 2 or len(out) != 2 or len(head) != 2:
        return
    side = math.isqrt(max(0, table[0] - 1))
    if side < 1 or table[1] < HEAD or table[1] % HEAD:
        return
    width = stem[0]
    name = KNOWN.get((blocks, width)) or f"clip-resnet{'-'.join(map(str, blocks))}-w{width}"
    build = partial(ClipResNet, blocks, width, side, out[0], head[0])
    yield Proposal(name, build, (3, STEP * side, STEP * side))


def named_proposals(classes: int) -> Iterator[Proposal]:
    """None: these are encoders, and the table of known networks is one of classifiers."""
    yield from ()
