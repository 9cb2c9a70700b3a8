"""Plain fine-tuning on labeled images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.finetuning import Start, fine_tune, require_labels
from bdclean.recipes.recipe import Cleansed
from bdclean.training.loop import updates
from bdclean.training.run import Run
from bdclean.training.students import cosine


@dataclass(frozen=True)
class FT:
    """Fine-tunes the whole network with cross-entropy; the baseline that every defence must beat.

    What it does: SGD on labeled clean images with a cosine learning rate.
    When to use it: to see whether a backdoor is of the kind that any training removes; with --head new, to adapt an
    encoder or another task's classifier, where 2212.09067 says that it suffices.
    What it needs: labeled images, 5 % of the training set in most papers.
    Known limits: blended and clean-label backdoors often survive; accuracy falls with few images.

    Settings are BCU's baseline's (rate 0.01, cosine to zero, 100 epochs, batch 256), which BackdoorBench shares;
    here the rate falls with each update, not with each epoch.
    """

    name: ClassVar[str] = "ft"
    source: ClassVar[str] = "arXiv 2212.09067 (method), 2211.12044 (settings of its baseline)"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    epochs: float = 100
    batch_size: int = 256
    rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    start: Start = "suspect"  # or void: from scratch, for comparison

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.batch_size < 2 or self.rate <= 0:
            raise UsageError("ft: epochs and rate must be positive, batch_size at least 2.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        steps = updates(self.epochs, len(images), self.batch_size)

        rate = partial(cosine, steps=steps, peak=self.rate)
        optimise = (self.batch_size, self.momentum, self.weight_decay)
        return fine_tune(
            self.name, suspect, arch, images, steps, rate, optimise, self.start, asdict(self), run
        )
