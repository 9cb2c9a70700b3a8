"""Inverted triggers: does some class of the suspect take an unusually small change to reach?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.registry import FAMILIES
from bdclean.training import adversaries
from bdclean.training.drawing import drawn
from bdclean.training.forms import ADDED, Form, added, mask
from bdclean.training.inversion import (
    LEAST_CLASSES,
    Detected,
    Inverted,
    Outlier,
    invert,
    outliers,
    smallest,
    smallness,
    spread_out,
)
from bdclean.training.run import Run

MOST_INVERTED = 100
"""Of more classes those are inverted that random counterfeits draw most images to."""
MEASURED = 16
"""On so many images is it measured how large masks are that are drawn for each image."""


@dataclass(frozen=True)
class Inversion:
    """Fits the smallest change that sends images to a class, for every class, and tells those that are far smaller.

    What it does: fits masks, added patterns and smooth added patterns; a class whose change is under 0.3 of the median
    is an outlier. Then masks that a small network draws for each image: under 0.27 of the median of masks for all.
    When to use it: to look for patches, for triggers that are not the same on every image, as input-aware ones, and
    for what is added to the whole picture, without knowing the trigger.
    What it needs: 100 images or more, without labels; three classes or more.
    Known limits: no finding decides a verdict by itself, only with its rank among clean networks, in which masks for
    each image do not count yet. Triggers that send images to no one class are not found: see `all-to-all`. Of more than
    100 classes only the 100 are inverted that random counterfeits draw images to. Stripes are found badly: see
    `stripes`; for warps see `warps`, for tones of colour `filters`.

    After Neural Cleanse (Wang et al. 2019, IEEE S&P); departures stand in `training.inversion`.
    """

    name: ClassVar[str] = "inversion"
    source: ClassVar[str] = "Neural Cleanse (Wang et al. 2019), with bdclean's own forms and starts"

    steps: int = 100  # of masks; 0.6 as many of what is added to the picture
    families: tuple[str, ...] = FAMILIES  # that are looked for, and that counterfeits are drawn from

    def __post_init__(self) -> None:
        if self.steps < 1 or not set(self.families) <= set(FAMILIES):
            raise UsageError(f"inversion: steps are positive, families some of {'/'.join(FAMILIES)}.")

    def __call__(self, suspect: Classifier, arch: Arch, images: Tensor, run: Run) -> Detected:
        """Findings on `images` uint8 [n c h w]: of each form the outliers, else the smallest change."""
        channels, height, width = images.shape[1:]
        forms = [mask(height, width, channels), *(added(height, width, kind, channels) for kind in ADDED)]
        classes, found = inverted_classes(suspect, arch, images, self.families, run), Detected()
        for form in forms:
            if form.family not in self.families:
                continue
            sizes = add_inverted(found, self.name, form, self.steps, suspect, images, classes, run).sizes
            if form.parts is not None and len(sizes) >= LEAST_CLASSES:
                each = drawn(spread_out(images, MEASURED).to(run.device))
                add_inverted(found, self.name, each, self.steps, suspect, images, classes, run, sizes)
        return found


@dataclass(frozen=True)
class OneForm:
    """A detector that inverts changes of one `form` (height, width, channels) for every class."""

    name: ClassVar[str]
    form: ClassVar[Callable[[int, int, int], Form]]

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"{self.name}: steps are positive.")

    def __call__(self, suspect: Classifier, arch: Arch, images: Tensor, run: Run) -> Detected:
        """Findings on `images` uint8 [n c h w]: the outliers, else the smallest change."""
        channels, height, width = images.shape[1:]
        form, found = type(self).form(height, width, channels), Detected()
        classes = inverted_classes(suspect, arch, images, FAMILIES, run)
        add_inverted(found, self.name, form, self.steps, suspect, images, classes, run)
        return found


def add_inverted(
    found: Detected, name: str, form: Form, steps: int, suspect: Classifier, images: Tensor, classes: Tensor,
    run: Run, usual: Tensor | None = None,
) -> Inverted:  # fmt: skip
    """Inverts changes of `form`, and adds what the detector `name` finds to `found`; `usual` as in `outliers`.

    The statistic leaves out what is held against something `usual`: the clean networks were not asked for that.
    """
    inverted = invert(suspect, images, form, classes, run, steps=math.ceil(steps * form.steps))
    if usual is None:
        found.statistic = max(found.statistic or 0.0, smallness(inverted))
    add_to(found, name, inverted, usual=usual)
    return inverted


def add_to(
    found: Detected, name: str, inverted: Inverted, aim: str = "class", usual: Tensor | None = None
) -> None:
    """Adds to `found` the outliers of `inverted`, else its smallest change, as the detector `name` says it.

    `aim` is what its classes are: an encoder's are clusters. `usual` as in `outliers`: what it is given for is no part
    of the statistic.
    """
    told = found.findings if usual is None else found.uncounted
    form, (small, index, limit) = inverted.form, outliers(inverted, usual)
    found.limits[form.name] = limit
    for k in small.nonzero().squeeze(1).tolist() or [smallest(inverted)]:
        target, parameters = int(inverted.classes[k]), inverted.parameters[k]
        told.append(
            {
                "detector": name,
                "verdict": "outlier" if small[k] else "no-outlier",
                "score": float(inverted.sizes[k]),
                "threshold": limit,
                "odd": "below",
                "reason": described(inverted, float(index[k]), k, aim, usual),
            }
        )
        found.pictures[f"{form.name} inverted for {aim} {target}, on grey"] = form.picture(parameters)
        if small[k]:
            found.outliers.append(Outlier(form, target, parameters, float(inverted.sizes[k]), limit))


def inverted_classes(
    suspect: Classifier, arch: Arch, images: Tensor, families: Sequence[str], run: Run
) -> Tensor:
    """All classes; of more than MOST_INVERTED those that random counterfeits draw most images to, in order."""
    if arch.classes <= MOST_INVERTED:
        return torch.arange(arch.classes)
    pixels = spread_out(images).to(run.device).float() / 255
    forward, generator = partial(run.forward, suspect), run.generator("attraction")
    attracted = run.keep("attraction", lambda: adversaries.attraction(forward, pixels, families, generator))
    return attracted.topk(MOST_INVERTED).indices.sort().values


def described(inverted: Inverted, index: float, k: int, aim: str, usual: Tensor | None) -> str:
    """Change `k` of `inverted` in words; `usual` as in `outliers`."""
    sizes, plural = inverted.sizes, {"class": "classes", "cluster": "clusters"}[aim]
    if usual is None:
        others, said = torch.cat([sizes[:k], sizes[k + 1 :]]), f"the next {plural} need"
    else:
        others, said = usual, f"for all images one of the {plural} needs"
    return (
        f"{inverted.form.said.format(sizes[k])} sends images to {aim} {int(inverted.classes[k])} "
        f"(success {inverted.success[k]:.2f}); {said} {others.min():.1f} to {others.max():.1f} "
        f"(anomaly index {index:.1f})"
    )
