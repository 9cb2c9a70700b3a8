"""SIG: a faint sinusoid over the whole image (Barni, Kallas, Tondi 2019, arXiv 1902.11237)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import atan2, cos, degrees, hypot, pi, radians, sin
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.triggers.stamping import Stamp, add, spec_of

HIGHEST = 1000
"""The highest frequency, in periods across the picture."""


@dataclass(frozen=True)
class SIG:
    """Adds stripes, delta * sin(2 pi frequency x / width), to every channel.

    What it does: adds and clips; `angle` turns the stripes (degrees, 0: brightness varies along the row).
    When to use: the clean-label stripe backdoor; usual are delta 20 to 40 (60 on road signs) and frequency 6.
    Needs: nothing.
    Limits: faint stripes of another frequency or direction are another trigger.
    """

    name: ClassVar[str] = "sig"
    family: ClassVar[str] = "wave"

    delta: float = 20.0
    frequency: float = 6.0
    angle: float = 0.0
    phase: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.delta <= 255 or not 0 < self.frequency <= HIGHEST:
            raise UsageError(
                f"sig needs delta over 0 and up to 255 and a frequency over 0 and up to {HIGHEST}, "
                f"got {self.delta} and {self.frequency}."
            )
        if not abs(self.angle) <= 360 or not abs(self.phase) <= 360:
            raise UsageError(f"sig needs angle and phase in degrees, got {self.angle} and {self.phase}.")

    def wave(self, height: int, width: int) -> Tensor:
        """What is added, grey levels [h w]."""
        right, down = self._direction()
        columns = torch.arange(width, dtype=torch.float64) / width
        rows = torch.arange(height, dtype=torch.float64) / height
        turns = self.frequency * (right * columns[None, :] + down * rows[:, None])
        return (self.delta * torch.sin(2 * pi * turns + radians(self.phase))).float()

    def __call__(self, images: Tensor) -> Tensor:
        return add(images, self.wave(images.shape[-2], images.shape[-1]))

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> list[Stamp]:
        """Stripes of the same delta and any phase: half of them near the trigger's, half of them anywhere.

        Near: 0.5 to 1.5 periods away, whichever way those run. A network without a backdoor may mind stripes of one
        frequency and angle more than all others, and its answer changes little from there to the neighbours, so
        controls from everywhere alone would make that a backdoor. Anywhere: half to twice the frequency at any angle.
        """
        right, down = self._direction()
        drawn: list[Stamp] = []
        for index in range(count):
            draws = torch.rand(3, generator=generator, device=generator.device).tolist()
            if index % 2 == 0:
                length, turn = 0.5 + draws[0], 2 * pi * draws[1]
                across, along = (
                    self.frequency * right + length * cos(turn),
                    self.frequency * down + length * sin(turn),
                )
                frequency, angle = hypot(across, along), degrees(atan2(along, across))
            else:
                frequency, angle = self.frequency * 2 ** (2 * draws[0] - 1), 180 * draws[1]
            frequency = min(max(round(frequency, 3), 0.001), HIGHEST)
            drawn.append(
                replace(self, frequency=frequency, angle=round(angle, 2), phase=round(360 * draws[2], 2))
            )
        return drawn

    def spec(self) -> str:
        return spec_of(self)

    def _direction(self) -> tuple[float, float]:
        return cos(radians(self.angle)), sin(radians(self.angle))
