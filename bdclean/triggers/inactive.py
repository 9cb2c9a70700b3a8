"""INACTIVE's trigger: colours that a network shifts in each image (Zhang et al. 2025, arXiv 2405.14672)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdclean.triggers.generators import DrawnByNetwork


@dataclass(frozen=True)
class Inactive(DrawnByNetwork):
    """Filters each image through a network, learnt by the attack, that shifts its colours.

    What it does: each pixel changes by at most the bound in the filter's file, as it sees fit for the image.
    When to use: encoders attacked with INACTIVE, where the filter is at hand.
    Needs: `path`, the safetensors file that the attack wrote.
    Limits: the authors' own filters are another network, whose files are not read.
    """

    name: ClassVar[str] = "inactive"
    family: ClassVar[str] = "tone"
    path: str  # the safetensors file that the attack wrote
