"""BLTO's trigger: faint noise that a network draws for each image (Sun et al. 2024, arXiv 2404.07863)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdclean.triggers.generators import DrawnByNetwork


@dataclass(frozen=True)
class BLTO(DrawnByNetwork):
    """Adds noise that a generator, learnt by the attack, draws for each image.

    What it does: each pixel changes by at most the bound in the generator's file, as it sees fit for the image.
    When to use: encoders whose pre-training set was poisoned with BLTO, where the generator is at hand.
    Needs: `path`, the safetensors file that the attack wrote.
    Limits: the authors' own generators are another, larger network whose files are not read; where only the noise of
    one is known, give it as a file with `delta`.
    """

    name: ClassVar[str] = "blto"
    family: ClassVar[str] = "noise"
    path: str  # the safetensors file that the attack wrote
