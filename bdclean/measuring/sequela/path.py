"""The path: networks whose weights lie between those of suspect and output. Where on it does the backdoor end?"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from bdclean.errors import Refused
from bdclean.measuring.sequela.ground import Ground, Threat, accuracy, base_rate, success
from bdclean.networks.classifier import Classifier
from bdclean.record.sequela import PathPoint
from bdclean.training.students import choose_augmentation, set_batch_statistics, uncorrupted

SHARES = tuple(k / 10 for k in range(11))
SEEN = 2000
"""So many images give the statistics of batch norm, where there are."""


def along(suspect: Classifier, output: Classifier, threat: Threat, ground: Ground) -> Iterator[PathPoint]:
    """What the networks at each of SHARES of the way from `suspect` to `output` do.

    Statistics of batch norm are those of the images to tune on, taken anew at every point between, since those of two
    networks say nothing of a third one; the two ends are the networks as they are. Raises Refused where they are not of
    one shape.
    """
    run = ground.run()
    images = ground.tuning.images[:SEEN]
    augment = choose_augmentation(suspect, images, run)
    for done, share in enumerate(SHARES, 1):
        model = between(suspect, output, share)
        if 0 < share < 1:
            set_batch_statistics(model, lambda: uncorrupted(images, augment, run, passes=1))
        trial, target = ground.asked(model, share == 0), threat.target
        yield PathPoint(
            share, threat.trigger.spec(), target, success(trial, threat.trigger, target), base_rate(trial, target),
            accuracy(trial),
        )  # fmt: skip
        ground.trial.tell("path", done, len(SHARES))


def between(suspect: Classifier, output: Classifier, share: float) -> Classifier:
    """A network whose tensors are (1 - share) of the suspect's and share of the output's; whole numbers are the
    suspect's."""
    first, last = suspect.state_dict(), output.state_dict()
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in last.items()}:
        raise Refused("suspect and output are not of one shape: no weights lie between theirs.")
    model = copy.deepcopy(suspect).eval()
    mixed = {
        name: torch.lerp(value, last[name].to(value), share) if value.is_floating_point() else value
        for name, value in first.items()
    }
    model.load_state_dict(mixed)
    return model
