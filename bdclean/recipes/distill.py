"""Distillation of an encoder: its answers, and where its stages look, into a student."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.training.encoder_lesson import EncoderLesson, Terms, train_encoder
from bdclean.training.loop import Batch, Measures, State, fit, halvings
from bdclean.training.map_losses import MAPS
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.pretraining.simclr import SimCLR
from bdclean.training.run import Run
from bdclean.training.students import void

LAST = ("kd", "sp", "pkt", "rkd")
"""Losses of the last stage alone; the others are of every stage."""


@dataclass(frozen=True)
class Distill:
    """Distillation as purification of an encoder (Han et al., arXiv 2403.03846).

    What it does: trains a student to have the teacher's features on clean images, and to look where the teacher looks,
    which is the suspect, or the suspect fine-tuned on labeled images.
    When to use it: to compare with the paper; a void student leaves the least of a backdoor and loses most accuracy.
    What it needs: unlabeled images of the encoder's kind, 2,500 in the paper; for teacher=ft labeled ones.
    Known limits: a student that begins as a copy keeps its backdoor. Teachers by fp, anp and moth are not there yet.

    Settings are the authors' code's. Departures: attention is on a scale that does not depend on a map's size
    (`weights=paper` is the code's); kd is of the last stage, as the code's comment says, where it distils the first; sp
    is its own loss, which the code leaves out by mistake; random images of the set, not its first.
    """

    name: ClassVar[str] = "distill"
    source: ClassVar[str] = "arXiv 2403.03846"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ()

    teacher: Literal["raw", "ft"] = "raw"
    student: Literal["raw", "void", "warmup"] = "warmup"
    loss: Literal["at", "afd", "fitnet", "cc", "kd", "sp", "pkt", "rkd"] = "at"
    weights: Literal["even", "paper"] = (
        "even"  # of attention: alike for every stage, or 1000 on the code's scale
    )
    weight: float = 10.0  # of a stage's loss; with weights=paper 1000
    clone: float = 1.0  # of the features' cosine; the code has it with loss=sp and by hand
    contrast: float = 1.0  # of SimCLR's loss on the student, which the code always has
    epochs: float = 500  # of each round
    rounds: int = 1  # in each the student becomes the next round's teacher
    warmup_epochs: float = 100  # of SimCLR before each round, with student=warmup
    teacher_epochs: float = 20  # of fine-tuning the teacher
    batch_size: int = 128
    rate: float = 1e-3
    weight_decay: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.epochs, self.rate, self.warmup_epochs, self.teacher_epochs) <= 0 or self.batch_size < 2:
            raise UsageError("distill: epochs and rate are positive, batch_size at least 2.")
        if min(self.weight, self.clone, self.contrast) < 0 or self.rounds < 1:
            raise UsageError("distill: no weight is negative, and there is at least one round.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        teacher, stages = suspect, []
        curve: list[dict[str, float]] = []
        if self.teacher == "ft":
            teacher = fine_tuned(suspect, arch, labeled, self.teacher_epochs, run)
            stages.append(f"the teacher was fine-tuned for {self.teacher_epochs:g} epochs on labeled images")
        for number in range(self.rounds):
            student = self._student(teacher, arch, unlabeled, run, number)
            terms = self._terms(arch)
            lesson = EncoderLesson(teacher, student, arch, unlabeled.images, terms, Views(), run)
            more = train_encoder(
                lesson, f"distill-{number}", unlabeled.images, self.epochs, self.batch_size,
                self.weight_decay, lambda step, steps: self.rate, self.rate, run,
            )  # fmt: skip
            curve, teacher = [*curve, *more], lesson.student.eval()
            stages.append(f"round {number + 1}: {self.student} student, {self.loss}")
        return Cleansed(teacher, arch, curve, asdict(self), [*stages, *halvings(curve)])

    def _student(
        self, teacher: Classifier, arch: Arch, unlabeled: ImageSet, run: Run, number: int
    ) -> Classifier:
        if self.student == "raw":
            return copy.deepcopy(teacher).requires_grad_(True)
        student = void(teacher, arch, run, number)
        if self.student == "warmup":
            warm = SimCLR(epochs=self.warmup_epochs, batch_size=self.batch_size)
            warm(student, unlabeled, run, f"warm up {number}")
        return student

    def _terms(self, arch: Arch) -> Terms:
        kind = "at-paper" if (self.loss, self.weights) == ("at", "paper") else self.loss
        weight = 1000.0 if self.weights == "paper" else self.weight
        taps = arch.taps[-1:] if self.loss in LAST else arch.taps
        return Terms(
            clone=self.clone, contrast=self.contrast, maps=MAPS[kind], map_weights=dict.fromkeys(taps, weight)
        )


def fine_tuned(
    suspect: Classifier, arch: Arch, labeled: ImageSet | None, epochs: float, run: Run
) -> Classifier:
    """The suspect, all of it tuned with a new linear head on labeled images; the head is thrown away."""
    if labeled is None or labeled.labels is None:
        raise Refused("distill teacher=ft needs labels: give --labeled, with images in one folder per class.")
    classes = int(labeled.labels.max()) + 1
    encoder = copy.deepcopy(suspect).requires_grad_(True).to(run.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.generator("head").initial_seed())
        head = nn.Linear(arch.width, classes)
    model = nn.Sequential(encoder, head).to(run.device).train()
    views = Views(smallest=0.5, jittered=0.0, grey=0.0)

    def step(batch: Batch) -> tuple[torch.Tensor, Measures]:
        logits = run.forward(model, views(batch.images, batch.generator)).float()
        assert batch.labels is not None
        return F.cross_entropy(logits, batch.labels), {
            "accuracy": (logits.argmax(1) == batch.labels).float().mean()
        }

    steps = max(1, math.ceil(epochs * len(labeled) / 128))
    optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    state = State("fine-tune the teacher", model, optimiser, labeled.images, labeled.labels, 128, steps)
    fit(step, state, run)
    return encoder.eval()
