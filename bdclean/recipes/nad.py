"""Neural attention distillation: the suspect learns to look where a fine-tuned copy of itself looks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.networks.taps import seeing
from bdclean.recipes.bcu import by_depth
from bdclean.recipes.finetuning import require_labels
from bdclean.recipes.recipe import Cleansed
from bdclean.training.loop import Batch, Measures, State, burst, fit, halvings, updates
from bdclean.training.map_losses import attention
from bdclean.training.run import Run
from bdclean.training.students import Augmentation, Curve, choose_augmentation, frozen, keep_trained
from bdclean.training.supervised import train_classifier


@dataclass(frozen=True)
class NAD:
    """Neural attention distillation (Li, Lyu, Koren, Lyu, Li, Ma, ICLR 2021, arXiv 2101.05930).

    What it does: fine-tunes a copy of the suspect as a teacher; then fine-tunes the suspect with cross-entropy while
    the attention of its stages is drawn to the teacher's.
    When to use it: with labeled images, against patches; to compare.
    What it needs: labeled images, 5 % of the training set in the paper.
    Known limits: what fine-tuning leaves in the teacher, blended backdoors above all, it teaches. The first rate is
    high: with few images accuracy falls.

    Settings are the authors' code's (batch 64, rate 0.1 for two epochs, then 0.01; decay 1e-4, Nesterov; 20 epochs) and
    paper's (a teacher of 10 epochs); the code's weights of attention change with its versions: these are those of
    BackdoorBench and backdoor-toolbox for networks of three stages. Departures: the teacher is trained at the same
    rates; other numbers of stages take weights at the same relative depth; the last step counts.
    """

    name: ClassVar[str] = "nad"
    source: ClassVar[str] = "arXiv 2101.05930"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    teacher_epochs: float = 10
    epochs: float = 20
    batch_size: int = 64
    rate: float = 0.1
    later_rate: float = 0.01
    high_epochs: float = 2  # at the first rate, of teacher and student each
    weights: tuple[float, ...] = (500.0, 1000.0, 1000.0)  # of attention, from the first stage to the last
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        if min(self.teacher_epochs, self.epochs, self.rate, self.later_rate) <= 0 or self.batch_size < 2:
            raise UsageError("nad: epochs and rates must be positive, batch_size at least 2.")
        if self.momentum <= 0:
            raise UsageError("nad: momentum, which is Nesterov's, is positive.")
        if not self.weights or min(self.weights) < 0 or self.high_epochs < 0:
            raise UsageError("nad: weights and high_epochs are not negative, and there is a weight.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        student, teacher = frozen(suspect, run).requires_grad_(True), frozen(suspect, run)
        augment = choose_augmentation(teacher, images.images, run)
        stage, steps = "nad teacher", updates(self.teacher_epochs, len(images), self.batch_size)
        train = partial(
            train_classifier, teacher, images, augment, steps, partial(self._rate, len(images)), run, stage,
            batch_size=self.batch_size, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=True,
            most=burst(arch.classes),
        )  # fmt: skip
        keep_trained(teacher, stage, train, run)
        curve = self._distil(student, teacher.requires_grad_(False), arch, images, augment, run)
        stages = [
            f"teacher fine-tuned for {steps} updates on {len(images)} labeled images, {augment.describe()}",
            f"attention distilled for {int(curve[-1]['step'])} updates",
            *halvings(curve),
        ]
        return Cleansed(student.eval(), arch, curve, asdict(self), stages)

    def _rate(self, images: int, step: int) -> float:
        seen = step * min(self.batch_size, images)
        return self.rate if seen < self.high_epochs * images else self.later_rate

    def _distil(
        self,
        student: Classifier,
        teacher: Classifier,
        arch: Arch,
        images: ImageSet,
        augment: Augmentation,
        run: Run,
    ) -> Curve:
        """Trains `student` in place by its labels and the attention of `teacher`."""
        weights = dict(zip(arch.taps, by_depth(self.weights, 0.0, len(arch.taps) + 1), strict=False))
        student.train()
        optimiser = torch.optim.SGD(
            student.parameters(), self.rate, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=True
        )  # fmt: skip
        steps = updates(self.epochs, len(images), self.batch_size)
        # attention costs at most twice its weight
        state = State(
            self.name, student, optimiser, images.images, images.labels, self.batch_size, steps,
            partial(self._rate, len(images)), most=burst(arch.classes) + 2 * sum(weights.values()),
        )  # fmt: skip
        with seeing(student.network, arch) as ours, seeing(teacher.network, arch) as theirs:

            def step(batch: Batch) -> tuple[Tensor, Measures]:
                assert batch.labels is not None
                shown = augment(batch.images, batch.generator)
                with torch.no_grad():
                    run.forward(teacher, shown)
                logits = run.forward(student, shown).float()
                apart = sum(
                    weight * attention(*(run.whole(each.maps[tap], len(shown)) for each in (ours, theirs)))
                    for tap, weight in weights.items()
                )
                right = (logits.argmax(1) == batch.labels).float().mean()
                loss = F.cross_entropy(logits, batch.labels) + apart
                return loss, {"accuracy": right, "attention": torch.as_tensor(apart).detach()}

            return fit(step, state, run)
