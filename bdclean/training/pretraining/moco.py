"""MoCo v2: a view must find its partner among those of many batches before (He et al. 2019, 1911.05722; 2003.04297)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.networks.classifier import Classifier
from bdclean.training.loop import Batch
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


@dataclass(frozen=True)
class MoCo:
    """Trains an encoder whose slow copy fills a queue of keys.

    Temperature 0.2 is the authors'; the queue is 4,096 keys for their 65,536, since
    the small sets pre-trained on here have fewer images. Departures: Adam for SGD (see `Course`), and no shuffling of
    batch norms, which on one device has nothing to shuffle between: a key's batch norm sees its query's images.
    """

    epochs: float = 15
    batch_size: int = 256
    peak: float = 3e-3
    weight_decay: float = 1e-6
    temperature: float = 0.2
    momentum: float = 0.99  # of the slow copy; the authors' 0.999 needs their hundreds of epochs
    queue: int = 4096
    projected: int = 128
    views: Views = Views()

    def __call__(
        self, encoder: Classifier, training: ImageSet, run: Run, stage: str = "pretrain"
    ) -> Pretrained:
        """Train `encoder` in place and leave it in evaluation mode."""
        inside = width(encoder, training.images)
        model = Projected(encoder, mlp(inside, inside, self.projected, run, stage, "projector"))
        ready(model, run)
        slow = slow_copy(model)
        keys = torch.randn(
            self.queue, self.projected, generator=run.generator(stage, "queue"), device=run.device
        )
        keys = F.normalize(keys, dim=1)

        def step(batch: Batch) -> tuple[Tensor, dict[str, float]]:
            query, key = (self.views(batch.images, batch.generator) for _ in range(2))
            asked = F.normalize(run.forward(model, query).float(), dim=1)
            with torch.no_grad():
                follow(slow, model, self.momentum)
                positive = F.normalize(run.forward(slow, key).float(), dim=1)
            loss = info_nce(asked, positive, keys, self.temperature)
            enqueue(keys, positive, batch.step * len(positive))
            return loss, {}

        course = Course(self.epochs, self.batch_size, self.peak, self.weight_decay)
        extra = {"queue": keys, **slots("slow", slow)}
        return Pretrained(course(step, model, training, run, stage, extra), model.projector)


def info_nce(queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Mean of -log of the share that a query's own key has among it and all negatives; all of length 1.

    `queries` and `positives` [n d], `negatives` [m d]. They are copied, since the queue changes before the gradients
    are taken.
    """
    own = (queries * positives).sum(1, keepdim=True)
    others = queries @ negatives.clone().T
    logits = torch.cat([own, others], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.long, device=queries.device))


def enqueue(queue: Tensor, keys: Tensor, written: int) -> None:
    """Overwrite the oldest keys of `queue` [m d], into which `written` went before; of too many, the last remain.

    Where to write follows from the step's number, so there is no pointer to keep.
    """
    size = len(queue)
    keys, written = keys[-size:], written + max(0, len(keys) - size)
    rows = (torch.arange(len(keys), device=queue.device) + written) % size
    queue[rows] = keys.detach()
