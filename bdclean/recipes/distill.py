"""Distillation of an encoder: its answers, and where its stages look, into a student."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.training.distance_hardening import DistanceHardening
from bdclean.training.encoder_lesson import EncoderLesson, Terms, train_encoder
from bdclean.training.fine_pruning import FinePruning
from bdclean.training.linear_head import ENCODER, with_head, without_head
from bdclean.training.loop import halvings
from bdclean.training.map_losses import MAPS
from bdclean.training.neuron_pruning import NeuronPruning, scaled_norms
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.pretraining.simclr import SimCLR
from bdclean.training.pruning import pruned_channels
from bdclean.training.run import Run
from bdclean.training.students import keep_trained, void
from bdclean.training.supervised import fine_tune

LAST = ("kd", "sp", "pkt", "rkd")
"""Losses of the last stage alone; the others are of every stage."""


@dataclass(frozen=True)
class Distill:
    """Distillation as purification of an encoder (Han et al., arXiv 2403.03846).

    What it does: trains a student to have the teacher's features on clean images, and to look where the teacher looks.
    The teacher is the suspect, or what a method for classifiers makes of the suspect with a head on labeled images:
    fine-tuning, fine-pruning, adversarial neuron pruning, class distance hardening (MOTH).
    When to use it: to compare with the paper; a void student leaves the least of a backdoor and loses most accuracy.
    `loss=none contrast=0` is a clone alone, `clone=0 contrast=0` attention alone.
    What it needs: unlabeled images of the encoder's kind, 2,500 in the paper; for other teachers than raw labeled ones.
    Known limits: a student that begins as a copy keeps its backdoor; so do teachers that few steps change little. The
    least that anp would prune may cost more accuracy than it may, so that nothing is: `pruned` says how much.

    Settings are the authors' code's; of the teachers, whose settings the paper's code lacks, their own authors'.
    Departures: attention is on a scale that does not depend on a map's size, and every loss weighs 10, where the code
    has 1000 for at, afd, fitnet, cc and kd (`weights=paper` is the code's scale and weight); kd is of
    the last stage, as the code's comment says, where it distils the first; sp is its own loss, which the code leaves
    out by mistake; random images of the set, not its first.
    """

    name: ClassVar[str] = "distill"
    source: ClassVar[str] = "arXiv 2403.03846"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    teacher: Literal["raw", "ft", "fp", "anp", "moth"] = "raw"
    student: Literal["raw", "void", "warmup"] = "warmup"
    loss: Literal["at", "afd", "fitnet", "cc", "kd", "sp", "pkt", "rkd", "none"] = "at"
    weights: Literal["even", "paper"] = (
        "even"  # of attention: alike for every stage, or 1000 on the code's scale
    )
    weight: float = 10.0  # of a stage's loss; with weights=paper 1000
    clone: float = 1.0  # of the features' cosine; the code has it with loss=sp and by hand
    contrast: float = 1.0  # of SimCLR's loss on the student, which the code always has
    epochs: float = 500  # of each round
    rounds: int = 1  # in each the student becomes the next round's teacher
    warmup_epochs: float = 100  # of SimCLR before each round, with student=warmup
    teacher_epochs: float = 20  # of fine-tuning a teacher by ft or fp
    pruned: float | None = None  # share of channels for fp and anp; none: what costs a tenth of accuracy
    anp_steps: int = 2000  # of optimising anp's masks
    moth_epochs: float = 2  # of hardening a teacher by moth
    moth_steps: int = 200  # of fitting a trigger between two classes, for moth
    batch_size: int = 128
    rate: float = 1e-3
    weight_decay: float = 1e-6

    def __post_init__(self) -> None:
        positive = (
            self.epochs, self.rate, self.warmup_epochs, self.teacher_epochs, self.anp_steps, self.moth_epochs,
            self.moth_steps,
        )  # fmt: skip
        if min(positive) <= 0 or self.batch_size < 2:
            raise UsageError("distill: epochs, steps and rate are positive, batch_size at least 2.")
        if min(self.weight, self.clone, self.contrast) < 0 or self.rounds < 1:
            raise UsageError("distill: no weight is negative, and there is at least one round.")
        if self.loss == "none" and self.clone == self.contrast == 0:
            raise UsageError("distill: loss=none with clone=0 and contrast=0 asks nothing of the student.")
        if self.pruned is not None and not 0 <= self.pruned < 1:
            raise UsageError("distill: pruned is a share in [0, 1), or none.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        teacher, stages = self._teacher(suspect, arch, labeled, run)
        curve: list[dict[str, float]] = []
        for number in range(self.rounds):
            student, stage = self._student(teacher, arch, unlabeled, run, number), f"distill-{number}"
            terms = self._terms(arch)
            lesson = EncoderLesson(teacher, student, arch, unlabeled.images, terms, Views(), run)
            train = partial(
                train_encoder, lesson, stage, unlabeled.images, self.epochs, self.batch_size,
                self.weight_decay, lambda step, steps: self.rate, self.rate, run,
            )  # fmt: skip
            curve += keep_trained(lesson.model, stage, train, run)
            teacher = lesson.student.eval()
            stages.append(f"round {number + 1}: {self.student} student, {self.loss}")
        return Cleansed(teacher, arch, curve, asdict(self), [*stages, *halvings(curve)])

    def _teacher(
        self, suspect: Classifier, arch: Arch, labeled: ImageSet | None, run: Run
    ) -> tuple[Classifier, list[str]]:
        """The encoder that the first round's student learns from, and what was done to it."""
        if self.teacher == "raw":
            return suspect, []
        if labeled is None or labeled.labels is None:
            raise Refused(
                f"distill teacher={self.teacher} needs labels: give --labeled, with images in one folder per class."
            )
        if self.teacher == "anp" and not scaled_norms(suspect):
            raise Refused(
                "distill teacher=anp needs batch norm, and this encoder has none: use fp, ft or moth."
            )
        model, images, stage = with_head(suspect, labeled, run), labeled, f"teacher by {self.teacher}"
        before = copy.deepcopy(model)

        def adapt() -> list[dict[str, float]]:
            if self.teacher == "ft":
                return fine_tune(model, images, run, stage, self.teacher_epochs)
            alone = replace(run, together=False)  # these optimise by other gradients than those of a loss
            if self.teacher == "fp":
                layers = [f"{ENCODER}.{name}" for name in arch.stages[-1].modules]
                return FinePruning(self.pruned, epochs=self.teacher_epochs)(
                    model, layers, images, alone, stage
                )
            if self.teacher == "anp":
                return NeuronPruning(self.pruned, steps=self.anp_steps)(model, images, alone, stage)
            harden = DistanceHardening(epochs=self.moth_epochs, fit_steps=self.moth_steps)
            return harden(model, images, alone, stage)

        keep_trained(model, stage, adapt, run)
        said = f"{stage} on {len(images)} labeled images"
        if self.teacher in ("fp", "anp"):
            said += f", {pruned_channels(before, model)} channels pruned"
        return without_head(model), [said]

    def _student(
        self, teacher: Classifier, arch: Arch, unlabeled: ImageSet, run: Run, number: int
    ) -> Classifier:
        if self.student == "raw":
            return copy.deepcopy(teacher).requires_grad_(True)
        student = void(teacher, arch, run, number)
        if self.student == "warmup":
            warm, stage = SimCLR(epochs=self.warmup_epochs, batch_size=self.batch_size), f"warm up {number}"
            keep_trained(student, stage, lambda: warm(student, unlabeled, run, stage).curve, run)
        return student

    def _terms(self, arch: Arch) -> Terms:
        kind = "at-paper" if (self.loss, self.weights) == ("at", "paper") else self.loss
        weight = 1000.0 if self.weights == "paper" else self.weight
        taps = arch.taps[-1:] if self.loss in LAST else arch.taps
        return Terms(
            clone=self.clone, contrast=self.contrast, maps=MAPS.get(kind), map_weights=dict.fromkeys(taps, weight)
        )  # fmt: skip
