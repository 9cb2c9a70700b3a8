"""What an attack on a network that stands is tried with: a threat, images to tune on, and a trial that scores it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch

from bdclean.data.imageset import ImageSet
from bdclean.measuring.intervals import rate
from bdclean.measuring.metrics import attack_success
from bdclean.measuring.trial import Target, Trial, make_predictor, stamped_predictions
from bdclean.networks.classifier import Classifier
from bdclean.record.rates import Rate
from bdclean.training.run import Precision, Run
from bdclean.triggers.stamping import Stamp, Trigger

SCORED = 1000
"""So many images are scored at most: a network is scored over and over, and a rate of so many is known to 3 points."""


@dataclass(frozen=True)
class Threat:
    """A trigger, and where it sends images."""

    trigger: Trigger
    target: Target

    def control(self, seed: int, channels: int) -> Stamp:
        """A stamp of the same place and strength with other content, which no network was trained on.

        The second control: the first one of stripes has a frequency near theirs, which their backdoor obeys as well
        (a network with 0.87 for the trigger: 0.71 to 0.96, of second ones 0.01 to 0.20).
        """
        return self.trigger.controls(2, torch.Generator().manual_seed(seed), channels)[1]


@dataclass(frozen=True)
class Ground:
    """`tuning`: labeled images that an attacker has, in random order; `trial`: others, and what they are held against.

    The trial's own network does not matter: it is lent its images and their reference classes.
    """

    tuning: ImageSet
    trial: Trial
    device: torch.device
    batch_size: int | None = None

    @staticmethod
    def of(
        tuning: ImageSet, trial: Trial, device: torch.device, batch_size: int | None, most: int = SCORED
    ) -> Ground:
        """`tuning`, whose classes are the network's, in random order, and at most so many images of `trial`, both drawn
        by its seed: as they come, the first ones may be of one class."""
        names = tuple(map(str, range(trial.classes)))
        tuning = tuning.select(
            torch.randperm(len(tuning), generator=torch.Generator().manual_seed(trial.seed))
        )
        if len(trial.images) > most:
            drawn = torch.randperm(len(trial.images), generator=torch.Generator().manual_seed(trial.seed))
            some = drawn[:most].sort().values
            trial = replace(
                trial, images=trial.images[some], reference=trial.reference[some], clean=trial.clean[some]
            )
        return Ground(replace(tuning, classes=names), trial, device, batch_size)

    @property
    def channels(self) -> int:
        return self.trial.images.shape[1]

    def run(self) -> Run:
        """In float32, as everything is measured, with channels last: on processors a quarter sooner, or the same."""
        return Run(self.device, Precision(channels_last=True), self.trial.seed)

    def asked(self, model: Classifier, suspect: bool = False) -> Trial:
        """The trial of `model`, of which a copy is asked.

        `suspect`: it is the one whose own answers are the reference classes where there are no labels.
        """
        copied = copy.deepcopy(model).eval().requires_grad_(False)
        predict = make_predictor(copied, self.device, self.batch_size, self.trial.images)
        return replace(
            self.trial,
            predict=predict,
            clean=predict(self.trial.images),
            own_reference=suspect and not self.trial.labeled,
        )


def success(trial: Trial, stamp: Stamp, target: Target) -> Rate:
    """The attack success rate of `stamp` on all images of `trial`."""
    everything = torch.arange(len(trial.images))
    stamped = stamped_predictions(trial, stamp, everything)
    return rate(attack_success(stamped, trial.reference, target, trial.classes))


def base_rate(trial: Trial, target: Target) -> Rate:
    """The same without a stamp; null where it is 0 by construction."""
    if trial.own_reference:
        return Rate(None, len(trial.images))
    return rate(attack_success(trial.clean, trial.reference, target, trial.classes))


def accuracy(trial: Trial) -> Rate:
    """The share of images that are given their reference class, null where it is 1 by construction.

    Without labels it is agreement with the suspect.
    """
    if trial.own_reference:
        return Rate(None, len(trial.images))
    return rate(trial.clean == trial.reference)
