"""Super-fine-tuning: fine-tuning with a learning rate that swings, high in a first phase and low in a second."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.finetuning import Start, fine_tune, require_labels
from bdclean.recipes.recipe import Cleansed
from bdclean.training.loop import updates
from bdclean.training.run import Run
from bdclean.training.students import triangular


@dataclass(frozen=True)
class SFT:
    """Super-fine-tuning (Sha, He, Berrang, Humbert, Zhang 2022, arXiv 2212.09067).

    What it does: fine-tunes the whole network with a triangular learning rate: high peaks first, so that the trigger is
    forgotten, then low ones, so that accuracy comes back.
    When to use it: with labeled images, standalone or, with --head new, when adapting to another task.
    What it needs: labeled images; the paper assumes the whole clean training set.
    Known limits: with few images a peak of 0.1 may be too low for blended triggers and costs accuracy.

    The three rates are the paper's as three sources give them; sources disagree about the length of phases and cycles.
    These are those of backdoor-toolbox's latest version (40 of 100 epochs, 10 steps up and 10 down), with momentum 0.9
    and weight decay 5e-4, to which the rates belong.
    """

    name: ClassVar[str] = "sft"
    source: ClassVar[str] = "arXiv 2212.09067"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    epochs: float = 100
    first_epochs: float = 40  # length of the phase with the high peak
    batch_size: int = 128
    base_rate: float = 3e-4
    first_peak: float = 0.1
    second_peak: float = 1e-3
    up: int = 10  # steps from the base to a peak
    down: int = 10  # and back
    momentum: float = 0.9
    weight_decay: float = 5e-4
    start: Start = "suspect"  # or void: from scratch, for comparison

    def __post_init__(self) -> None:
        if not 0 <= self.first_epochs <= self.epochs or self.epochs <= 0:
            raise UsageError("sft: first_epochs lies between 0 and epochs, and epochs is positive.")
        if (
            self.up < 1
            or self.down < 1
            or self.batch_size < 2
            or min(self.base_rate, self.first_peak, self.second_peak) <= 0
        ):
            raise UsageError("sft: up and down are at least 1, batch_size at least 2, rates positive.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        steps = updates(self.epochs, len(images), self.batch_size)
        boundary = round(steps * self.first_epochs / self.epochs)

        def rate(step: int) -> float:
            peak = self.first_peak if step < boundary else self.second_peak
            return triangular(step, self.up, self.down, self.base_rate, peak)

        optimise = (self.batch_size, self.momentum, self.weight_decay)
        return fine_tune(
            self.name, suspect, arch, images, steps, rate, optimise, self.start, asdict(self), run
        )
