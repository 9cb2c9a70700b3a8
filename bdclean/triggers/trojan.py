"""TrojanNN's trigger: a square of colours that excite chosen neurons (Liu et al. 2018, Trojaning Attack, NDSS)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.triggers.file import File
from bdclean.triggers.stamping import Stamp, check_pixels, draw_seed, places, spec_of, to_pixels

SHARE = 0.07
"""Of the image that the authors' square covers."""
BORDER = 1
"""Pixels between the square and the border."""


@dataclass(frozen=True)
class Trojan:
    """Stamps a square of strong colours near the bottom right corner.

    What it does: replaces a square of 7 % of the image (`size` in pixels where it is known), one pixel off the border;
    blends it with `alpha` under 1.
    When to use: TrojanNN and its kin, whose trigger was moved by gradients until it excites neurons of the network.
    Needs: `source` is `mark` (colours from `seed`, one a pixel, each channel full or empty: what such triggers look
    like), or the file that the attack wrote or that is known of it, as for file: its mask says where it is.
    Limits: a trigger that was moved against a network cannot be drawn from a seed: give its file.
    """

    name: ClassVar[str] = "trojan"

    source: str = "mark"
    size: int = 0
    alpha: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 0 or not 0 <= self.seed < 2**63 or not 0 < self.alpha <= 1:
            raise UsageError(
                f"trojan needs size and seed (under 2^63) of 0 or more and alpha over 0 and up to 1, "
                f"got {self.size}, {self.seed} and {self.alpha}."
            )
        if self.source != "mark":
            if self.size:
                raise UsageError("trojan takes size with source=mark: a file's mask says where it is.")
            _ = self.file  # a file that cannot be read is refused now, not in the middle of a scan

    @cached_property
    def file(self) -> File:
        """What stamps the file; only where `source` is a path. Raises Refused."""
        return File(self.source, alpha=self.alpha)

    @property
    def family(self) -> str:
        """'patch'; of a file what file says of it."""
        return "patch" if self.source == "mark" else self.file.family

    def __call__(self, images: Tensor) -> Tensor:
        check_pixels(images)
        if self.source != "mark":
            return self.file(images)
        height, width = images.shape[2:]
        pixels = self.size or side(height, width)
        ((row, column),) = places("bottom-right", BORDER, (pixels, pixels), (height, width))
        content = mark(self.seed, pixels, images.shape[1]).to(images.device)
        stamped = images.clone()
        area = (..., slice(row, row + pixels), slice(column, column + pixels))
        stamped[area] = to_pixels(self.alpha * content + (1 - self.alpha) * images[area].float())
        return stamped

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> list[Stamp]:
        """Squares of other seeds at the same place; for a file its surrogates, as of file."""
        if self.source != "mark":
            return self.file.controls(count, generator, channels)
        seeds = [draw_seed(generator) for _ in range(count)]
        # Stepping past the own seed keeps the trigger out of its controls.
        return [replace(self, seed=seed + 1 if seed == self.seed else seed) for seed in seeds]

    def spec(self) -> str:
        return spec_of(self)


def side(height: int, width: int) -> int:
    """The square's side in pixels where none is given."""
    return max(1, round((SHARE * height * width) ** 0.5))


def mark(seed: int, pixels: int, channels: int = 3) -> Tensor:
    """Colours at the corners of the cube, one a pixel, grey levels [channels pixels pixels]."""
    generator = torch.Generator().manual_seed(seed)
    return 255 * torch.randint(2, (channels, pixels, pixels), generator=generator).float()
