"""MOTH: triggers between pairs of classes are made, and unlearned with the images' own labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.finetuning import require_labels
from bdclean.recipes.recipe import Cleansed
from bdclean.training.distance_hardening import DistanceHardening
from bdclean.training.loop import halvings
from bdclean.training.run import Run
from bdclean.training.students import frozen


@dataclass(frozen=True)
class Moth:
    """MOTH, model orthogonalization by class distance hardening (Tao et al., IEEE S&P 2022).

    What it does: makes the smallest masks that send one class to another, stamps them on images whose labels stay, and
    trains on these, so that classes come to lie further apart, and a backdoor that is a short cut between them goes.
    When to use it: against patches, with labeled images; to compare.
    What it needs: labeled images of at least two classes.
    Known limits: looks for masks alone: what is blended over the whole picture, or warps it, is not met. Takes long: a
    trigger is fitted before every step.

    Settings are the authors' code's, but for the rate, backdoor-toolbox's for a few thousand images. Departures: see
    `training.distance_hardening.DistanceHardening`.
    """

    name: ClassVar[str] = "moth"
    source: ClassVar[str] = "Tao et al., IEEE S&P 2022"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("patch",)

    epochs: float = 2
    batch_size: int = 128
    rate: float = 1e-3
    momentum: float = 0.9
    warm_share: float = 0.5  # of a batch's images of other classes that the warm-up stamps
    share: float = 0.1  # of a batch's images of a pair's classes that are stamped
    random_pairs: float = 0.3  # probability that a pair is drawn, not chosen
    fit_steps: int = 200  # of fitting a pair's triggers

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.batch_size < 2 or self.rate <= 0 or self.fit_steps < 1:
            raise UsageError("moth: epochs, rate and fit_steps must be positive, batch_size at least 2.")
        if not all(0 <= share <= 1 for share in (self.warm_share, self.share, self.random_pairs)):
            raise UsageError("moth: warm_share, share and random_pairs are shares in [0, 1].")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        student = frozen(suspect, run).requires_grad_(True)
        curve = DistanceHardening(**asdict(self))(student, images, run, self.name)
        steps = int(curve[-1]["step"])
        stages = [f"hardened for {steps} updates on {len(images)} labeled images", *halvings(curve)]
        return Cleansed(student, arch, curve, asdict(self), stages, families=self.families)
