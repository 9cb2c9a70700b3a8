"""INACTIVE's trigger: colours that a network shifts in each image (Zhang et al. 2025, arXiv 2405.14672)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.triggers import generators
from bdclean.triggers.stamping import Stamp, spec_of


@dataclass(frozen=True)
class Inactive:
    """Filters each image through a network, learnt by the attack, that shifts its colours.

    What it does: each pixel changes by at most the bound in the filter's file, as it sees fit for the image.
    When to use: encoders attacked with INACTIVE, where the filter is at hand.
    Needs: `path`, the safetensors file that the attack wrote.
    Limits: the authors' own filters are another network, whose files are not read.
    """

    name: ClassVar[str] = "inactive"
    family: ClassVar[str] = "tone"

    path: str

    def __post_init__(self) -> None:
        _ = self.generator  # a file that cannot be read is refused now, not in the middle of a scan

    @cached_property
    def generator(self) -> generators.Generator:
        return generators.read(self.path)

    def __call__(self, images: Tensor) -> Tensor:
        return generators.stamp(images, self.generator)

    def controls(self, count: int, generator: torch.Generator) -> Sequence[Stamp]:
        """Changes as strong on each image and of the same spectrum, to other shapes and colours."""
        return generators.controls(self.generator, count, generator)

    def spec(self) -> str:
        return spec_of(self)
