"""Logit-margin repulsion: the suspected target class is held below the others, and the head's part in it cut off."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from bdclean.training.head_shift import head_of
from bdclean.training.loop import Batch, Measures, State, burst, fit, halvings
from bdclean.training.run import Run
from bdclean.training.students import choose_augmentation, frozen, keep_trained

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits [n classes] and labels [n]."""


@dataclass(frozen=True)
class LMR:
    """Logit-margin repulsion (Yang, Xu, Zhong, Pi, Huang, Ruan, CVPR 2026).

    What it does: a copy of the suspect unlearns the clean images; the class that it still gives is taken for the
    target. The suspect is tuned so that this class stays below the others by a margin on images of other classes, the
    inputs of the head whose weight for this class moved most are cut off, and the rest is tuned to get the class back.
    When to use it: with very few labeled images, 1 % of the training set in the paper, and one target class.
    What it needs: labeled images; labels only enter cross-entropies.
    Known limits: one target class, which is always found, also in a network without a backdoor, and of two classes
    hardly by more than chance. Backdoors with several targets are not met. Far from the paper's figures with the
    settings that are ours (see below).

    Known of the paper is a summary: the losses, their margins and weights, and the three phases are its; optimiser,
    rates, lengths of the phases and the pruned share are not known, and are ours. Departures: images are augmented;
    while clean images are unlearnt each class counts alike, and batch norm keeps the suspect's statistics; the second
    phase ends after its steps, not when accuracy on the class is lost.
    """

    name: ClassVar[str] = "lmr"
    source: ClassVar[str] = "Logit-Margin Repulsion for Backdoor Defense, CVPR 2026"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ()

    batch_size: int = 128
    unlearning_steps: int = 40
    unlearning_rate: float = 0.01
    repulsion_steps: int = 200
    recovery_steps: int = 100
    rate: float = 0.01
    momentum: float = 0.9
    margin: float = 3.0  # of logits, by which the target class stays below the largest other one
    repulsion_weight: float = 1.0
    own_margin: float = 0.5  # by which an image's own class stays above the largest other one
    own_weight: float = 0.25
    pruned: float = 0.1  # share of the head's inputs that is cut off

    def __post_init__(self) -> None:
        steps = (self.unlearning_steps, self.repulsion_steps, self.recovery_steps)
        if min(steps) < 1 or self.batch_size < 2 or min(self.rate, self.unlearning_rate) <= 0:
            raise UsageError("lmr: steps are at least 1, batch_size at least 2, rates positive.")
        weights = (self.margin, self.repulsion_weight, self.own_margin, self.own_weight)
        if not 0 <= self.pruned < 1 or min(weights) < 0:
            raise UsageError("lmr: pruned lies in [0, 1), margins and weights are not negative.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        teacher = frozen(suspect, run)
        student = copy.deepcopy(teacher).requires_grad_(True)
        _, weight = head_of(student, arch, self.name)
        before = weight.detach().clone()
        target, lead = self.target_class(teacher, images, run)
        augment = choose_augmentation(teacher, images.images, run)

        def repel(logits: Tensor, labels: Tensor) -> Tensor:
            return self.repulsion_loss(logits, labels, target)

        def phase(stage: str, loss: Loss, steps: int, dead: Tensor | None = None) -> list[dict[str, float]]:
            """Tune the student for so many steps, while the inputs `dead` of the head stay cut off."""
            student.train()

            def step(batch: Batch) -> tuple[Tensor, Measures]:
                logits = run.forward(student, augment(batch.images, batch.generator)).float()
                assert batch.labels is not None
                right = (logits.argmax(1) == batch.labels).float().mean()
                return loss(logits, batch.labels), {"accuracy": right}

            optimiser = torch.optim.SGD(student.parameters(), self.rate, momentum=self.momentum)
            if dead is not None:
                cut(weight, dead)
                optimiser.register_step_post_hook(lambda *_: cut(weight, dead))
            state = State(
                stage, student, optimiser, images.images, images.labels, self.batch_size, steps,
                lambda step: self.rate, most=burst(arch.classes),
            )  # fmt: skip
            return fit(step, state, run)

        curve = keep_trained(
            student, "lmr-repel", lambda: phase("lmr-repel", repel, self.repulsion_steps), run
        )
        dead = most_moved(before, weight.detach(), target, self.pruned)
        recovered = phase(self.name, F.cross_entropy, self.recovery_steps, dead)
        stages = [
            f"class {target} taken for the target: {lead:.1f} nats more likely than any other after unlearning",
            f"held it {self.margin:g} below the others for {self.repulsion_steps} updates on {len(images)} labeled "
            f"images, {augment.describe()}",
            f"cut off {len(dead)} of the head's {weight.shape[1]} inputs, then tuned for {self.recovery_steps} updates",
            *halvings([*curve, *recovered]),
        ]
        return Cleansed(student.eval(), arch, recovered, asdict(self), stages)

    def target_class(self, teacher: Classifier, images: ImageSet, run: Run) -> tuple[int, float]:
        """The class that a copy of `teacher` still gives when it has unlearnt `images`, and its lead.

        The lead is by how many nats its mean log-probability is above the next one's. Unlearning ascends the
        cross-entropy until accuracy on a batch is little above chance (`forgotten`): what comes after bursts it.
        Each class counts alike: else it is the rarest that is left.
        """
        copied = copy.deepcopy(teacher).requires_grad_(True)
        finished = torch.zeros((), dtype=torch.bool, device=run.device)
        assert images.labels is not None
        sizes = images.labels.bincount().clamp_min(1).float()
        alike = (len(images) / (sizes * len(images.labels.unique()))).to(run.device)

        def step(batch: Batch) -> tuple[Tensor | None, Measures]:
            assert batch.labels is not None
            logits = run.forward(copied, batch.images.float() / 255).float()
            lost = F.cross_entropy(logits, batch.labels, reduction="none")
            loss = -(alike[batch.labels] * lost).mean()
            right = (logits.argmax(1) == batch.labels).float().mean()
            finished.logical_or_(right <= forgotten(logits.shape[1]))
            return (None if finished else loss), {"loss": loss.detach(), "accuracy": right}

        optimiser = torch.optim.SGD(copied.parameters(), self.unlearning_rate, momentum=self.momentum)
        state = State(
            "lmr-unlearn", copied, optimiser, images.images, images.labels, self.batch_size, self.unlearning_steps,
            lambda step: self.unlearning_rate, extra={"finished": finished},
        )  # fmt: skip
        keep_trained(copied, "lmr-unlearn", lambda: fit(step, state, run), run)
        with torch.no_grad():
            parts = [run.forward(copied, part.to(run.device)).float() for part in images.images.split(256)]
            scores = torch.cat(parts).log_softmax(1).mean(0)
        first, second = scores.topk(2)[0].tolist()
        return int(scores.argmax()), first - second

    def repulsion_loss(self, logits: Tensor, labels: Tensor, target: int) -> Tensor:
        """The paper's loss of its first phase, of logits [n classes]: cross-entropy, the target's margin, each own one.

        The first two leave out images of the class `target`.
        """
        others = labels != target
        cross = F.cross_entropy(logits, labels, reduction="none") * others
        without = logits.masked_fill(
            F.one_hot(torch.full_like(labels, target), logits.shape[1]).bool(), -math.inf
        )
        repelled = F.relu(logits[:, target] - without.amax(1) + self.margin) * others
        own = F.one_hot(labels, logits.shape[1]).bool()
        ahead = F.relu(logits.masked_fill(own, -math.inf).amax(1) - logits[own] + self.own_margin)
        return (cross + self.repulsion_weight * repelled + self.own_weight * ahead).mean()


def forgotten(classes: int) -> float:
    """The accuracy on a batch at which `classes` count as unlearnt: twice chance, of two classes half way to it."""
    return min(2 / classes, (1 + 1 / classes) / 2)


def most_moved(before: Tensor, after: Tensor, target: int, share: float) -> Tensor:
    """Which inputs of a head with weight [classes inputs ...] moved most for the class `target`: a `share` of them."""
    moved = (after - before)[target].abs().reshape(after.shape[1], -1).sum(1)
    return moved.topk(int(share * len(moved))).indices


def cut(weight: Tensor, inputs: Tensor) -> None:
    """Set the columns `inputs` of a head's weight to 0, in place."""
    weight.data[:, inputs] = 0
