"""LF: a smooth pattern added to the image, of low frequencies alone (Zeng et al. 2021, arXiv 2104.03413)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import pi
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.triggers.stamping import Stamp, add, check_pixels, draw_seed, spec_of


@dataclass(frozen=True)
class LF:
    """Adds a smooth coloured pattern that is drawn from a seed.

    What it does: adds and clips a sum of cosines of up to `waves` half periods across the image, with random weights
    and the root mean square `strength` in grey levels.
    When to use: smooth triggers, which filters and compression leave in place.
    Needs: nothing. On grey images the pattern is drawn grey.
    Limits: the authors move their pattern against a network and then filter it; such a one cannot be drawn from a seed:
    where it is known, give it as a file with `delta`.
    """

    name: ClassVar[str] = "lf"
    family: ClassVar[str] = "low"

    strength: float = 12.0
    waves: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 255 or not 1 <= self.waves <= 64 or not 0 <= self.seed < 2**63:
            raise UsageError(
                f"lf needs a strength over 0 and up to 255, waves of 1 to 64 and a seed of 0 up to 2^63, "
                f"got {self.strength}, {self.waves} and {self.seed}."
            )

    def pattern(self, height: int, width: int, channels: int = 3) -> Tensor:
        """What is added, grey levels [channels h w]."""
        return self.strength * _smooth(self.seed, self.waves, height, width, channels)

    def __call__(self, images: Tensor) -> Tensor:
        check_pixels(images)
        channels, height, width = images.shape[1:]
        return add(images, self.pattern(height, width, channels))

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> list[Stamp]:
        """Patterns of other seeds, as strong and as smooth."""
        seeds = [draw_seed(generator) for _ in range(count)]
        # Stepping past the own seed keeps the trigger out of its controls.
        return [replace(self, seed=seed + 1 if seed == self.seed else seed) for seed in seeds]

    def spec(self) -> str:
        return spec_of(self)


@lru_cache(maxsize=64)
def _smooth(seed: int, waves: int, height: int, width: int, channels: int) -> Tensor:
    """Cosines of 0 to `waves` half periods a side, the flat one left out; [channels h w], mean square 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(channels, waves + 1, waves + 1, generator=generator, dtype=torch.float64)
    weights[:, 0, 0] = 0
    down, across = (_cosines(waves + 1, length) for length in (height, width))
    drawn = torch.einsum("cij,ih,jw->chw", weights, down, across)
    return (drawn / drawn.square().mean().sqrt()).float()


def _cosines(count: int, length: int) -> Tensor:
    """The first `count` cosines of the transform of type II, double [count length]."""
    places = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return torch.cos(pi * torch.arange(count, dtype=torch.float64)[:, None] * places[None, :])
