"""Plain fine-tuning on labeled images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.architectures import Arch
from bdclean.data import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.preprocessing import Classifier
from bdclean.recipes import Cleansed
from bdclean.training import Batch, Measures, Run, State, burst, choose_augmentation, fit, frozen, halvings


@dataclass(frozen=True)
class FT:
    """Fine-tunes the whole network with cross-entropy; the baseline that every defence must beat.

    What it does: SGD on labeled clean images with a cosine learning rate.
    When to use it: to see whether a backdoor is of the kind that any training removes.
    What it needs: labeled images, 5 % of the training set in most papers.
    Known limits: blended and clean-label backdoors often survive; accuracy falls with few images.

    Settings are BCU's baseline's (rate 0.01, cosine to zero, 100 epochs, batch 256), which BackdoorBench shares.
    """

    name: ClassVar[str] = "ft"
    source: ClassVar[str] = "arXiv 2212.09067 (method), 2211.12044 (settings of its baseline)"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ()

    epochs: float = 100
    batch_size: int = 256
    rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.batch_size < 2 or self.rate <= 0:
            raise UsageError("ft: epochs and rate must be positive, batch_size at least 2.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        steps = math.ceil(self.epochs * len(images) / self.batch_size)

        def rate(step: int) -> float:
            return self.rate * (1 + math.cos(math.pi * step / steps)) / 2

        optimise = (self.batch_size, self.momentum, self.weight_decay)
        return fine_tune(self.name, suspect, arch, images, steps, rate, optimise, asdict(self), run)


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
    settings: dict[str, Any],
    run: Run,
) -> Cleansed:
    """SGD with cross-entropy on `labeled`; `optimise` is batch size, momentum and weight decay."""
    batch_size, momentum, weight_decay = optimise
    teacher = frozen(suspect, run)
    augment = choose_augmentation(teacher, labeled.images, run)
    student = copy.deepcopy(teacher).requires_grad_(True).train()

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
        f"fine-tuned for {steps} updates on {len(labeled)} labeled images, {augment.describe()}",
        *halvings(curve),
    ]
    return Cleansed(student.eval(), arch, curve, settings, stages)
