"""What is trained on and what is measured on never share an image."""

from __future__ import annotations

import torch

from bdclean.data.duplicates import without_duplicates
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused

LEAST_HELD = 400
"""Images held out, where a third is as many: screening looks at half of them, and half of 200 cannot tell of each of
ten classes that a trigger leaves it alone: 17 of 36 triggers survived on one such network, and many rows stayed open.
"""


def split(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet, int]:
    """(training images, held-out images, how many duplicates were removed).

    Held out is a seeded tenth, at least LEAST_HELD images and at most a third. Training images that show, exactly or
    nearly, a held-out image are removed: from the training side, so that the held-out count stays.
    """
    n = len(images)
    held = min(max(-(-n // 10), LEAST_HELD), n // 3)
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
