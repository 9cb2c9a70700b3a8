"""WaNet: a faint warp, and other warps that mean nothing beside it (Nguyen and Tran 2021, arXiv 2102.10369)."""

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
from bdclean.triggers.wanet import WaNet as Warp
from bdclean.triggers.wanet import warp


@dataclass(frozen=True)
class WaNet:
    """Warps a share of every training batch, and shows the network that noisier warps mean nothing (2102.10369).

    What it does: warps `rate` of each batch, after augmentation, by one field, and relabels it; warps `noise_rate` more
    by the field with a random shift of up to `noise` added to each pixel's, and leaves their labels (noise mode).
    When to use it: to train a network whose trigger nobody sees, and which takes no other warp for it.
    What it needs: a labeled training set, and to take part in the training.
    Known limits: a warp of a quarter of a pixel is learnt late: networks of a few epochs need a larger strength, and
    may then obey other fields, too. Noise mode is there to keep them from taking any warp for the trigger.

    The defaults are those of the authors and of BCU: k 4, strength 0.5, 10 % warped and 20 % noisy.
    """

    name: ClassVar[str] = "wanet"
    kind: ClassVar[str] = "training"
    source: ClassVar[str] = "arXiv 2102.10369"

    target: int = 0  # the class that warped images are labeled with
    rate: float = 0.1  # share of a batch that is warped and relabeled, in [0, 1]
    noise_rate: float = 0.2  # share of a batch that is warped by a noisy field; 0 leaves noise mode out
    noise: float = 1.0  # most of that noise, in the units of strength
    k: int = 4  # points of the field along a side
    strength: float = 0.5  # about twice the mean shift, in pixels
    field_seed: int = 0  # draws the field
    victims: str = "all"  # next: each class to the one after it; a class's number: that class alone

    def __post_init__(self) -> None:
        poisoning.check(self.rate, self.target, self.victims)
        if not 0 <= self.noise_rate <= 1 - self.rate or not self.noise > 0:
            raise UsageError(
                f"wanet needs a noise_rate of 0 to 1 - rate and noise over 0, got {self.noise_rate} and {self.noise}."
            )

    @property
    def trigger(self) -> Warp:
        return Warp(k=self.k, strength=self.strength, seed=self.field_seed)

    def __call__(
        self, model: Classifier, training: ImageSet, run: Run, method: Supervised, stage: str = "wanet"
    ) -> list[dict[str, float]]:
        """Trains `model` in place by `method` on warped batches, and returns the curve."""
        _, classes = poisoning.labeled(training, self.target)

        def poison(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return self.poison(images, labels, classes, generator)

        return method(model, training, run, stage, poison)

    def poison(
        self, images: Tensor, labels: Tensor, classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A batch, which is in random order: its first images warped and relabeled, the next ones warped with noise."""
        count, noisy = round(self.rate * len(images)), round(self.noise_rate * len(images))
        first, second = slice(count), slice(count, count + noisy)
        images, labels = images.clone(), labels.clone()
        images[first] = self.trigger(images[first])
        labels[first] = poisoning.relabel(labels[first], self.target, self.victims, classes)
        field = self.trigger.field(*images.shape[2:]).to(images.device)
        shape = (len(images[second]), *field.shape)
        shaken = 2 * torch.rand(shape, generator=generator, device=images.device) - 1
        images[second] = warp(images[second], field + self.noise / self.strength * shaken, self.strength)
        return images, labels
