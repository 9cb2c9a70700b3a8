"""BYOL: one view predicts what a slow copy makes of the other (Grill et al. 2020, arXiv 2006.07733)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdclean.data.imageset import ImageSet
from bdclean.networks.classifier import Classifier
from bdclean.training.loop import Batch
from bdclean.training.losses import cosine
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.pretraining.learning import (
    Course,
    Pretrained,
    Projected,
    follow,
    mlp,
    ready,
    slots,
    slow_copy,
    width,
)
from bdclean.training.run import Run


class _Predicting(nn.Module):
    """Projections and what is predicted from them: what BYOL trains."""

    def __init__(self, online: Projected, predictor: nn.Module) -> None:
        super().__init__()
        self.online = online
        self.predictor = predictor

    def forward(self, images: Tensor) -> Tensor:
        return self.predictor(self.online(images))


@dataclass(frozen=True)
class BYOL:
    """Trains an encoder without negatives: each view predicts the slow copy's projection of the other.

    Momentum rises from `momentum` to 1 along a cosine, as in the paper, whose start of 0.996 is for its 1000 epochs.
    The paper's hidden layers are 4096 for 2048 features; here they have `hidden` times the features. Departures: Adam
    for LARS (see `Course`), and one kind of view for both sides.
    """

    epochs: float = 15
    batch_size: int = 256
    peak: float = 3e-3
    weight_decay: float = 1e-6
    momentum: float = 0.98  # of the slow copy at the start
    hidden: int = 2  # width of hidden layers as a multiple of the features
    projected: int = 128
    views: Views = Views()

    def __call__(
        self, encoder: Classifier, training: ImageSet, run: Run, stage: str = "pretrain"
    ) -> Pretrained:
        """Train `encoder` in place and leave it in evaluation mode."""
        inside = width(encoder, training.images)
        hidden = self.hidden * inside
        online = Projected(encoder, mlp(inside, hidden, self.projected, run, stage, "projector"))
        model = _Predicting(online, mlp(self.projected, hidden, self.projected, run, stage, "predictor"))
        ready(model, run)
        slow = slow_copy(online)

        def step(batch: Batch) -> tuple[Tensor, dict[str, float]]:
            follow(slow, online, 1 - (1 - self.momentum) * (1 + math.cos(math.pi * batch.progress)) / 2)
            views = [self.views(batch.images, batch.generator) for _ in range(2)]
            predicted = [run.forward(model, view) for view in views]
            with torch.no_grad():
                wanted = [run.forward(slow, view) for view in views]
            agreement = cosine(predicted[0], wanted[1]) + cosine(predicted[1], wanted[0])
            return 4 - 2 * agreement, {}

        course = Course(self.epochs, self.batch_size, self.peak, self.weight_decay)
        return Pretrained(course(step, model, training, run, stage, slots("slow", slow)), online.projector)
