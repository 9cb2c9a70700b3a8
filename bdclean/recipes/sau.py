"""Shared adversarial unlearning: unlearning adversarial examples that fool the student and the suspect alike."""

from __future__ import annotations

import copy
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
from bdclean.recipes.finetuning import require_labels
from bdclean.recipes.recipe import Cleansed
from bdclean.training.adversaries import Forward
from bdclean.training.loop import Batch, Measures, State, burst, fit, halvings, updates
from bdclean.training.run import Run
from bdclean.training.students import frozen

LEAST = 1e-8
"""Probabilities are at least that before their logarithm is taken."""
FADED = 0.001
"""A wrong class with a smaller probability is unlearnt: such an image gives no more gradient."""


@dataclass(frozen=True)
class SAU:
    """Shared adversarial unlearning (Wei, Zhang, Zha, Wu, NeurIPS 2023, arXiv 2307.10562).

    What it does: looks for a perturbation of each image that fools student and suspect into the same wrong class, which
    is where a trigger leads, and takes the suspect's wrong class away from the student on it.
    When to use it: to compare with the paper; the nearest to `inoculate` among those that need labels.
    What it needs: labeled images, 5 % of the training set in the paper.
    Known limits: about ten times the time of `ft`. The rate is low: with few images, and so few updates, little
    is unlearnt. Perturbations are additive, at most 0.2: triggers unlike that are met by chance.

    Settings are the authors' code's (BackdoorBench): images are not augmented, and batch norm keeps the suspect's
    statistics. Departures: batches are cut from one endless stream of shuffles. As in their code perturbed images may
    leave [0, 1], and the learning rate is constant, although its configuration names a cosine.
    """

    name: ClassVar[str] = "sau"
    source: ClassVar[str] = "arXiv 2307.10562"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    epochs: float = 100
    batch_size: int = 256
    rate: float = 1e-4  # of Adam
    budget: float = 0.2  # of a perturbation, in every pixel, of intensities in [0, 1]
    adversary_steps: int = 5
    adversary_rate: float = 0.2  # of each step, along the gradient's sign
    adversarial_weight: float = 0.01  # of fooling each network, in the search
    shared_weight: float = 1.0  # of fooling both alike, in the search
    clean_weight: float = 1.0
    unlearning_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.batch_size < 2 or self.rate <= 0 or self.adversary_rate <= 0:
            raise UsageError("sau: epochs and rates must be positive, batch_size at least 2.")
        weights = (self.adversarial_weight, self.shared_weight, self.clean_weight, self.unlearning_weight)
        if not 0 < self.budget <= 1 or self.adversary_steps < 1 or min(weights) < 0:
            raise UsageError(
                "sau: budget lies in (0, 1], adversary_steps is at least 1, weights not negative."
            )

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        teacher = frozen(suspect, run)
        student = copy.deepcopy(teacher).requires_grad_(True)
        ours, theirs = partial(run.forward, student), partial(run.forward, teacher)

        def step(batch: Batch) -> tuple[Tensor, Measures]:
            pixels, labels = batch.images.float() / 255, batch.labels
            assert labels is not None
            perturbed = pixels + self.perturbation(ours, theirs, pixels, labels)
            clean, fooled = ours(torch.cat([pixels, perturbed])).float().chunk(2)
            with torch.no_grad():
                plain, led = theirs(torch.cat([pixels, perturbed])).float().argmax(1).chunk(2)
            loss = self.clean_weight * F.cross_entropy(clean, labels)
            loss = loss + self.unlearning_weight * unlearning_loss(
                fooled, led, (led != labels) & (led != plain)
            )
            shared = ((fooled.argmax(1) == led) & (led != labels)).float().mean()
            return loss, {"shared": shared, "accuracy": (clean.argmax(1) == labels).float().mean()}

        optimiser = torch.optim.Adam(student.parameters(), self.rate)
        steps = updates(self.epochs, len(images), self.batch_size)
        state = State(
            self.name, student, optimiser, images.images, images.labels, self.batch_size, steps,
            lambda step: self.rate, most=burst(arch.classes),
        )  # fmt: skip
        curve = fit(step, state, run)
        stages = [
            f"unlearnt shared adversarial examples for {steps} updates on {len(images)} labeled images",
            *halvings(curve),
        ]
        return Cleansed(student.eval(), arch, curve, asdict(self), stages)

    def perturbation(self, ours: Forward, theirs: Forward, pixels: Tensor, labels: Tensor) -> Tensor:
        """What, added to `pixels` [n c h w], leads both networks to the same wrong class; within the budget.

        Sign steps from the largest perturbation down the paper's loss: each network is to be wrong on its own clean
        answer, and both are to give the same distribution (Jensen-Shannon). Images that got there stay as they are.
        """
        with torch.no_grad():
            answers = [forward(pixels).argmax(1) for forward in (ours, theirs)]
        found = torch.full_like(pixels, self.budget)
        for _ in range(self.adversary_steps):
            found.requires_grad_(True)
            both = [forward(pixels + found).float() for forward in (ours, theirs)]
            wrong = [logits.argmax(1) != answer for logits, answer in zip(both, answers, strict=True)]
            shared = wrong[0] & wrong[1] & (both[0].argmax(1) == both[1].argmax(1))
            right = [
                F.cross_entropy(logits, labels, reduction="none")[~gone].sum() / 2
                for logits, gone in zip(both, wrong, strict=True)
            ]
            apart = jensen_shannon(both[0], both[1])[~shared].sum()
            loss = self.shared_weight * apart - self.adversarial_weight * (right[0] + right[1])
            (slope,) = torch.autograd.grad(loss, found)
            found = (found.detach() - self.adversary_rate * slope.sign()).clamp(-self.budget, self.budget)
        return found


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the distributions of two rows of logits [n classes]: [n], in [0, log 2] nats."""
    p, q = (logits.softmax(1).clamp_min(LEAST) for logits in (first, second))
    middle = (p + q) / 2
    return ((p * (p / middle).log() + q * (q / middle).log()) / 2).sum(1)


def unlearning_loss(logits: Tensor, led: Tensor, counted: Tensor) -> Tensor:
    """Mean over all n images of -log(1 - p), p the probability of class `led` [n]; only `counted` ones add to it.

    The authors' stable form: the mean of two logarithms, of the other classes' sum and of 1 - p, whose arguments are
    bounded so that no image counts any more when p is below FADED.
    """
    p = logits.softmax(1)
    one_hot = F.one_hot(led, p.shape[1])
    others, lost = (p * (1 - one_hot)).sum(1)[counted], (p * one_hot).sum(1)[counted]
    logs = (1e-6 + others.clamp_max(1 - FADED)).log() + (1 + 1e-6 - lost.clamp_min(FADED)).log()
    return -logs.sum() / 2 / len(logits)
