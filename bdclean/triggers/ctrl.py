"""CTRL: a faint chequered wave in the colours (Li et al. 2023, arXiv 2210.07346)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.triggers.stamping import Stamp, add, check_pixels, spec_of

CHROMA_TO_RGB = ((0.0, 1.13983), (-0.39465, -0.58060), (2.03211, 0.0))
"""What U and V add to red, green and blue (ITU-R BT.601): the inverse transform is linear."""

Waves = tuple[tuple[int, int, float, float], ...]
"""Coefficient (down, across) of the block's cosine transform, and the share of the magnitude that U and V get."""


AGAIN = 20
"""So often is a control drawn anew that was drawn before, until it is drawn from further away."""


@dataclass(frozen=True)
class CTRL:
    """Adds two cosines of fixed frequency to the colours U and V of every block of pixels.

    What it does: in each block of `window` pixels, raises two coefficients of the orthonormal cosine transform of U
    and V, (`first`, `first`) and (`second`, `second`), by `magnitude` grey levels.
    When to use: encoders whose pre-training set was poisoned with CTRL: magnitude 50 or 100 for CIFAR-10.
    Needs: nothing.
    Limits: frequencies other than those attacked with are another trigger; JPEG halves colour resolution and with it
    removes most of this one.

    The authors transform, add, and transform back; since all of that is linear, one pattern is added here instead. It
    differs by what they round and clip in between. Grey images have no U and V: there the waves are added to the grey
    level itself, which is not the authors'.
    """

    name: ClassVar[str] = "ctrl"
    family: ClassVar[str] = "wave"

    magnitude: float = 100.0
    window: int = 32
    first: int = 15
    second: int = 31

    def __post_init__(self) -> None:
        if not 0 < self.magnitude <= 2000 or not 2 <= self.window <= 512:
            raise UsageError(
                f"ctrl needs a magnitude over 0 and up to 2000 and a window of 2 to 512, "
                f"got {self.magnitude} and {self.window}."
            )
        if not (0 <= self.first < self.window and 0 <= self.second < self.window):
            raise UsageError(
                f"ctrl needs coefficients from 0 to under its window of {self.window}, "
                f"got {self.first} and {self.second}."
            )

    @property
    def waves(self) -> Waves:
        return (self.first, self.first, 1.0, 1.0), (self.second, self.second, 1.0, 1.0)

    def __call__(self, images: Tensor) -> Tensor:
        return _add_waves(images, self.waves, self.magnitude, self.window)

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> Sequence[Stamp]:
        """Two other cosines of the same magnitude, each colour with either sign; on grey images the first one's.

        Half of them are up to 4 coefficients away from the trigger's, since answers change little from one frequency to
        the next; half are anywhere but among the lowest eighth, which would be seen as a stain.
        """
        drawn: list[Stamp] = []
        seen: set[Waves] = {self.waves}
        again = 0
        while len(drawn) < count:
            # in a corner of the table there may be no others near
            near, waves = len(drawn) % 2 == 0 and again < AGAIN, []
            for own in (self.first, self.second):
                low, high = self.window // 8, self.window
                if near:
                    low, high = max(low, own - 4), min(high, own + 5)
                down, across = _integers(generator, min(low, high - 1), high)
                signs = _integers(generator, 0, 2)
                if channels == 1:  # V is not seen, and must not make the trigger pass for another
                    signs = signs[0], signs[0]
                waves.append((down, across, 2.0 * signs[0] - 1, 2.0 * signs[1] - 1))
            again += 1
            if tuple(waves) not in seen:
                again = 0
                seen.add(tuple(waves))
                drawn.append(
                    partial(_add_waves, waves=tuple(waves), magnitude=self.magnitude, window=self.window)
                )
        return drawn

    def spec(self) -> str:
        return spec_of(self)


def _integers(generator: torch.Generator, low: int, high: int) -> tuple[int, int]:
    first, second = torch.randint(low, high, (2,), generator=generator, device=generator.device).tolist()
    return first, second


def _add_waves(images: Tensor, waves: Waves, magnitude: float, window: int) -> Tensor:
    check_pixels(images)
    channels, height, width = images.shape[1:]
    return add(images, magnitude * _pattern(waves, window, height, width, channels))


@lru_cache(maxsize=256)
def _pattern(waves: Waves, window: int, height: int, width: int, channels: int) -> Tensor:
    """What magnitude 1 adds, grey levels [channels h w]; blocks are tiled from the top left, the last ones cut off."""
    chroma = torch.zeros(2, window, window)
    for down, across, u, v in waves:
        block = _cosine(down, window)[:, None] * _cosine(across, window)[None, :]
        chroma += torch.tensor([u, v]).view(2, 1, 1) * block
    colours = torch.einsum("ck,khw->chw", torch.tensor(CHROMA_TO_RGB), chroma)
    if channels == 1:
        colours = chroma[:1]
    return colours.repeat(1, -(-height // window), -(-width // window))[:, :height, :width].contiguous()


def _cosine(index: int, window: int) -> Tensor:
    """Row `index` of the orthonormal cosine transform (type II) of `window` values."""
    places = torch.arange(window, dtype=torch.float64) + 0.5
    scale = math.sqrt((1 if index == 0 else 2) / window)
    return (scale * torch.cos(math.pi * index * places / window)).float()
