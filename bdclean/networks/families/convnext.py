"""ConvNeXts (Liu et al. 2022) with torchvision's names, of any depth and width; all numbers are in the shapes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import numbered

# (blocks, widths) -> torchvision's name.
KNOWN: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {
    ((3, 3, 9, 3), (96, 192, 384, 768)): "convnext_tiny",
    ((3, 3, 27, 3), (96, 192, 384, 768)): "convnext_small",
    ((3, 3, 27, 3), (128, 256, 512, 1024)): "convnext_base",
    ((3, 3, 27, 3), (192, 384, 768, 1536)): "convnext_large",
}
SIZE = (3, 224, 224)
# Pixels a side of the stem's patches in all of them.
PATCH = 4


def rename(name: str) -> str:
    """torchvision's name for a tensor."""
    return name


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The ConvNeXt that these shapes suggest."""
    head = shapes.get("classifier.2.weight", ())
    blocks: list[int] = []
    widths: list[int] = []
    while depth := numbered(shapes, rf"features\.{2 * len(blocks) + 1}\.(\d{{1,4}})\.block\.0\."):
        width = shapes.get(f"features.{2 * len(blocks) + 1}.0.block.0.weight", ())
        if len(width) != 4:
            return
        blocks.append(depth)
        widths.append(width[0])
    if len(head) != 2 or not blocks:
        return
    name = KNOWN.get((tuple(blocks), tuple(widths)))
    name = name or f"convnext-{'-'.join(map(str, blocks))}-w{'-'.join(map(str, widths))}"
    stem = shapes.get("features.0.0.weight", ())
    patch = stem[2] if len(stem) == 4 else PATCH
    name += f"-p{patch}" if patch != PATCH else ""
    yield Proposal(name, partial(make_network, tuple(blocks), tuple(widths), head[0], patch), SIZE)


def make_network(
    blocks: tuple[int, ...], widths: tuple[int, ...], classes: int, patch: int = PATCH
) -> nn.Module:
    """torchvision's ConvNeXt with these numbers; `patch`: pixels a side of what its stem sees at once."""
    after = (*widths[1:], None)
    plan = [CNBlockConfig(w, n, b) for b, w, n in zip(blocks, widths, after, strict=True)]
    network = ConvNeXt(plan, num_classes=classes)
    if patch != PATCH:
        network.features[0][0] = nn.Conv2d(3, widths[0], patch, patch)
    return network


def named_proposals(classes: int) -> Iterator[Proposal]:
    """Every ConvNeXt that torchvision names."""
    for (blocks, widths), name in KNOWN.items():
        yield Proposal(name, partial(make_network, blocks, widths, classes), SIZE)
