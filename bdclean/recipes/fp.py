"""Fine-pruning: what clean images hardly use is taken out, then the network is fine-tuned."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.finetuning import require_labels
from bdclean.recipes.recipe import Cleansed
from bdclean.training.fine_pruning import pruned
from bdclean.training.loop import burst, halvings, updates
from bdclean.training.run import Run
from bdclean.training.students import choose_augmentation, cosine, frozen
from bdclean.training.supervised import train_classifier


@dataclass(frozen=True)
class FP:
    """Fine-pruning (Liu, Dolan-Gavitt, Garg, RAID 2018, arXiv 1805.12185).

    What it does: takes out the channels of the last layer before the head that clean images use least, for as long as
    accuracy holds, and fine-tunes the rest of the network; what is taken out stays out.
    When to use it: to compare with it: most papers do.
    What it needs: labeled images, 5 % of the training set in most papers.
    Known limits: leaves backdoors that share channels with clean images, which blended and most later ones do.

    Settings are BackdoorBench's, since the authors' code is for Caffe: tolerance, rate, cosine to zero, 100 epochs,
    batch 256. Departures: see `training.fine_pruning.FinePruning`; the last layer is never a shortcut's; the rate falls
    with each update, not with each epoch; accuracy is that on the given labeled images, where BackdoorBench looks at
    the test set.
    """

    name: ClassVar[str] = "fp"
    source: ClassVar[str] = "arXiv 1805.12185 (method), BackdoorBench (settings)"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ()

    pruned: float | None = None  # share of the last layer's channels; none: as many as accuracy allows
    tolerance: float = 0.1  # of the accuracy, relative
    epochs: float = 100
    batch_size: int = 256
    rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.batch_size < 2 or self.rate <= 0:
            raise UsageError("fp: epochs and rate must be positive, batch_size at least 2.")
        if not 0 <= self.tolerance <= 1 or not 0 <= (self.pruned or 0) < 1:
            raise UsageError("fp: tolerance is a share in [0, 1], pruned one in [0, 1), or none.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        student = frozen(suspect, run)
        augment = choose_augmentation(student, images.images, run)
        steps = updates(self.epochs, len(images), self.batch_size)
        layers = [name for stage in arch.stages[:-1] for name in stage.modules]
        with pruned(student, layers, images, run, self.pruned, self.tolerance) as count:
            curve = train_classifier(
                student, images, augment, steps, partial(cosine, steps=steps, peak=self.rate), run, self.name,
                batch_size=self.batch_size, momentum=self.momentum, weight_decay=self.weight_decay,
                most=burst(arch.classes),
            )  # fmt: skip
        stages = [
            f"{count} channels of the last layer before the head pruned",
            f"fine-tuned for {steps} updates on {len(images)} labeled images, {augment.describe()}",
            *halvings(curve),
        ]
        return Cleansed(student, arch, curve, asdict(self), stages)
