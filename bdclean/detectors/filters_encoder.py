"""Filters on encoders: does some cluster of its features take an unusually small change of colours to reach?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdclean.detectors.inversion_encoder import InversionEncoder
from bdclean.training.forms import recoloured


@dataclass(frozen=True)
class FiltersEncoder(InversionEncoder):
    """Fits the smallest filter of colour that sends images to a cluster of an encoder's features, for every cluster.

    What it does: clusters the features of the images at hand by k-means, takes the clusters for classes, and mixes and
    shifts colours, the same in every pixel; a cluster whose filter is under 0.45 of the median, and sends 70 % of the
    images, is an outlier.
    When to use it: to look for INACTIVE and its kin without knowing the filter or the downstream task.
    What it needs: 160 images or more, without labels; minutes on a processor.
    Known limits: not calibrated, so a finding decides no verdict. A filter that shifts colours in each image as it sees
    fit is met by the one that is nearest to it.
    """

    name: ClassVar[str] = "filters"
    source: ClassVar[str] = "bdclean's own; kin: Neural Cleanse (Wang et al. 2019), INACTIVE 2405.14672"
    form = staticmethod(recoloured)

    clusters: int = 16
    steps: int = 60
