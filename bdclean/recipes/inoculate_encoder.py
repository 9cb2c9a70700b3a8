"""inoculate for encoders: a network with new weights learns what the suspect says of several views of an image."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.training.encoder_lesson import EncoderLesson, Terms, train_encoder
from bdclean.training.loop import halvings
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.run import Run
from bdclean.training.students import one_cycle, void


@dataclass(frozen=True)
class InoculateEncoder:
    """A void student learns the suspect's features, averaged over views of each image (bdclean's own).

    What it does: trains a network with new weights to give, for a view of an image, the mean of what the suspect gives
    for several views of it. A trigger sits at one place; crops and mirrors move it, so that the mean forgets it.
    When to use it: by default, for encoders.
    What it needs: unlabeled images of the kind that the encoder is for, 2,500 or more.
    Known limits: what it was measured with is in README. A trigger that crops do not move (a blend, stripes,
    frequencies) is in the mean as well. A large network may need more images than it is given.

    Kin: distillation into a void student (arXiv 2403.03846, 2406.03508); features are centred first, since the cosine
    of any two images is nearly 1 otherwise. The features' lengths are kept, for heads that are there already.
    """

    name: ClassVar[str] = "inoculate"
    source: ClassVar[str] = "bdclean's own; kin: 2403.03846, 2406.03508"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ()

    epochs: float = 60
    least_steps: int = 1000  # with few images, more epochs than that
    batch_size: int = 128
    peak: float = 0.004  # of Adam's rate, one cycle
    answers: int = 3  # views of an image that the suspect's features are averaged over
    contrast: float = 0.5  # of SimCLR's loss on the student
    length: float = 0.1  # of the squared difference of log lengths
    weight_decay: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.epochs, self.peak) <= 0 or self.batch_size < 2 or self.answers < 1:
            raise UsageError(
                "inoculate: epochs and peak are positive, batch_size at least 2, answers at least 1."
            )
        if min(self.contrast, self.length) < 0:
            raise UsageError("inoculate: no weight is negative.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = unlabeled.images
        epochs = max(self.epochs, self.least_steps * self.batch_size / len(images))
        terms = Terms(centred=True, answers=self.answers, contrast=self.contrast, length=self.length)
        lesson = EncoderLesson(suspect, void(suspect, arch, run), arch, images, terms, Views(), run)
        curve = train_encoder(
            lesson, "inoculate", images, epochs, self.batch_size, self.weight_decay,
            lambda step, steps: one_cycle(step, steps, self.peak), self.peak, run,
        )  # fmt: skip
        stages = [
            f"a student with new weights, {epochs:.0f} epochs, answers of {self.answers} views averaged",
            *halvings(curve),
        ]
        return Cleansed(lesson.student.eval(), arch, curve, asdict(self), stages)
