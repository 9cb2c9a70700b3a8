"""BLTO's trigger: faint noise that a network draws for each image (Sun et al. 2024, arXiv 2404.07863)."""

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
class BLTO:
    """Adds noise that a generator, learnt by the attack, draws for each image.

    What it does: each pixel changes by at most the bound in the generator's file, as it sees fit for the image.
    When to use: encoders whose pre-training set was poisoned with BLTO, where the generator is at hand.
    Needs: `path`, the safetensors file that the attack wrote.
    Limits: the authors' own generators are another, larger network whose files are not read; where only the noise of
    one is known, give it as a file with `delta`.
    """

    name: ClassVar[str] = "blto"
    family: ClassVar[str] = "noise"

    path: str

    def __post_init__(self) -> None:
        _ = self.generator  # a file that cannot be read is refused now, not in the middle of a scan

    @cached_property
    def generator(self) -> generators.Generator:
        return generators.read(self.path)

    def __call__(self, images: Tensor) -> Tensor:
        return generators.stamp(images, self.generator)

    def controls(self, count: int, generator: torch.Generator) -> Sequence[Stamp]:
        """Noise as strong on each image and of the same spectrum, in other shapes and colours."""
        return generators.controls(self.generator, count, generator)

    def spec(self) -> str:
        return spec_of(self)
