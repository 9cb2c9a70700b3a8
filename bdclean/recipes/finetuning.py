"""Fine-tuning, for the recipes that need labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.training.loop import Batch, Measures, State, burst, fit, halvings, updates
from bdclean.training.run import Run
from bdclean.training.students import Curve, choose_augmentation, cosine, frozen, void
from bdclean.training.supervised import train_classifier

Start = Literal["suspect", "void"]
"""What is trained: the suspect, or for comparison a network of its architecture with weights drawn anew."""
KNOWN, ASKED = 1.5, 512
"""A suspect whose answers tell something of the labels is right so many times as often as the commonest label would
be; asked of so many images."""


def require_labels(labeled: ImageSet | None, name: str) -> ImageSet:
    """`labeled`, which has labels; raises Refused for the recipe called `name` where it has none."""
    if labeled is None or labeled.labels is None:
        raise Refused(
            f"{name} needs labels: put images in one folder per class, let the suspect's answers serve with "
            "--pseudo-labels, or use --recipe bcu."
        )
    return labeled


def fine_tune(
    name: str,
    suspect: Classifier,
    arch: Arch,
    labeled: ImageSet,
    steps: int,
    rate: Callable[[int], float],
    optimise: tuple[int, float, float],
    start: Start,
    settings: dict[str, Any],
    run: Run,
) -> Cleansed:
    """SGD with cross-entropy on `labeled`; `optimise` is batch size, momentum and weight decay.

    Whatever it starts from, images are augmented as the suspect allows, so that results compare. One that does not know
    these labels, as under a head drawn anew, cannot say whether mirrored images are the same: they are not mirrored.
    """
    batch_size, momentum, weight_decay = optimise
    teacher = frozen(suspect, run)
    augment = choose_augmentation(teacher, labeled.images, run)
    if augment.mirrored and not _knows(teacher, labeled, run):
        augment = replace(augment, mirrored=False)
    student = copy.deepcopy(teacher) if start == "suspect" else frozen(void(suspect, arch, run), run)
    curve = train_classifier(
        student, labeled, augment, steps, rate, run, name, batch_size=batch_size, momentum=momentum,
        weight_decay=weight_decay, most=burst(arch.classes),
    )  # fmt: skip
    stages = [
        f"{'fine-tuned' if start == 'suspect' else 'trained from scratch'} for {steps} updates on {len(labeled)} "
        f"labeled images, {augment.describe()}",
        *halvings(curve),
    ]
    return Cleansed(student, arch, curve, settings, stages)


def _knows(suspect: Classifier, labeled: ImageSet, run: Run) -> bool:
    """Whether `suspect` is right on KNOWN times as many of up to ASKED images as the largest class has."""
    assert labeled.labels is not None
    drawn = torch.randperm(len(labeled), generator=torch.Generator().manual_seed(run.seed))[:ASKED]
    labels = labeled.labels[drawn].cpu()
    right = (run.answers(suspect, labeled.images[drawn]).cpu() == labels).float().mean()
    return float(right) >= KNOWN * float(labels.bincount().max()) / len(labels)


class Tuning(Protocol):
    """Settings of a recipe that fine-tunes by SGD along a cosine, with a loss of its own."""

    name: ClassVar[str]

    @property
    def epochs(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


def sgd(tuning: Tuning, student: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(
        student.parameters(), tuning.rate, momentum=tuning.momentum, weight_decay=tuning.weight_decay
    )


def tune(
    tuning: Tuning, student: nn.Module, optimiser: torch.optim.Optimizer, labeled: ImageSet,
    step: Callable[[Batch], tuple[Tensor, Measures]], run: Run, most: float,
) -> tuple[int, Curve]:  # fmt: skip
    """Trains `student` on `labeled` as `tuning` says; returns how many updates, and the curve. `most`: see `State`."""
    steps = updates(tuning.epochs, len(labeled), tuning.batch_size)
    rate = partial(cosine, steps=steps, peak=tuning.rate)
    state = State(
        tuning.name, student, optimiser, labeled.images, labeled.labels, tuning.batch_size, steps, rate, most=most
    )  # fmt: skip
    return steps, fit(step, state, run)
