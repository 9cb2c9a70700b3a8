"""DenseNets (Huang et al. 2017) with torchvision's names, old and new, of any depth and growth."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from torchvision.models.densenet import DenseNet

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import numbered

# (growth, layers of each block, channels of the stem) -> torchvision's name.
KNOWN: dict[tuple[int, tuple[int, ...], int], str] = {
    (32, (6, 12, 24, 16), 64): "densenet121",
    (48, (6, 12, 36, 24), 96): "densenet161",
    (32, (6, 12, 32, 32), 64): "densenet169",
    (32, (6, 12, 48, 32), 64): "densenet201",
}
SIZE = (3, 224, 224)


def rename(name: str) -> str:
    """torchvision's name for a tensor; `norm.1` is that of its first releases, which its own weights still have."""
    return re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The DenseNet that these shapes suggest."""
    stem = shapes.get("features.conv0.weight", ())
    head = shapes.get("classifier.weight", ())
    grown = shapes.get("features.denseblock1.denselayer1.conv2.weight", ())
    if any(len(s) != 4 for s in (stem, grown)) or len(head) != 2:
        return
    blocks: list[int] = []
    while depth := numbered(
        shapes, rf"features\.denseblock{len(blocks) + 1}\.denselayer(\d{{1,4}})\.", start=1
    ):
        blocks.append(depth)
    growth, stem_width = grown[0], stem[0]
    # What a 1x1 convolution gives before each 3x3, in multiples of the growth: 4 in all that have a name.
    factor = grown[1] // growth if growth else 0
    name = KNOWN.get((growth, tuple(blocks), stem_width))
    name = name or f"densenet-{'-'.join(map(str, blocks))}-growth{growth}-w{stem_width}"
    build = partial(DenseNet, growth, tuple(blocks), stem_width, bn_size=factor, num_classes=head[0])
    yield Proposal(name, build, SIZE)


def named_proposals(classes: int) -> Iterator[Proposal]:
    """Every DenseNet that torchvision names."""
    for (growth, blocks, stem), name in KNOWN.items():
        yield Proposal(name, partial(DenseNet, growth, blocks, stem, num_classes=classes), SIZE)
