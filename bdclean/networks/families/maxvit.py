"""MaxViTs (Tu et al. 2022) with torchvision's names, of any depth and width.

All numbers are in the shapes but the image's size, of which the partition shows the least: 224 for 7 and four blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from torch import nn
from torchvision.models.maxvit import MaxVit

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import numbered

# (channels of the stem, of the blocks, layers of the blocks, width of a head, partition) -> torchvision's name.
KNOWN: dict[tuple[int, tuple[int, ...], tuple[int, ...], int, int], str] = {
    (64, (64, 128, 256, 512), (2, 2, 5, 2), 32, 7): "maxvit_t"
}


def rename(name: str) -> str:
    """torchvision's name for a tensor."""
    return name


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The MaxViT that these shapes suggest."""
    stem = shapes.get("stem.0.0.weight", ())
    head = shapes.get("classifier.5.weight", ())
    first = "blocks.0.layers.0.layers"
    table = shapes.get(f"{first}.window_attention.attn_layer.1.relative_position_bias_table", ())
    if len(stem) != 4 or len(head) != 2 or len(table) != 2 or not table[1]:
        return
    layers: list[int] = []
    channels: list[int] = []
    while depth := numbered(shapes, rf"blocks\.{len(layers)}\.layers\.(\d{{1,4}})\."):
        at = f"blocks.{len(layers)}.layers.0.layers.window_attention.attn_layer.0.weight"
        channels.append((shapes.get(at) or (0,))[0])
        layers.append(depth)
    head_width, partition = channels[0] // table[1], (math.isqrt(table[0]) + 1) // 2
    name = KNOWN.get((stem[0], tuple(channels), tuple(layers), head_width, partition))
    if name is None:
        name = f"maxvit-{'-'.join(map(str, layers))}-w{'-'.join(map(str, channels))}-partition{partition}"
    make = partial(make_network, stem[0], tuple(channels), tuple(layers), head_width, partition, head[0])
    yield Proposal(name, make, size(partition, len(layers)))


def size(partition: int, blocks: int) -> tuple[int, int, int]:
    """The least image whose last feature map is one partition wide: the stem and each block halve it."""
    return 3, partition << (blocks + 1), partition << (blocks + 1)


def make_network(
    stem: int,
    channels: tuple[int, ...],
    layers: tuple[int, ...],
    head_width: int,
    partition: int,
    classes: int,
) -> nn.Module:
    """torchvision's MaxViT with these numbers."""
    image = size(partition, len(layers))[1:]
    return MaxVit(image, stem, partition, list(channels), list(layers), head_width, 0.0, num_classes=classes)


def named_proposals(classes: int) -> Iterator[Proposal]:
    """Every MaxViT that torchvision names."""
    for (stem, channels, layers, head_width, partition), name in KNOWN.items():
        make = partial(make_network, stem, channels, layers, head_width, partition, classes)
        yield Proposal(name, make, size(partition, len(layers)))
