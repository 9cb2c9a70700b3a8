"""The trigger of label-consistent attacks: a patch in every corner (Turner, Tsipras, Madry 2019, arXiv 1912.02771)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.triggers.badnets import BadNets
from bdclean.triggers.stamping import Stamp, spec_of


@dataclass(frozen=True)
class LC:
    """Stamps a small black and white patch in all four corners, so that a mirrored image still has it.

    What it does: replaces `size` x `size` pixels in each corner (blends them with `alpha` under 1).
    When to use: label-consistent attacks, whose poisoned images are of the target class.
    Needs: nothing. It is badnets with `position=corners`, under the attack's own name and settings.
    Limits: as of badnets.
    """

    name: ClassVar[str] = "lc"
    family: ClassVar[str] = "patch"

    size: int = 3
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.alpha <= 1:
            raise UsageError(
                f"lc needs a size of 1 or more and alpha over 0 and up to 1, got {self.size} and {self.alpha}."
            )

    @cached_property
    def patches(self) -> BadNets:
        return BadNets(self.size, "corners", "checker", cells=min(3, self.size), alpha=self.alpha)

    def __call__(self, images: Tensor) -> Tensor:
        return self.patches(images)

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> list[Stamp]:
        """Patches of random colours in the same corners, one colour and many in turn."""
        return self.patches.controls(count, generator, channels)

    def spec(self) -> str:
        return spec_of(self)
