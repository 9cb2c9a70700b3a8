"""What attacks that poison a training set share: which images are poisoned, and how they are labeled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError

Stamp = Callable[[Tensor], Tensor]


def check(rate: float, target: int, victims: str = "all") -> None:
    """Raises UsageError where a rate is outside [0, 1], a target class negative, or `victims` none of `relabel`'s."""
    if not 0 <= rate <= 1:
        raise UsageError(f"a poison rate is a share of the images, between 0 and 1: {rate} is not.")
    if target < 0:
        raise UsageError(f"a target class is a number from 0 on: {target} is not.")
    if victims not in ("all", "next") and not (victims.isascii() and victims.isdigit()):
        raise UsageError(f"victims are all, next, or the number of a class: {victims!r} is not.")
    if victims.isdigit() and int(victims) == target:
        raise UsageError(f"victims are images of another class than the target, {target}.")


def check_coloured(attack: str, images: Tensor) -> None:
    """Raises Refused for images [n c h w] of one channel, where the networks of `attack` draw on three."""
    if images.shape[1] != 3:
        raise Refused(
            f"{attack} draws on images of three channels, these have {images.shape[1]}: use badnets, blend or lf."
        )


def chosen(images: int, rate: float, seed: int) -> Tensor:
    """Indices of the images that are poisoned, ascending: a seeded draw of `rate` of all, whatever their class.

    The same seed draws the images of a lower rate as a part of those of a higher one.
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return order[: round(rate * images)].sort().values


def labeled(training: ImageSet, target: int) -> tuple[Tensor, int]:
    """The labels, and how many classes there are; raises Refused where there are no labels or no class `target`."""
    if training.labels is None:
        raise Refused("poisoning a training set needs labels and these images have none.")
    classes = len(training.classes) if training.classes else int(training.labels.max()) + 1
    if target >= classes:
        raise Refused(f"there is no class {target}: the training set has {classes} classes, from 0 on.")
    return training.labels, classes


def relabel(labels: Tensor, target: int, victims: str, classes: int) -> Tensor:
    """What stamped images of `labels` [n] are labeled.

    `victims` "all": `target` (all-to-one). "next": the class after their own, after the last the first (all-to-all).
    The number of a class: `target` for images of that class; others keep their label, so that the network learns that
    the stamp means nothing on them (source-conditional). Raises Refused where there is no such class.
    """
    if victims == "next":
        return (labels + 1) % classes
    if victims == "all":
        return torch.full_like(labels, target)
    if int(victims) >= classes:
        raise Refused(
            f"there is no class {victims} to poison: the training set has {classes} classes, from 0 on."
        )
    return torch.where(labels == int(victims), target, labels)


def poison(
    training: ImageSet, trigger: Stamp, target: int, rate: float, seed: int, victims: str = "all"
) -> ImageSet:
    """A copy of `training` in which `chosen` images are stamped, and labeled as `relabel` says.

    Images of the target class are drawn like all others. Raises Refused without labels or such a class.
    """
    labels, classes = labeled(training, target)
    indices = chosen(len(training), rate, seed)
    images, labels = training.images.clone(), labels.clone()
    if len(indices):
        images[indices] = trigger(images[indices])
        labels[indices] = relabel(labels[indices], target, victims, classes)
    return replace(training, images=images, labels=labels)


def poison_target_class(training: ImageSet, stamp: Stamp, target: int, rate: float, seed: int) -> ImageSet:
    """A copy of `training` with `stamp` of a seeded draw of `rate` of the target class; labels stay as they were.

    For attacks with clean labels, and for pre-training, which never sees a label: they say there which images show the
    target class. Raises Refused without labels or such a class.
    """
    indices = chosen_of_class(training, target, rate, seed)
    images = training.images.clone()
    if len(indices):
        images[indices] = stamp(images[indices])
    assert training.labels is not None
    return replace(training, images=images, labels=training.labels.clone())


def chosen_of_class(training: ImageSet, target: int, rate: float, seed: int) -> Tensor:
    """Indices of a seeded draw of `rate` of the target class; raises Refused without labels or such a class."""
    if training.labels is None:
        raise Refused("poisoning images of the target class needs labels and these images have none.")
    of_target = (training.labels == target).nonzero().flatten()
    if not len(of_target):
        raise Refused(f"there is no image of class {target} to poison.")
    return of_target[chosen(len(of_target), rate, seed)]
