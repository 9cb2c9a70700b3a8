"""Fine-tuning, for the recipes that need labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.training.loop import Batch, Measures, State, burst, fit, halvings
from bdclean.training.run import Run
from bdclean.training.students import choose_augmentation, frozen, void

Start = Literal["suspect", "void"]
"""What is trained: the suspect, or for comparison a network of its architecture with weights drawn anew."""


def require_labels(labeled: ImageSet | None, name: str) -> ImageSet:
    if labeled is None or labeled.labels is None:
        raise Refused(f"{name} needs labels: put images in one folder per class, or use --recipe bcu.")
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

    Whatever it starts from, images are augmented as the suspect allows, so that results compare.
    """
    batch_size, momentum, weight_decay = optimise
    teacher = frozen(suspect, run)
    augment = choose_augmentation(teacher, labeled.images, run)
    student = copy.deepcopy(teacher) if start == "suspect" else frozen(void(suspect, arch, run), run)
    student.requires_grad_(True).train()

    def step(batch: Batch) -> tuple[Tensor, Measures]:
        with run.precision.autocast(run.device):
            logits = student(run.precision.layout(augment(batch.images, batch.generator))).float()
        assert batch.labels is not None
        right = (logits.argmax(1) == batch.labels).float().mean()
        return F.cross_entropy(logits, batch.labels), {"accuracy": right}

    optimiser = torch.optim.SGD(student.parameters(), rate(0), momentum=momentum, weight_decay=weight_decay)
    curve = fit(
        step,
        State(
            name,
            student,
            optimiser,
            labeled.images,
            labeled.labels,
            batch_size,
            steps,
            rate,
            most=burst(arch.classes),
        ),
        run,
    )
    stages = [
        f"{'fine-tuned' if start == 'suspect' else 'trained from scratch'} for {steps} updates on {len(labeled)} "
        f"labeled images, {augment.describe()}",
        *halvings(curve),
    ]
    return Cleansed(student.eval(), arch, curve, settings, stages)
