"""Mode connectivity repair: a point on a curve of low loss between the suspect and a fine-tuned copy of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.finetuning import require_labels
from bdclean.recipes.recipe import Cleansed
from bdclean.training.loop import Batch, Measures, State, burst, fit, halvings, updates
from bdclean.training.run import Run
from bdclean.training.students import (
    Augmentation,
    Curve,
    choose_augmentation,
    cosine,
    frozen,
    keep_trained,
    set_batch_statistics,
    uncorrupted,
)
from bdclean.training.supervised import train_classifier

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class MCR:
    """Mode connectivity repair (Zhao, Chen, Das, Ramamurthy, Lin, ICLR 2020, arXiv 2005.00060).

    What it does: fine-tunes a copy of the suspect, learns a curve through weights of low loss from the one to the
    other, and takes a network from inside the curve.
    When to use it: to compare with it; with labeled images.
    What it needs: labeled images, 1,000 to 2,500 in the paper.
    Known limits: near the suspect the backdoor is whole, and near the copy what fine-tuning left of it; blended ones
    stay. `t` is not chosen by what triggers do, which is unknown.

    Settings of the curve are the authors' code's (quadratic Bezier curve, 100 epochs, batch 128, rate 0.01, decay 1e-4
    on the weights that were drawn); the copy's (10 epochs, rate 0.01) and `t` are BCU's, since the paper joins two
    suspects, of which a user has one. Departures: the copy's rate falls along a cosine; batch norm's statistics are
    those of the given images at `t`, cropped and mirrored like them in training.
    """

    name: ClassVar[str] = "mcr"
    source: ClassVar[str] = "arXiv 2005.00060 (method), 2211.12044 (settings of its baseline)"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ()

    t: float = 0.3  # place on the curve, from the suspect at 0 to its fine-tuned copy at 1
    end_epochs: float = 10  # of fine-tuning the copy
    end_rate: float = 0.01
    end_weight_decay: float = 5e-4
    epochs: float = 100  # of learning the curve
    batch_size: int = 128
    rate: float = 0.01  # for half of the steps; then it falls linearly to a hundredth of it at nine tenths
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise UsageError("mcr: t is a place in [0, 1].")
        if min(self.end_epochs, self.end_rate, self.epochs, self.rate) <= 0 or self.batch_size < 2:
            raise UsageError("mcr: epochs and rates must be positive, batch_size at least 2.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        start, end, student = (frozen(suspect, run) for _ in range(3))
        augment = choose_augmentation(start, images.images, run)
        stage, steps = "mcr end", updates(self.end_epochs, len(images), self.batch_size)
        train = partial(
            train_classifier, end, images, augment, steps, partial(cosine, steps=steps, peak=self.end_rate), run, stage,
            batch_size=self.batch_size, momentum=self.momentum, weight_decay=self.end_weight_decay,
            most=burst(arch.classes),
        )  # fmt: skip
        keep_trained(end, stage, train, run)
        ends = (
            {name: w.detach() for name, w in start.named_parameters()},
            {name: w.detach() for name, w in end.named_parameters()},
        )
        with torch.no_grad():
            for name, weight in student.named_parameters():
                weight.lerp_(ends[1][name], 0.5)  # the curve begins as a straight line
        curve = self._bend(student.requires_grad_(True), *ends, arch, images, augment, run)
        with torch.no_grad():
            taken = bezier(ends[0], dict(student.named_parameters()), ends[1], self.t)
            for name, weight in student.named_parameters():
                weight.copy_(taken[name])
        set_batch_statistics(student.eval(), partial(uncorrupted, images.images, augment, run))
        stages = [
            f"copy fine-tuned for {steps} updates on {len(images)} labeled images, {augment.describe()}",
            f"curve learnt in {int(curve[-1]['step'])} updates, taken at {self.t:g}",
            *halvings(curve),
        ]
        return Cleansed(student, arch, curve, asdict(self), stages)

    def _bend(
        self, middle: Classifier, start: Weights, end: Weights, arch: Arch, images: ImageSet, augment: Augmentation,
        run: Run,
    ) -> Curve:  # fmt: skip
        """Trains `middle` in place, the control point of the curve between two networks' weights, which stay."""
        steps = updates(self.epochs, len(images), self.batch_size)

        def rate(step: int) -> float:
            return self.rate * (1 - 0.99 * min(max((step / steps - 0.5) / 0.4, 0), 1))

        def step(batch: Batch) -> tuple[Tensor, Measures]:
            assert batch.labels is not None
            t = torch.rand((), generator=batch.generator, device=run.device)
            drawn = bezier(start, dict(middle.named_parameters()), end, t)
            shown = run.precision.layout(augment(batch.images, batch.generator))
            with run.precision.autocast(run.device):
                logits = functional_call(middle, drawn, (shown,)).float()
            right = (logits.argmax(1) == batch.labels).float().mean()
            size = torch.stack([weight.square().sum() for weight in drawn.values()]).sum()
            fitted = F.cross_entropy(logits, batch.labels)
            return fitted + self.weight_decay / 2 * size, {
                "accuracy": right,
                "cross_entropy": fitted.detach(),
            }

        optimiser = torch.optim.SGD(middle.train().parameters(), self.rate, momentum=self.momentum)
        largest = sum(
            max(float(a.square().sum()), float(end[name].square().sum())) for name, a in start.items()
        )
        state = State(
            self.name, middle, optimiser, images.images, images.labels, self.batch_size, steps, rate,
            most=burst(arch.classes) + self.weight_decay * largest,
        )  # fmt: skip
        return fit(step, state, run)


def bezier(start: Weights, middle: Weights, end: Weights, t: Tensor | float) -> dict[str, Tensor]:
    """The weights at `t` in [0, 1] of the quadratic Bezier curve from `start` to `end` with control point `middle`.

    (1 - t)^2 start + 2 t (1 - t) middle + t^2 end: `start` at 0, `end` at 1 (Garipov et al. 2018, arXiv 1802.10026).
    """
    return {
        name: (1 - t) ** 2 * first + 2 * t * (1 - t) * middle[name] + t**2 * end[name]
        for name, first in start.items()
    }
