"""DRUPE's trigger, which is BadEncoder's white square (Tao et al., S&P 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.triggers import badencoder
from bdclean.triggers.stamping import Stamp, spec_of


@dataclass(frozen=True)
class Drupe:
    """Stamps the white square of BadEncoder: DRUPE differs in how the encoder learns it.

    What it does: replaces 10 x 10 pixels near the bottom right corner of 32, 50 x 50 of 224.
    When to use: encoders attacked with DRUPE, in the authors' settings.
    Needs: nothing. `size` in pixels where it is known to be another one; 0 goes by the input.
    Limits: those of badencoder.
    """

    name: ClassVar[str] = "drupe"
    family: ClassVar[str] = "patch"

    size: int = 0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UsageError(f"drupe needs a size of 0 or more pixels, got {self.size}.")

    def __call__(self, images: Tensor) -> Tensor:
        return badencoder.stamp(images, self.size)

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> Sequence[Stamp]:
        """Squares at the same place, of one colour and of many in turn, none nearly white."""
        return badencoder.controls(self.size, count, generator, channels)

    def spec(self) -> str:
        return spec_of(self)
