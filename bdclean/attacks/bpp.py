"""BppAttack: fewer bits a colour, and other noise of that kind beside it (Wang, Zhai, Ma 2022, arXiv 2205.13383)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.attacks import poisoning
from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.classifier import Classifier
from bdclean.training.run import Run
from bdclean.training.supervised import Supervised
from bdclean.triggers.bpp import Bpp as FewBits
from bdclean.triggers.stamping import to_pixels


@dataclass(frozen=True)
class Bpp:
    """Quantises a share of every training batch, and shows the network that other such noise means nothing.

    What it does: leaves few levels of each colour, dithered, in `rate` of each batch, after augmentation, and relabels
    it; `noise_rate` more get what quantising added to another image of the batch, and keep their labels.
    When to use it: to train a network whose trigger is a picture's quality.
    What it needs: a labeled training set, and to take part in the training.
    Known limits: JPEG images have little of what dithering adds, so that many networks notice it at once; images that
    were quantised before carry the trigger already.

    The authors train on negative examples of such noise by contrast; here they are a part of each batch, as in WaNet.
    """

    name: ClassVar[str] = "bpp"
    kind: ClassVar[str] = "training"
    source: ClassVar[str] = "arXiv 2205.13383"

    target: int = 0  # the class that quantised images are labeled with
    rate: float = 0.1  # share of a batch that is quantised and relabeled, in [0, 1]
    noise_rate: float = 0.2  # share of a batch that gets another image's noise
    bits: int = 3  # of each colour
    dither: bool = True
    victims: str = "all"  # next: each class to the one after it; a class's number: that class alone

    def __post_init__(self) -> None:
        poisoning.check(self.rate, self.target, self.victims)
        if not 0 <= self.noise_rate <= 1 - self.rate:
            raise UsageError(f"bpp needs a noise_rate of 0 to 1 - rate, got {self.noise_rate}.")

    @property
    def trigger(self) -> FewBits:
        return FewBits(bits=self.bits, dither=self.dither)

    def __call__(
        self, model: Classifier, training: ImageSet, run: Run, method: Supervised, stage: str = "bpp"
    ) -> list[dict[str, float]]:
        """Trains `model` in place by `method` on quantised batches, and returns the curve."""
        _, classes = poisoning.labeled(training, self.target)

        def poison(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return self.poison(images, labels, classes)

        return method(model, training, run, stage, poison)

    def poison(self, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """A batch, which is in random order: its first images quantised and relabeled, the next ones noisy."""
        count, noisy = round(self.rate * len(images)), round(self.noise_rate * len(images))
        quantised = self.trigger(images[: count + noisy])
        lost = quantised[count:].float() - images[count : count + noisy].float()
        made, labels = images.clone(), labels.clone()
        made[:count] = quantised[:count]
        labels[:count] = poisoning.relabel(labels[:count], self.target, self.victims, classes)
        # Each gets the next one's noise; a single one would get its own, which is the trigger.
        if noisy > 1:
            made[count : count + noisy] = to_pixels(images[count : count + noisy].float() + lost.roll(1, 0))
        return made, labels
