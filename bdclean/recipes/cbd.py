"""Contrastive backdoor defence: images whose features lose their own picture, found and unlearnt, without labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from bdclean.networks.taps import Seen, seeing
from bdclean.recipes.finetuning import sgd, tune
from bdclean.recipes.recipe import Cleansed
from bdclean.training.encoder_lesson import mean_feature
from bdclean.training.loop import Batch, Measures, burst, halvings
from bdclean.training.losses import distillation_kl, nt_xent
from bdclean.training.run import Run
from bdclean.training.students import choose_augmentation, frozen, set_batch_statistics, uncorrupted

Features = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Float images in [0, 1], [n c h w], to features [n d], float32, and what the network answers."""


@dataclass(frozen=True)
class CBD:
    """Contrastive backdoor defence ("Do we really need labels for backdoor defense?", OpenReview 0Hfv9xPBSPQ, 2022).

    What it does: adds to each image what makes its features find the picture least among a batch (adversarial examples
    of a contrastive loss, which the authors found to resemble stamped images), and tunes the network so that they find
    it again, while clean images keep the suspect's answers, or an encoder's features.
    When to use it: to compare: of what is published it is nearest to `inoculate`.
    What it needs: unlabeled images of the network's kind.
    Known limits: small changes all over an image are not what patches are made of.

    Of the paper the abstract alone was at hand, and no code: losses' forms, bounds, steps and rates are ours. The
    network's own answers are kept here since its head stays, where the authors cleanse a backbone whose head is trained
    afterwards.
    """

    name: ClassVar[str] = "cbd"
    source: ClassVar[str] = "OpenReview 0Hfv9xPBSPQ (abstract)"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    epochs: float = 20
    batch_size: int = 128
    rate: float = 0.01  # cosine to zero
    momentum: float = 0.9
    weight_decay: float = 5e-4
    budget: float = 8 / 255  # the most that a pixel changes
    adversary_steps: int = 5
    temperature: float = 0.5  # of the contrastive loss
    contrast: float = 1.0  # weight of finding the picture again
    keep: float = 1.0  # weight of the suspect's answers, or features, on clean images

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.batch_size < 2 or self.rate <= 0 or not 0 <= self.momentum < 1:
            raise UsageError("cbd: epochs and rate are positive, batch_size at least 2, momentum in [0, 1).")
        if not 0 < self.budget <= 1 or self.adversary_steps < 1 or self.temperature <= 0:
            raise UsageError("cbd: budget is in (0, 1], adversary_steps at least 1, temperature positive.")
        if min(self.contrast, self.keep) < 0:
            raise UsageError("cbd: no weight is negative.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        teacher = frozen(suspect, run)
        student = copy.deepcopy(teacher).requires_grad_(True)
        augment = choose_augmentation(teacher, unlabeled.images, run)
        encoder = arch.kind == "encoder"
        centre = mean_feature(teacher, unlabeled.images, run) if encoder else None

        with seeing(teacher.network, arch) as theirs, seeing(student.network, arch) as ours:
            asked, answering = _asking(teacher, theirs, run), _asking(student, ours, run)

            def step(batch: Batch) -> tuple[Tensor, Measures]:
                pixels = augment(batch.images, batch.generator).float() / 255
                with torch.no_grad():
                    anchors, answers = asked(pixels)
                student.eval()
                found = self.perturbation(answering, pixels, batch.generator)
                student.train()
                features, said = answering(torch.cat([pixels, pixels + found]))
                clean, fooled = features.chunk(2)
                lost = nt_xent(fooled, anchors, self.temperature)
                kept = _drift(clean, anchors, centre) if centre is not None else distillation_kl(
                    said[: len(pixels)], answers
                )  # fmt: skip
                return self.contrast * lost + self.keep * kept, {
                    "lost": lost.detach(),
                    "drift": kept.detach(),
                }

            most = burst(arch.classes) if arch.classes else float("inf")
            steps, curve = tune(self, student, sgd(self, student), unlabeled, step, run, most)
        set_batch_statistics(student.eval(), partial(uncorrupted, unlabeled.images, augment, run))
        stages = [
            f"unlearnt contrastive adversarial examples for {steps} updates on {len(unlabeled)} images, "
            f"{augment.describe()}",
            *halvings(curve),
        ]
        return Cleansed(student, arch, curve, asdict(self), stages)

    def perturbation(self, answering: Features, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """What, added to each of `pixels` [n c h w] in [0, 1], makes its features find the picture least.

        Sign steps of a quarter of the budget up the contrastive loss, from a random start within the budget.
        """
        with torch.no_grad():
            anchors, _ = answering(pixels)
        found = torch.empty_like(pixels).uniform_(-self.budget, self.budget, generator=generator)
        for _ in range(self.adversary_steps):
            found.requires_grad_(True)
            features, _ = answering(pixels + found)
            (slope,) = torch.autograd.grad(nt_xent(features, anchors, self.temperature), found)
            found = (found.detach() + self.budget / 4 * slope.sign()).clamp(-self.budget, self.budget)
            found = (pixels + found).clamp(0, 1) - pixels
        return found


def _asking(model: Classifier, seen: Seen, run: Run) -> Features:
    """A pass of `model`, which leaves what it sees in `seen`; an encoder's answers are its features."""

    def ask(pixels: Tensor) -> tuple[Tensor, Tensor]:
        answers = run.forward(model, pixels)
        features = answers if seen.features is None else run.whole(seen.features, len(pixels))
        return features.float(), answers.float()

    return ask


def _drift(features: Tensor, anchors: Tensor, centre: Tensor) -> Tensor:
    """One less the mean cosine of features and those that are to be kept, both [n d], without the mean `centre` [d]."""
    now, before = (F.normalize(each, dim=1) - centre for each in (features, anchors))
    return 1 - F.cosine_similarity(now, before, dim=1).mean()
