"""Filters: does some class of the suspect take an unusually small change of colours to reach?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdclean.detectors.inversion import OneForm
from bdclean.training.forms import recoloured


@dataclass(frozen=True)
class Filters(OneForm):
    """Fits the smallest filter of colour that sends images to each class, and tells those that are far smaller.

    What it does: mixes and shifts colours, and bends tones, the same in every pixel; a class whose filter is under 0.45
    of the median, and sends 70 % of the images, is an outlier.
    When to use it: to look for photo filters and colour casts that are triggers, without knowing them.
    What it needs: 100 images or more, without labels; three classes or more.
    Known limits: road signs and the like, whose colours say much, stand out without a trigger (3 of 6 clean networks),
    so that only the rank among clean networks decides. Colours that a network shifts in each image as it sees fit are
    not met.
    """

    name: ClassVar[str] = "filters"
    source: ClassVar[str] = "bdclean's own; kin: Neural Cleanse (Wang et al. 2019), ABS (Liu et al. 2019)"

    form = staticmethod(recoloured)

    steps: int = 100  # as of `inversion`, of which a filter takes 0.6
