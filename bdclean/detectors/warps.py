"""Warps: does some class of the suspect take an unusually small smooth warp to reach?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdclean.detectors.inversion import OneForm
from bdclean.training.forms import warped


@dataclass(frozen=True)
class Warps(OneForm):
    """Fits the smallest smooth warp that sends images to each class, and tells those that are far smaller.

    What it does: moves 8 x 8 points, between which the picture follows smoothly; a class whose warp is under 0.7 of
    the median, and sends 85 % of the images, is an outlier.
    When to use it: to look for WaNet and its kin without knowing the field.
    What it needs: 100 images or more, without labels; three classes or more.
    Known limits: a finding decides a verdict only with its rank among clean networks, in none of which a warp sends
    most images to a class. Finer fields are not met.
    """

    name: ClassVar[str] = "warps"
    source: ClassVar[str] = "bdclean's own; kin: Neural Cleanse (Wang et al. 2019), WaNet 2102.10369"

    form = staticmethod(warped)

    steps: int = 100  # as of `inversion`, of which a warp takes 0.6
