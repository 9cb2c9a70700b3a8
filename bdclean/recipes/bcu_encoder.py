"""BCU for encoders: adaptive layer-wise re-initialisation, then distillation of features on unlabeled images."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import ClassVar

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.bcu import by_depth, reinitialise
from bdclean.recipes.recipe import Cleansed
from bdclean.training.encoder_lesson import EncoderLesson, Terms, train_encoder
from bdclean.training.loop import halvings
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.run import Run


@dataclass(frozen=True)
class BCUEncoder:
    """Backdoor cleansing with unlabeled data (Pang, Sun, Ling, Chen, CVPR 2023, arXiv 2211.12044), of an encoder.

    What it does: re-draws a share of each layer's weights, more in deeper layers, and distils the suspect's features
    into the result.
    When to use it: to compare with the paper.
    What it needs: unlabeled images of the encoder's kind.
    Known limits: a student that keeps most of the suspect's weights keeps its backdoor, as after 8 epochs of 2,500
    images in the one attacked encoder tried. The lengths of features are not asked for, so a head that is there
    already may need to be trained again.

    Re-drawn shares, epochs and the course of the learning rate are the authors' code's for classifiers. Departures,
    since an encoder has no answers to soften: the loss is 1 - cosine of the features; Adam in place of SGD, whose rate
    belongs to their loss; batches of 128; crops of at least half of the area, mirrored, in place of shifts.
    """

    name: ClassVar[str] = "bcu"
    source: ClassVar[str] = "arXiv 2211.12044"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    ratios: tuple[float, ...] = (0.01, 0.01, 0.03, 0.09, 0.27)  # re-drawn shares from stem to last stage
    centred: bool = True  # features without the suspect's mean: the cosine of any two is over 0.95 otherwise
    epochs: float = 100
    batch_size: int = 128
    rate: float = 1e-3  # cosine to zero
    weight_decay: float = 1e-6

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 <= ratio <= 1 for ratio in self.ratios):
            raise UsageError("bcu: ratios are shares in [0, 1].")
        if min(self.epochs, self.rate) <= 0 or self.batch_size < 2 or self.weight_decay < 0:
            raise UsageError(
                "bcu: epochs and rate are positive, batch_size at least 2, weight_decay not negative."
            )

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        student = copy.deepcopy(suspect).to(run.device).requires_grad_(True)
        shares = by_depth(self.ratios, 0.0, len(arch.stages) + 1)  # the last is a head's
        drawn = {}
        for stage, share in zip(arch.stages, shares[:-1], strict=True):
            for name in stage.modules:
                reinitialise(student.network.get_submodule(name), share, run.generator("bcu", name))
            drawn[stage.name] = round(share, 4)
        terms, views = Terms(centred=self.centred, contrast=0.0), Views(smallest=0.5, jittered=0.0, grey=0.0)
        lesson = EncoderLesson(suspect, student, arch, unlabeled.images, terms, views, run)
        curve = train_encoder(
            lesson, "bcu", unlabeled.images, self.epochs, self.batch_size, self.weight_decay,
            lambda step, steps: self.rate * (1 + math.cos(math.pi * step / steps)) / 2, self.rate, run,
        )  # fmt: skip
        stages = [
            f"re-initialised shares by depth: {drawn}",
            f"distilled {'centred ' * self.centred}features for {self.epochs:g} epochs",
            *halvings(curve),
        ]
        return Cleansed(lesson.student.eval(), arch, curve, asdict(self), stages)
