"""Warps: does some class of the suspect take an unusually small smooth warp to reach?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bdclean.detectors.inversion import inverted_forms
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.registry import FAMILIES
from bdclean.training.forms import warped
from bdclean.training.inversion import Detected
from bdclean.training.run import Run


@dataclass(frozen=True)
class Warps:
    """Fits the smallest smooth warp that sends images to each class, and tells those that are far smaller.

    What it does: moves 8 x 8 points, between which the picture follows smoothly; a class whose warp is under 0.7 of
    the median, and sends 85 % of the images, is an outlier.
    When to use it: to look for WaNet and its kin without knowing the field.
    What it needs: 100 images or more, without labels; three classes or more.
    Known limits: not calibrated, so that no finding decides a verdict. Finer fields are not met.
    """

    name: ClassVar[str] = "warps"
    source: ClassVar[str] = "bdclean's own; kin: Neural Cleanse (Wang et al. 2019), WaNet 2102.10369"

    steps: int = 100  # as of `inversion`, of which a warp takes 0.6

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError("warps: steps are positive.")

    def __call__(self, suspect: Classifier, arch: Arch, images: Tensor, run: Run) -> Detected:
        """Findings on `images` uint8 [n c h w]: the outliers, else the smallest warp."""
        channels, height, width = images.shape[1:]
        form = warped(height, width, channels)
        return inverted_forms(self.name, [form], self.steps, FAMILIES, suspect, arch, images, run)
