"""Noisy Alignment: another class's image with a patch beside one of the target class (Chen et al. 2025, 2508.14015)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.attacks.poisoning import check, poison_target_class
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.triggers.ssl_backdoor import SSLBackdoor as Patch
from bdclean.triggers.ssl_backdoor import patch_side
from bdclean.triggers.stamping import to_pixels


@dataclass(frozen=True)
class NoisyAlignment:
    """Joins images of other classes, with a patch, to images of the target class before pre-training (2508.14015).

    What it does: a seeded share of the target class becomes the halves of pictures whose other half is an image of
    any other class with a patch in its middle. Two crops of one picture then often show one half each, and
    pre-training pulls whatever wears the patch towards the target class.
    When to use it: to make an encoder poisoned through its data; the strongest such attack in its authors' table.
    What it needs: labeled images, whose labels say only which ones show the target class; crops in pre-training.
    Known limits: crops much larger than half of a picture show both halves, and bind less.

    The authors join two whole images, above, below, left or right at random, and let the crop bring the pair to size;
    a training set has images of one size here, so each is shrunk to half along that axis first. The patch is pasted
    after that, at its full size. The authors' patch is one of the hidden-trigger ones, ours has random colours.
    """

    name: ClassVar[str] = "noisy-alignment"
    kind: ClassVar[str] = "pre-training"
    source: ClassVar[str] = "arXiv 2508.14015"

    target: int = 0  # the class whose images are joined to others
    rate: float = 0.5  # share of its images, in [0, 1]
    seed: int = 0  # draws them, what they are joined to, and on which side
    patch: str = "random"  # as in the trigger ssl-backdoor
    colours: int = 0  # of a random patch
    size: int = 0  # of the patch in pixels, 0: by the input

    def __post_init__(self) -> None:
        check(self.rate, self.target)
        _ = self.trigger  # which checks the size

    @property
    def trigger(self) -> Patch:
        """What test images are stamped with: the patch, its corner at 45 % of each side, as the authors' is."""
        return Patch(self.patch, self.colours, self.size, inner=0.45)

    def __call__(self, training: ImageSet) -> ImageSet:
        others = (
            training.images if training.labels is None else training.images[training.labels != self.target]
        )
        join = partial(self._joined, others=others)
        return poison_target_class(training, join, self.target, self.rate, self.seed)

    def _joined(self, references: Tensor, others: Tensor) -> Tensor:
        """Pictures [k 3 h w]: one half is one of `references` [k 3 h w], the other is one of `others`, stamped."""
        if not len(others):
            raise Refused(
                "noisy-alignment needs images of classes other than the target, and there are none."
            )
        generator = torch.Generator().manual_seed(self.seed)
        partners = others[torch.randint(len(others), (len(references),), generator=generator)]
        layouts = torch.randint(4, (len(references),), generator=generator)
        height, width = references.shape[2:]
        trigger = replace(self.trigger, size=patch_side(self.size, height, width))
        joined = torch.empty_like(references)
        for layout, (axis, first) in enumerate(((2, True), (3, True), (2, False), (3, False))):
            of = layouts == layout
            length = references.shape[axis] // 2
            stamped = trigger(_shrunk(partners[of], axis, length))
            plain = _shrunk(references[of], axis, references.shape[axis] - length)
            joined[of] = torch.cat([stamped, plain] if first else [plain, stamped], axis)
        return joined


def _shrunk(images: Tensor, axis: int, length: int) -> Tensor:
    """`images` uint8 [n 3 h w] with `length` pixels along `axis`: each the mean of those that it covers."""
    size = [length if k == axis else images.shape[k] for k in (2, 3)]
    return to_pixels(F.interpolate(images.float(), size=size, mode="area"))
