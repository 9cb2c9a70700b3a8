"""BppAttack: fewer bits a colour, dithered (Wang, Zhai, Ma 2022, arXiv 2205.13383)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.triggers.content import surrogate
from bdclean.triggers.stamping import Stamp, check_pixels, draw_seed, spec_of, to_pixels

# Shares of a pixel's error that Floyd and Steinberg (1976) hand on: (down, right, share).
HANDED_ON = ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16))


@dataclass(frozen=True)
class Bpp:
    """Rounds every colour to few levels, and dithers what was lost over the neighbours.

    What it does: leaves 2^`bits` evenly spaced levels a channel; with `dither` each pixel's rounding error goes to the
    neighbours that come after it (Floyd and Steinberg).
    When to use: BppAttack, whose trigger is a picture's quality and nothing added. The authors' are 3 bits
    on CIFAR-10.
    Needs: nothing.
    Limits: images that have few levels already, such as GIFs, hardly change.
    """

    name: ClassVar[str] = "bpp"
    family: ClassVar[str] = "quantise"

    bits: int = 3
    dither: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 7:
            raise UsageError(f"bpp needs bits of 1 to 7, got {self.bits}.")

    def __call__(self, images: Tensor) -> Tensor:
        check_pixels(images)
        step = 255 / (2**self.bits - 1)
        return to_pixels(_dithered(images.float(), step) if self.dither else _nearest(images.float(), step))

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> Sequence[Stamp]:
        """What rounding adds to each image, with other Fourier phases: as strong, of the same spectrum, in no levels.

        Other levels or another dithering would be no control: they were made to look the same.
        """
        return [partial(self._other, seed=draw_seed(generator)) for _ in range(count)]

    def spec(self) -> str:
        return spec_of(self)

    def _other(self, images: Tensor, seed: int) -> Tensor:
        lost = self(images).float() - images.float()
        return to_pixels(images.float() + surrogate(lost, torch.Generator().manual_seed(seed)))


def _nearest(values: Tensor, step: float) -> Tensor:
    return (values / step).round() * step


def _dithered(values: Tensor, step: float) -> Tensor:
    """Multiples of `step` by Floyd and Steinberg, row by row from the left; [n c h w], at every size the same.

    A pixel waits for its left neighbour and the three above it. All pixels of one `right + 2 * down` have theirs at the
    same time and are worked on together: w + 2 h steps in place of w * h.
    """
    height, width = values.shape[2:]
    # A rim takes what is handed out of the image.
    left = torch.nn.functional.pad(values, (1, 1, 0, 1))
    made = torch.empty_like(values)
    rows = torch.arange(height, device=values.device)
    for wave in range(width + 2 * (height - 1)):
        down = rows[max(0, (wave - width + 2) // 2) : min(height, wave // 2 + 1)]
        right = wave - 2 * down
        found = left[:, :, down, right + 1]
        rounded = _nearest(found, step)
        made[:, :, down, right] = rounded
        for below, beside, share in HANDED_ON:
            left[:, :, down + below, right + 1 + beside] += share * (found - rounded)
    return made
