"""What attacks that poison a pre-training set share: images of the target class are changed, and no label is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bdclean.attacks.poisoning import chosen
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused


def poison_target_class(
    training: ImageSet, poison: Callable[[Tensor], Tensor], target: int, rate: float, seed: int
) -> ImageSet:
    """A copy of `training` with `poison` of a seeded draw of `rate` of the target class; labels stay as they were.

    Pre-training never sees the labels: they say here which images show the target class. Raises Refused without labels
    or such a class.
    """
    if training.labels is None:
        raise Refused("poisoning images of the target class needs labels and these images have none.")
    of_target = (training.labels == target).nonzero().flatten()
    if not len(of_target):
        raise Refused(f"there is no image of class {target} to poison.")
    indices = of_target[chosen(len(of_target), rate, seed)]
    images = training.images.clone()
    if len(indices):
        images[indices] = poison(images[indices])
    return replace(training, images=images, labels=torch.clone(training.labels))
