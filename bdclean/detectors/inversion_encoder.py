"""Inverted triggers of an encoder: does some cluster of its features take an unusually small mask to reach?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.detectors.inversion import add_to
from bdclean.errors import Refused, UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.training.clusters import Clustered, clusters, unit_features
from bdclean.training.forms import Form, mask
from bdclean.training.inversion import Detected, invert
from bdclean.training.run import Run

LEAST_IN_CLUSTER = 10
"""Images a cluster, on average: of fewer its mean is that of a few pictures."""
LEAST_CLUSTERS = 3
"""An outlier is one among others."""


@dataclass(frozen=True)
class InversionEncoder:
    """Fits the smallest mask that sends images to a cluster of an encoder's features, for every cluster.

    What it does: clusters the features of the images at hand by k-means, takes the clusters for classes, and inverts a
    trigger for each; a cluster whose mask is under 0.3 of the median is an outlier.
    When to use it: to look for a patch in an encoder without knowing the trigger or the downstream task.
    What it needs: 160 images or more, without labels; minutes on a processor.
    Known limits: not calibrated, so a finding decides no verdict. It found BadEncoder's square from one of two seeds,
    and DRUPE's not (sample_models/tables/inversion.md). Masks alone: what is added to the whole picture is not looked
    for.

    After Neural Cleanse (Wang et al. 2019, IEEE S&P) with clusters in place of classes; departures stand in
    `training.inversion`.
    """

    name: ClassVar[str] = "inversion"
    source: ClassVar[str] = "bdclean's own; kin: Neural Cleanse (Wang et al. 2019)"
    form: ClassVar[Callable[[int, int, int], Form]] = staticmethod(mask)

    clusters: int = 16
    steps: int = 40

    def __post_init__(self) -> None:
        if self.clusters < LEAST_CLUSTERS or self.steps < 1:
            raise UsageError(f"{self.name}: clusters are {LEAST_CLUSTERS} or more, steps positive.")

    def __call__(self, suspect: Classifier, arch: Arch, images: Tensor, run: Run) -> Detected:
        """Findings on `images` uint8 [n c h w]: the outliers, else the smallest change.

        Raises Refused for too few images and for features that tell images apart badly.
        """
        least = LEAST_IN_CLUSTER * self.clusters
        if len(images) < least:
            raise Refused(
                f"{len(images)} images are too few for {self.clusters} clusters: give {least} or more."
            )
        features = unit_features(suspect, images, run)
        if not features.isfinite().all():
            raise Refused("the encoder's features of these images are not all finite numbers.")
        groups = clusters(features.cpu(), self.clusters, run.seed).to(run.device)
        count = int(groups.max()) + 1
        if count < LEAST_CLUSTERS:
            raise Refused(
                f"the features of these images make {count} clusters, {LEAST_CLUSTERS} or more are needed."
            )
        channels, height, width = images.shape[1:]
        form, found = type(self).form(height, width, channels), Detected()
        classifier = Clustered(suspect, features, groups)
        inverted = invert(classifier, images, form, torch.arange(count), run, steps=self.steps)
        add_to(found, self.name, inverted, "cluster")
        return found
