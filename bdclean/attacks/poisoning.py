"""What attacks that poison a training set share: which images are poisoned, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError


def check(rate: float, target: int) -> None:
    """Raises UsageError where a poison rate is outside [0, 1] or a target class is negative."""
    if not 0 <= rate <= 1:
        raise UsageError(f"a poison rate is a share of the images, between 0 and 1: {rate} is not.")
    if target < 0:
        raise UsageError(f"a target class is a number from 0 on: {target} is not.")


def chosen(images: int, rate: float, seed: int) -> Tensor:
    """Indices of the images that are poisoned, ascending: a seeded draw of `rate` of all, whatever their class.

    The same seed draws the images of a lower rate as a part of those of a higher one.
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return order[: round(rate * images)].sort().values


def poison(
    training: ImageSet, trigger: Callable[[Tensor], Tensor], target: int, rate: float, seed: int
) -> ImageSet:
    """A copy of `training` in which `chosen` images are stamped and labeled `target` (all-to-one).

    Images of the target class are drawn like all others. Raises Refused without labels or such a class.
    """
    if training.labels is None:
        raise Refused("poisoning a training set needs labels and these images have none.")
    classes = len(training.classes) if training.classes else int(training.labels.max()) + 1
    if target >= classes:
        raise Refused(f"there is no class {target}: the training set has {classes} classes, from 0 on.")
    indices = chosen(len(training), rate, seed)
    images, labels = training.images.clone(), training.labels.clone()
    if len(indices):
        images[indices] = trigger(images[indices])
        labels[indices] = target
    return replace(training, images=images, labels=labels)
