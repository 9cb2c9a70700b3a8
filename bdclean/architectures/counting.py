"""What a file's names count up and its shapes say: blocks, widths, classes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bdclean.architectures.arch import Shape, Shapes
from bdclean.architectures.dialects import depths


@dataclass(frozen=True)
class Layers:
    """The numbers of a residual network in `layer1`, `layer2`, ...: `widths` are those of each one's first kernel."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    stem: Shape
    classes: int
    bottleneck: bool


def layers(shapes: Shapes) -> Layers | None:
    """The residual network's numbers; None unless stem, head and each layer's first kernel are there."""
    blocks = depths(shapes)
    stem, head = shapes.get("conv1.weight", ()), shapes.get("fc.weight", ())
    first = [shapes.get(f"layer{k + 1}.0.conv1.weight", ()) for k in range(len(blocks))]
    if len(blocks) not in (3, 4) or len(stem) != 4 or len(head) != 2 or any(len(f) != 4 for f in first):
        return None
    bottleneck = "layer1.0.conv3.weight" in shapes
    return Layers(blocks, tuple(f[0] for f in first), stem, head[0], bottleneck)


def numbered(names: Iterable[str], pattern: str, start: int = 0) -> int:
    """How many numbers `pattern`'s group takes where names begin so; 0 unless they run from `start` without gaps."""
    match = re.compile(pattern).match
    found = {int(m.group(1)) for m in map(match, names) if m}
    return len(found) if found == set(range(start, start + len(found))) else 0
