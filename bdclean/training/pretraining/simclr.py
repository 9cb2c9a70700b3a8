"""SimCLR: two views of an image must find each other (Chen, Kornblith, Norouzi, Hinton 2020, arXiv 2002.05709)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdclean.data.imageset import ImageSet
from bdclean.networks.classifier import Classifier
from bdclean.training.loop import Batch
from bdclean.training.losses import nt_xent
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.pretraining.learning import Course, Pretrained, Projected, mlp, width
from bdclean.training.run import Run


@dataclass(frozen=True)
class SimCLR:
    """Trains an encoder so that each view finds its partner in the batch.

    Defaults are BadEncoder's (Adam, weight decay 1e-6, batch 256, temperature 0.5, projector 512-128 behind 512
    features), but for the learning rate, one cycle to 3e-3 in place of 1e-3 throughout, and 15 epochs for its 1000.
    """

    epochs: float = 15
    batch_size: int = 256
    peak: float = 3e-3
    weight_decay: float = 1e-6
    temperature: float = 0.5
    projected: int = 128
    views: Views = Views()

    def __call__(
        self, encoder: Classifier, training: ImageSet, run: Run, stage: str = "pretrain"
    ) -> Pretrained:
        """Train `encoder` in place and leave it in evaluation mode."""
        inside = width(encoder, training.images)
        model = Projected(encoder, mlp(inside, inside, self.projected, run, stage, "projector"))

        def step(batch: Batch) -> tuple[Tensor, dict[str, float]]:
            views = torch.cat([self.views(batch.images, batch.generator) for _ in range(2)])
            first, second = run.forward(model, views).chunk(2)
            return nt_xent(first, second, self.temperature), {}

        course = Course(self.epochs, self.batch_size, self.peak, self.weight_decay)
        return Pretrained(course(step, model, training, run, stage), model.projector)
