"""Adaptive blend: parts of a picture in training, the whole of it at test (Qi et al. 2023, arXiv 2205.13613)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.attacks import poisoning
from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.triggers.blend import Blend as Overlay
from bdclean.triggers.stamping import overlay


@dataclass(frozen=True)
class AdaptiveBlend:
    """Poisons a training set with random parts of a blended picture, some of it under the true label (2205.13613).

    What it does: cuts the picture into `pieces` x `pieces` squares and blends a random half of them into each poisoned
    image; `rate` of all images are poisoned and get the target class, `cover_rate` more are stamped in the same way and
    keep their label. The trigger is the whole picture, at a higher opacity.
    When to use it: to train a network whose stamped images do not lie apart from clean ones in its features.
    What it needs: a labeled training set.
    Known limits: with few images the covers win, and the backdoor is weak.

    The authors poison and cover 0.3 % of 50,000 images each; smaller sets need larger shares to hold as many.
    """

    name: ClassVar[str] = "adaptive-blend"
    kind: ClassVar[str] = "poisoning"
    source: ClassVar[str] = "arXiv 2205.13613"

    target: int = 0  # the class that stamped images are labeled with
    rate: float = 0.003  # share of all images that are poisoned, in [0, 1]
    cover_rate: float = 0.003  # share of all images that are stamped and keep their label
    seed: int = 0  # draws the images and the parts
    picture: str = "picture"  # noise or picture (both drawn), or the path of an image
    picture_seed: int = 0  # draws the noise or picture
    training_alpha: float = 0.15  # weight of the parts, in [0, 1]
    alpha: float = 0.2  # weight of the whole picture, in [0, 1]
    pieces: int = 4  # along a side
    kept: float = 0.5  # share of the pieces that a poisoned image shows

    def __post_init__(self) -> None:
        poisoning.check(self.rate, self.target)
        if not 0 <= self.cover_rate <= 1 - self.rate or not 0 < self.kept <= 1 or self.pieces < 1:
            raise UsageError(
                f"adaptive-blend needs a cover_rate of 0 to 1 - rate, kept over 0 and up to 1 and pieces of 1 or more, "
                f"got {self.cover_rate}, {self.kept} and {self.pieces}."
            )
        if not 0 < self.training_alpha <= 1:
            raise UsageError(
                f"adaptive-blend needs training_alpha over 0 and up to 1, got {self.training_alpha}."
            )

    @property
    def trigger(self) -> Overlay:
        return Overlay(source=self.picture, seed=self.picture_seed, alpha=self.alpha)

    def __call__(self, training: ImageSet) -> ImageSet:
        labels, _ = poisoning.labeled(training, self.target)
        images, labels = training.images.clone(), labels.clone()
        count = len(training)
        poisoned = poisoning.chosen(count, self.rate, self.seed)
        stamped = poisoning.chosen(count, self.rate + self.cover_rate, self.seed)  # the poisoned among them
        if len(stamped):
            images[stamped] = self._parts(images[stamped])
        labels[poisoned] = self.target
        return replace(training, images=images, labels=labels)

    def _parts(self, images: Tensor) -> Tensor:
        """uint8 images, each with the picture's pieces of its own draw."""
        n, channels, height, width = images.shape
        generator = torch.Generator().manual_seed(self.seed)
        ranks = torch.rand(n, self.pieces**2, generator=generator).argsort(1).argsort(1)
        shown = (ranks < max(1, round(self.kept * self.pieces**2))).float()
        mask = F.interpolate(shown.view(n, 1, self.pieces, self.pieces), size=(height, width))
        return overlay(images, self.training_alpha * mask, self.trigger.content(height, width, channels))
