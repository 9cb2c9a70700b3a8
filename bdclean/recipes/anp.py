"""Adversarial neuron pruning: channels whose perturbation brings a backdoor out are switched off."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import ClassVar

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.finetuning import require_labels
from bdclean.recipes.recipe import Cleansed
from bdclean.training.loop import halvings
from bdclean.training.neuron_pruning import NeuronPruning
from bdclean.training.pruning import pruned_channels
from bdclean.training.run import Run
from bdclean.training.students import frozen


@dataclass(frozen=True)
class ANP:
    """Adversarial neuron pruning (Wu, Wang, NeurIPS 2021, arXiv 2110.14430).

    What it does: learns a mask on every channel of batch norm that keeps accuracy while scales and shifts are perturbed
    against it, and switches off the channels with the smallest masks. No weight is trained.
    When to use it: with few labeled images, 1 % of the training set in the paper; to compare.
    What it needs: labeled images, and a network with batch norm.
    Known limits: costs accuracy, most in narrow networks; backdoors that many channels carry stay.

    Settings are the authors' code's. Departures: see `training.neuron_pruning.NeuronPruning`; the threshold is chosen
    on the given labeled images alone, where the authors' code and BackdoorBench sweep it on the test set.
    """

    name: ClassVar[str] = "anp"
    source: ClassVar[str] = "arXiv 2110.14430"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ()

    pruned: float | None = (
        None  # share of all channels; none: those under the largest threshold that accuracy allows
    )
    tolerance: float = 0.1  # of the accuracy, relative
    steps: int = 2000
    batch_size: int = 128
    rate: float = 0.2
    momentum: float = 0.9
    budget: float = 0.4  # of the perturbation, as a share of scales and shifts
    clean: float = 0.2  # weight of the unperturbed loss; the perturbed one has the rest

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2 or self.rate <= 0 or self.budget < 0:
            raise UsageError("anp: steps and rate are positive, batch_size at least 2, budget not negative.")
        if not 0 <= self.clean <= 1 or not 0 <= self.tolerance <= 1 or not 0 <= (self.pruned or 0) < 1:
            raise UsageError("anp: clean and tolerance are shares in [0, 1], pruned one in [0, 1), or none.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        student = frozen(suspect, run)
        before = copy.deepcopy(student)
        prune = NeuronPruning(
            self.pruned, self.tolerance, self.steps, self.batch_size, self.rate, self.momentum, self.budget, self.clean
        )  # fmt: skip
        curve = prune(student, images, run, self.name)
        stages = [
            f"masks learnt in {self.steps} updates on {len(images)} labeled images",
            f"{pruned_channels(before, student)} channels pruned",
            *halvings(curve),
        ]
        return Cleansed(student, arch, curve, asdict(self), stages)
