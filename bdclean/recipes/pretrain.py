"""Pre-training without labels, of the suspect or anew, on the given images."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.training.loop import halvings
from bdclean.training.pretraining.byol import BYOL
from bdclean.training.pretraining.moco import MoCo
from bdclean.training.pretraining.simclr import SimCLR
from bdclean.training.run import Run
from bdclean.training.students import void

METHODS = {"simclr": SimCLR, "moco": MoCo, "byol": BYOL}


@dataclass(frozen=True)
class Pretrain:
    """Self-supervised pre-training on the given images: continued from the suspect, or from scratch.

    What it does: trains the suspect (`start=suspect`), or new weights (`start=void`), by SimCLR, MoCo v2 or BYOL.
    When to use it: as the baseline of `distill`, `mimic` and `inoculate`: what the images alone are worth, without the
    suspect's features as an answer.
    What it needs: unlabeled images of the encoder's kind.
    Known limits: from scratch a few thousand images give a poor encoder. Continued, a high learning rate makes the
    suspect forget accuracy and backdoor alike: no loss speaks against the backdoor. A head that was trained on the
    suspect's features does not fit those of the result.

    Settings are those of `training/pretraining`, but for the epochs, which few images need more of.
    """

    name: ClassVar[str] = "pretrain"
    source: ClassVar[str] = "SimCLR 2002.05709, MoCo v2 2003.04297, BYOL 2006.07733"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    method: Literal["simclr", "moco", "byol"] = "simclr"
    start: Literal["suspect", "void"] = "suspect"
    epochs: float = 100
    batch_size: int = 256
    peak: float = 3e-3  # of Adam's rate, one cycle
    weight_decay: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.epochs, self.peak) <= 0 or self.batch_size < 2 or self.weight_decay < 0:
            raise UsageError(
                "pretrain: epochs and peak are positive, batch_size at least 2, weight_decay not negative."
            )

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        student = void(suspect, arch, run) if self.start == "void" else copy.deepcopy(suspect)
        method = METHODS[self.method](self.epochs, self.batch_size, self.peak, self.weight_decay)
        curve = method(student.requires_grad_(True), unlabeled, run, "pretrain").curve
        started = "new weights" if self.start == "void" else "the suspect's weights"
        stages = [f"{self.method} for {self.epochs:g} epochs, from {started}", *halvings(curve)]
        return Cleansed(student.eval(), arch, curve, asdict(self), stages)
