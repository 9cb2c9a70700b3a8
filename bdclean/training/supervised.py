"""Training a classifier on labeled images, as victims and sample models are made, and fine-tuning one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.networks.classifier import Classifier
from bdclean.training.loop import Batch, Measures, State, fit, updates
from bdclean.training.run import Run
from bdclean.training.students import Augmentation, Curve, choose_augmentation, one_cycle

Poison = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""What an attack makes of an augmented batch: of uint8 images [n c h w], labels [n] and a seeded generator it makes
images, uint8 or float in [0, 1], and labels."""


@dataclass(frozen=True)
class Supervised:
    """SGD with Nesterov momentum and a one-cycle learning rate (Smith and Topin 2017): a quarter up, cosine down.

    Victims are trained with random crops, and with mirroring where `mirrored`: a backdoor learnt without augmentation
    falls to plain fine-tuning and says little about a defence.
    """

    epochs: float = 14
    batch_size: int = 128
    peak: float = 0.2
    weight_decay: float = 5e-4
    padding: int = 4
    mirrored: bool = True

    def __call__(
        self,
        model: Classifier,
        training: ImageSet,
        run: Run,
        stage: str = "train",
        poison: Poison | None = None,
    ) -> Curve:
        """Train `model` in place, leave it in evaluation mode, and return the curve."""
        if training.labels is None:
            raise ValueError("training a classifier needs labels")
        steps = self.steps(len(training))
        return train_classifier(
            model, training, Augmentation(self.padding, self.mirrored), steps,
            partial(one_cycle, steps=steps, peak=self.peak), run, stage, batch_size=self.batch_size,
            weight_decay=self.weight_decay, nesterov=True, poison=poison,
        )  # fmt: skip

    def steps(self, images: int) -> int:
        """How many batches training on so many images takes."""
        return updates(self.epochs, images, self.batch_size)


def train_classifier(
    model: Classifier, labeled: ImageSet, augment: Augmentation, steps: int, rate: Callable[[int], float], run: Run,
    stage: str, *, batch_size: int, momentum: float = 0.9, weight_decay: float = 5e-4, nesterov: bool = False,
    most: float = math.inf, poison: Poison | None = None,
) -> Curve:  # fmt: skip
    """Trains all of `model` in place by SGD with cross-entropy, leaves it in evaluation mode, returns the curve.

    `rate` maps a step to a learning rate; `most` is that of `State`.
    """
    model.to(run.device).requires_grad_(True).train()
    if run.precision.channels_last:
        model.to(memory_format=torch.channels_last)

    def step(batch: Batch) -> tuple[Tensor, Measures]:
        images, labels = augment(batch.images, batch.generator), batch.labels
        assert labels is not None
        if poison is not None:
            images, labels = poison(images, labels, batch.generator)
        logits = run.forward(model, images).float()
        right = (logits.argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": right}

    optimiser = torch.optim.SGD(
        model.parameters(), rate(0), momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
    )
    state = State(stage, model, optimiser, labeled.images, labeled.labels, batch_size, steps, rate, most=most)
    curve = fit(step, state, run)
    model.eval()
    return curve


def fine_tune(
    model: Classifier,
    labeled: ImageSet,
    run: Run,
    stage: str,
    epochs: float = 20,
    batch_size: int = 128,
    rate: float = 0.01,
) -> Curve:
    """Fine-tunes all of `model` in place, with the augmentation that it does not mind, and returns the curve.

    Rate, momentum and decay are those of BCU's plain fine-tuning (2211.12044), which BackdoorBench shares. Departures:
    see `Supervised`; batches of 128 for 256, and 20 epochs for 100, unless told otherwise.
    """
    augment = choose_augmentation(model, labeled.images, run)
    tune = Supervised(epochs, batch_size, rate, padding=augment.padding, mirrored=augment.mirrored)
    return tune(model, labeled, run, stage)
