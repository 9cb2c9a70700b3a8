"""What is trained on and what is measured on never share an image."""

from __future__ import annotations

import torch

from bdclean.data.duplicates import without_duplicates
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused


def split(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet, int]:
    """(training images, held-out images, how many duplicates were removed).

    Held out is a seeded tenth, at least 200 images and at most a third. Training images that show, exactly or
    nearly, a held-out image are removed: from the training side, so that the held-out count stays.
    """
    n = len(images)
    held = min(max(-(-n // 10), 200), n // 3)
    if held == 0:
        raise Refused(f"{n} images cannot be split into training and held-out ones: give more, or --test.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    # Sorted, so that both parts keep the order of the folder.
    held_out = images.select(order[:held].sort().values)
    training, duplicates = without_duplicates(images.select(order[held:].sort().values), held_out)
    if len(training) == 0:
        raise Refused(
            f"all {duplicates} images left for training show the same pictures as the {held} held out: "
            "the folder holds copies; give different images, or --test."
        )
    return training, held_out, duplicates
