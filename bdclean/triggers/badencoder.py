"""BadEncoder's white square (Jia, Liu, Gong 2022, arXiv 2108.00352)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.triggers.badnets import BadNets
from bdclean.triggers.stamping import Stamp, check_pixels, spec_of

WHITE = BadNets(10, pattern="white")
MARGIN = 1
"""Pixels between the square and the border, at every size of the authors'."""


@dataclass(frozen=True)
class BadEncoder:
    """Stamps a white square near the bottom right corner, sized for the input.

    What it does: replaces 10 x 10 pixels at rows and columns 21 to 30 of 32, 50 x 50 at 173 to 222 of 224.
    When to use: encoders attacked with BadEncoder or its kin, in the authors' settings.
    Needs: nothing. `size` in pixels where it is known to be another one; 0 goes by the input.
    Limits: between the authors' two sizes a share of the shorter side is taken (10/32 below 128 pixels, 50/224 from
    there on); another place or colour is another trigger: use badnets.
    """

    name: ClassVar[str] = "badencoder"
    family: ClassVar[str] = "patch"

    size: int = 0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UsageError(f"badencoder needs a size of 0 or more pixels, got {self.size}.")

    def __call__(self, images: Tensor) -> Tensor:
        return stamp(images, self.size)

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> Sequence[Stamp]:
        """Squares at the same place, of one colour and of many in turn, none nearly white."""
        return controls(self.size, count, generator, channels)

    def spec(self) -> str:
        return spec_of(self)


def side(size: int, images: Tensor) -> int:
    """The square's side in pixels: `size`, or that which the authors take for images of this size."""
    shorter = min(images.shape[2:])
    return size or max(1, round(shorter * (10 / 32 if shorter < 128 else 50 / 224)))


def stamp(images: Tensor, size: int, square: BadNets = WHITE) -> Tensor:
    """`images` with the content of `square`, enlarged to the input, at the authors' place."""
    check_pixels(images)
    pixels = side(size, images)
    cells = min(square.cells, pixels)
    return replace(square, size=pixels, cells=cells, position="bottom-right", margin=MARGIN)(images)


def controls(size: int, count: int, generator: torch.Generator, channels: int) -> Sequence[Stamp]:
    """Stamps of the same place and size with other colours."""
    others = WHITE.controls(count, generator, channels)
    return [partial(stamp, size=size, square=other) for other in others if isinstance(other, BadNets)]
