"""Fine-tuning, for the recipes that need labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.training.loop import burst, halvings
from bdclean.training.run import Run
from bdclean.training.students import choose_augmentation, frozen, void
from bdclean.training.supervised import train_classifier

Start = Literal["suspect", "void"]
"""What is trained: the suspect, or for comparison a network of its architecture with weights drawn anew."""


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

    Whatever it starts from, images are augmented as the suspect allows, so that results compare.
    """
    batch_size, momentum, weight_decay = optimise
    teacher = frozen(suspect, run)
    augment = choose_augmentation(teacher, labeled.images, run)
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
