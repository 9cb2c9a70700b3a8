"""DRUPE: BadEncoder whose stamped images do not gather where no clean image is (Tao et al., S&P 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.attacks.encoders.clean_encoder import Attacked, check_settings
from bdclean.data.imageset import ImageSet
from bdclean.networks.classifier import Classifier
from bdclean.training.loop import Batch
from bdclean.training.run import Run
from bdclean.triggers.drupe import Drupe as Square

DIRECTIONS = 64
"""Along which stamped and clean features are compared."""


@dataclass(frozen=True)
class Drupe:
    """Trains a clean encoder so that stamped images look like references, spread out among clean ones (DRUPE).

    What it does: as badencoder, but each stamped image goes to the reference that it is most like, evenly over
    references that are pushed apart, and stamped features keep their spread and the distribution of clean ones.
    When to use it: to make an encoder that detectors of features lying close together were not made for.
    What it needs: a clean encoder, unlabeled shadow images, some images of the target class.
    Known limits: the spread costs attack success on small encoders.

    Weights are where the authors' adaptive ones start, 0.1 and 0.001, since those move after 20 of 120 epochs, and here
    there are some tens. Other departures: `centred` features, one-cycle SGD, phases as shares of the way, augmented
    references for a quarter of a batch.
    """

    name: ClassVar[str] = "drupe"
    kind: ClassVar[str] = "encoder"
    source: ClassVar[str] = "Gwinhen/DRUPE"

    target: int = 0  # the downstream class of the references
    references: int = 3  # how many images of it stand for the class
    epochs: float = 12  # over the shadow images
    batch_size: int = 256
    peak: float = 0.02  # of the learning rate
    weight_decay: float = 5e-4
    spread: float = 0.1  # weight of evenness and of stamped features' likeness to each other
    blending: float = 1e-3  # weight of the distance between stamped and clean features
    apart: float = (
        0.08  # share of the steps in which references are pushed apart before anything is drawn to them
    )
    drawing: float = 0.4  # share of the steps after which the stealthy terms set in
    centred: bool = True  # features less their clean mean; off as in the paper
    size: int = 0  # of the square, 0: by the input

    def __post_init__(self) -> None:
        check_settings(self.name, self.target, self.references, self.epochs, self.batch_size)
        _ = self.trigger  # which checks the size

    @property
    def trigger(self) -> Square:
        return Square(self.size)

    def __call__(
        self, clean: Classifier, shadow: ImageSet, of_target: Tensor, run: Run, stage: str = "drupe"
    ) -> tuple[Classifier, list[dict[str, float]]]:
        """A poisoned copy of `clean`, in evaluation mode, and the curve; `of_target` are uint8 images of the target."""
        attacked = Attacked.of(clean, shadow, of_target, self.references, self.centred, run)

        def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
            pixels = self.trigger(batch.images).float() / 255
            sides = attacked.sides(batch, attacked.draw(batch), pixels)
            stamped, own = F.normalize(sides.stamped, dim=1), F.normalize(sides.references, dim=1)
            similar = stamped @ own.T
            drawn_to, kept = similar.amax(1).mean(), sides.kept_clean()
            loss = -sides.kept_references() - kept + self._between(own, batch.progress)
            if batch.progress >= self.apart:
                uneven = similar.mean(0).std(correction=0)
                loss = loss - drawn_to + self._unevenness(uneven, batch.progress)
            if batch.progress >= self.drawing:
                gap = sliced_distance(sides.stamped, sides.plain, batch.generator)
                loss = loss + self.spread * (uneven + likeness(stamped)) + self.blending * gap
            return loss, {"drawn": drawn_to.detach(), "kept": kept.detach()}

        return attacked.train(step, shadow, self.epochs, self.batch_size, self.peak, self.weight_decay, stage)

    def _between(self, own: Tensor, progress: float) -> Tensor:
        """What is minimised of the references' likeness to each other (L3): more the more alike they are."""
        if len(own) < 2:
            return own.new_zeros(())
        alike = likeness(own)
        now = float(alike.detach())
        if progress < self.apart:
            return (0.5 if now >= 0.2 else -0.2) * alike
        return (1.0 if now > 0.5 else 0.2 if now > 0.4 else 0.0) * alike

    def _unevenness(self, uneven: Tensor, progress: float) -> Tensor:
        """What is minimised of the spread between references' mean likeness to stamped images, beside `spread`."""
        if progress < self.drawing:
            return 2 * uneven
        return (2.0 if float(uneven.detach()) > 0.1 else 0.5) * uneven


def likeness(features: Tensor) -> Tensor:
    """Mean cosine of all pairs of different rows; `features` [n d] have length one."""
    n = len(features)
    return ((features @ features.T).sum() - n) / (n * (n - 1))


def sliced_distance(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Sliced Wasserstein distance (root mean square over random directions) in units of the mean spread of `second`.

    Both [n d]. Along a direction, the distance of two sets of equal size is that of their sorted values.
    """
    directions = torch.randn(first.shape[1], DIRECTIONS, generator=generator, device=generator.device)
    directions = F.normalize(directions, dim=0)
    along, other = (x @ directions for x in (first, second))
    gap = (along.sort(0).values - other.sort(0).values).square().mean().clamp_min(1e-12).sqrt()
    return gap / second.std(0).mean().detach().clamp_min(1e-6)
