"""What SimCLR, MoCo and BYOL share: a projector behind the encoder, slow copies, and the course of training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bdclean.data.imageset import ImageSet
from bdclean.networks.classifier import Classifier
from bdclean.training.loop import State, Step, fit, updates
from bdclean.training.run import Run
from bdclean.training.students import one_cycle


@dataclass(frozen=True)
class Pretrained:
    """What pre-training leaves beside the encoder, which it trains in place."""

    curve: list[dict[str, float]]
    projector: nn.Module


class Projected(nn.Module):
    """An encoder and the head behind it, in which it is trained and which is thrown away later: images to [n d]."""

    def __init__(self, encoder: Classifier, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))


def mlp(inside: int, hidden: int, out: int, run: Run, *name: str) -> nn.Sequential:
    """Linear, batch norm, ReLU, linear, as SimCLR's projector and BYOL's heads; weights drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.generator(*name).initial_seed())
        return nn.Sequential(
            nn.Linear(inside, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
        )


def width(encoder: Classifier, images: Tensor) -> int:
    """How many features the encoder gives; asked with one image, since an encoder does not say."""
    training = encoder.training
    with torch.no_grad():
        features = encoder.eval()(images[:1].to(encoder.mean.device))
    encoder.train(training)
    return features.shape[1]


def ready(model: nn.Module, run: Run) -> None:
    """Puts `model` into training mode and its tensors where they will be trained: only then copy it."""
    model.to(run.device).train()
    if run.precision.channels_last:
        model.to(memory_format=torch.channels_last)


def slow_copy(model: nn.Module) -> nn.Module:
    """A copy without gradients, in training mode: its batch norms see its own batches, as the authors' do."""
    return copy.deepcopy(model).requires_grad_(False)


def slots(name: str, module: nn.Module) -> dict[str, Tensor]:
    """All tensors of `module`, themselves and not copies, for `State.extra`: what is resumed goes into the module."""
    return {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Moves the parameters of `slow` towards those of `fast`: momentum * slow + (1 - momentum) * fast."""
    for behind, ahead in zip(slow.parameters(), fast.parameters(), strict=True):
        behind.lerp_(ahead, 1 - momentum)


@dataclass(frozen=True)
class Course:
    """Adam and a one-cycle learning rate: the same for all methods, so that they compare.

    The authors' are SGD or LARS with a cosine over hundreds of epochs; within some tens, this gets further.
    """

    epochs: float
    batch_size: int
    peak: float
    weight_decay: float

    def steps(self, training: ImageSet) -> int:
        return updates(self.epochs, len(training), self.batch_size)

    def __call__(
        self,
        step: Step,
        model: nn.Module,
        training: ImageSet,
        run: Run,
        stage: str,
        extra: Mapping[str, Tensor] | None = None,
    ) -> list[dict[str, float]]:
        """Trains `model` in place, leaves it in evaluation mode, and returns the curve. Labels are not looked at."""
        ready(model, run)
        steps = self.steps(training)
        optimiser = torch.optim.Adam(model.parameters(), self.peak, weight_decay=self.weight_decay)
        rate = partial(one_cycle, steps=steps, peak=self.peak)
        state = State(
            stage, model, optimiser, training.images, None, self.batch_size, steps, rate, dict(extra or {})
        )
        curve = fit(step, state, run)
        model.eval()
        return curve
