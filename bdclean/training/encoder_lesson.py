"""The step by which a student encoder learns from a teacher: clone, maps and contrast, in one pass of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.networks.taps import Seen, seeing
from bdclean.training.loop import Batch, Measures, State, Step, fit, updates
from bdclean.training.losses import nt_xent
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.pretraining.learning import Projected, mlp
from bdclean.training.run import Run
from bdclean.training.students import frozen

MapLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Terms:
    """What is asked of the student; a weight of 0 leaves a term out.

    `clone`: the cosine with the teacher's feature; `centred`: both without the teacher's mean feature, for the cosine
    of any two images is over 0.95 otherwise; `contrast`: SimCLR's loss on the student at `temperature`; `maps`: a loss
    a tap, with a weight for each.
    """

    clone: float = 1.0
    centred: bool = False
    contrast: float = 1.0
    temperature: float = 0.5
    maps: MapLoss | None = None
    map_weights: Mapping[str, float] = field(default_factory=dict)


def directions(
    teacher: Classifier,
    images: Tensor,
    run: Run,
    change: Callable[[Tensor], Tensor] | None = None,
    size: int = 256,
) -> Iterator[Tensor]:
    """Features of length one, float32 [k d], of `images` uint8 [n c h w] under `change`, `size` at a time."""
    for part in images.split(size):
        pixels = part.to(run.device).float() / 255
        seen = pixels if change is None else change(pixels)
        yield F.normalize(run.forward(teacher, seen).float(), dim=1)


@torch.no_grad()
def mean_feature(teacher: Classifier, images: Tensor, run: Run, size: int = 256) -> Tensor:
    """The mean of the teacher's features of length one over `images` uint8 [n c h w], float32 [d]."""

    def made() -> Tensor:
        parts = directions(teacher, images, run, size=size)
        return torch.stack([part.sum(0) for part in parts]).sum(0) / len(images)

    return run.keep("mean feature", made)


class EncoderLesson:
    """A step of `fit` for `student`, an encoder with a projector behind it, which learns from `suspect` as its teacher.

    Departures from the code of 2403.03846 and 2406.03508: the teacher is run without gradients; maps come from the same
    pass as the features, with hooks set once, where the code runs the student again for them.
    """

    def __init__(
        self,
        suspect: Classifier,
        student: Classifier,
        arch: Arch,
        images: Tensor,
        terms: Terms,
        views: Views,
        run: Run,
    ) -> None:
        self.teacher, self.terms, self.views, self.run = frozen(suspect, run), terms, views, run
        width = arch.width
        self.model = (
            Projected(student, mlp(width, width, min(128, width), run, "projector")).to(run.device).train()
        )
        if run.precision.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.centre = (
            mean_feature(self.teacher, images, run) if terms.centred else torch.zeros((), device=run.device)
        )
        self.arch = arch
        self.ours: Seen = Seen()
        self.theirs: Seen = Seen()
        self.watching = ExitStack()

    def __enter__(self) -> EncoderLesson:
        if self.terms.maps is not None:
            self.ours = self.watching.enter_context(seeing(self.student.network, self.arch))
            self.theirs = self.watching.enter_context(seeing(self.teacher.network, self.arch))
        return self

    def __exit__(self, *error: object) -> None:
        self.watching.close()

    @property
    def student(self) -> Classifier:
        found = self.model.encoder
        assert isinstance(found, Classifier)
        return found

    def __call__(self, batch: Batch) -> tuple[Tensor, Measures]:
        terms, n = self.terms, len(batch.images)
        shown = torch.cat(
            [self.views(batch.images, batch.generator) for _ in range(2 if terms.contrast else 1)]
        )
        with torch.no_grad():
            answers = F.normalize(self.run.forward(self.teacher, shown[:n]).float(), dim=1) - self.centre
        features = self.run.forward(self.model.encoder, shown).float()
        measures: dict[str, Tensor | float] = {}
        likeness = F.cosine_similarity(F.normalize(features[:n], dim=1) - self.centre, answers, dim=1).mean()
        loss = terms.clone * (1 - likeness)
        measures["likeness"] = likeness.detach()
        if terms.contrast:
            with self.run.precision.autocast(self.run.device):
                projected = self.model.projector(features)
            loss = loss + terms.contrast * nt_xent(projected[:n], projected[n:], terms.temperature)
        if terms.maps is not None:
            for tap, weight in terms.map_weights.items():
                ours = self.run.whole(self.ours.maps[tap], len(shown))[:n]
                loss = loss + weight * terms.maps(ours, self.run.whole(self.theirs.maps[tap], n))
        return loss, measures


def train_encoder(
    lesson: EncoderLesson, stage: str, images: Tensor, epochs: float, batch_size: int, decay: float,
    rate: Callable[[int, int], float], peak: float, run: Run,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains the lesson's student with Adam, and returns the curve. `rate` takes a step and all steps."""
    with lesson:
        return train(lesson, lesson.model, stage, images, epochs, batch_size, decay, rate, peak, run)


def train(
    step: Step, model: nn.Module, stage: str, images: Tensor, epochs: float, batch_size: int, decay: float,
    rate: Callable[[int, int], float], peak: float, run: Run,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains `model` by `step` with Adam, and returns the curve. `rate` takes a step and all steps."""
    steps = updates(epochs, len(images), batch_size)
    optimiser = torch.optim.Adam(model.parameters(), peak, weight_decay=decay)
    state = State(stage, model, optimiser, images, None, batch_size, steps, lambda done: rate(done, steps))
    return fit(step, state, run)
