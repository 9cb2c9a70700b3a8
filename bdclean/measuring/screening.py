"""Screening: growing samples of one half of the images, until a trigger is below the threshold or sure to survive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdclean.measuring import intervals
from bdclean.measuring.intervals import lower_bound, upper_bound
from bdclean.measuring.trial import LEAST_SOURCE, SCREENED_OUT, Target, Trial, ranks, stamped_predictions
from bdclean.record.run import (
    PASSES,
    Rate,
    TriggerRow,
)
from bdclean.triggers.stamping import Trigger

LOOKS = (64, 256, 1024, 4096)
"""Sample sizes at which screening looks; the last look is always at the whole half."""
LOOK_LEVEL = 0.001


@dataclass
class Screened:
    trigger: Trigger
    target: Target
    seen: int
    """Images that screening looked at; `hits` of `counted` of them went to the target."""
    hits: int
    counted: int
    survives: bool


@dataclass
class Look:
    """What stamping the images of a look does: `hits` of `counted` images [classes] each go to a class."""

    target: int
    """The class with the largest gain over unstamped images, or that of one source where no gain is a backdoor's."""
    base: float
    """The share of unstamped images that go to the target."""
    hits: Tensor
    counted: Tensor
    one_source: bool
    """Whether half or more of some source class moves to one other class: such a backdoor hides in the rest."""


def look_at(trial: Trial, chosen: Tensor, stamped: Tensor) -> Look:
    """What the predictions `stamped` on the stamped images `chosen` say."""
    reference, clean = trial.reference[chosen], trial.clean[chosen]
    sizes = torch.bincount(reference, minlength=trial.classes)[: trial.classes]
    counted = len(chosen) - sizes
    # pairs of source and target, and by how many more images go from one to the other than unstamped
    pairs = torch.cat([reference * trial.classes + predictions for predictions in (stamped, clean)])
    signs = torch.ones(len(pairs)).index_fill(0, torch.arange(len(chosen), len(pairs)), -1)
    pairs, place = pairs.unique(return_inverse=True)
    gained = torch.zeros(len(pairs)).index_add(0, place, signs)
    sources, targets = pairs // trial.classes, pairs % trial.classes
    gained[sources == targets] = 0
    gains = torch.zeros(trial.classes).index_add(0, targets, gained)
    gain = gains / counted.clamp_min(1)
    target = int(gain.argmax())
    share = torch.where(sizes[sources] < LEAST_SOURCE, 0.0, gained / sizes[sources].clamp_min(1))
    one_source = bool(share.max() >= 0.5)
    if one_source and gain[target] < trial.threshold:
        target = int(targets[share.argmax()])
    hits = torch.bincount(stamped[stamped != reference], minlength=trial.classes)
    base = int(hits[target] - gains[target]) / max(1, int(counted[target]))
    return Look(target, base, hits, counted, one_source)


def one_source(trial: Trial, trigger: Trigger, half: Tensor, stamped: Tensor) -> bool:
    """Whether a source class moves, asked before a trigger is dropped whose first images of `half` gave `stamped`.

    Classes with too few images among those to tell get more of their own.
    """
    reference = trial.reference[half]
    few = (ranks(reference) < LEAST_SOURCE) & (torch.bincount(reference)[reference] >= LEAST_SOURCE)
    few[: len(stamped)] = False
    more = half[few]
    if not len(more):
        return False
    chosen = torch.cat([half[: len(stamped)], more])
    return look_at(trial, chosen, torch.cat([stamped, stamped_predictions(trial, trigger, more)])).one_source


def screen(trial: Trial, trigger: Trigger, half: Tensor) -> Screened:
    """Look at growing samples of `half` until every class is below the threshold, or the half is used up.

    Each look adds images to those of the last one. A trigger that is sure to survive is looked at no further: where the
    lower bound of its target is at the threshold (same level), and no other class can gain as much.
    """
    looks = [size for size in LOOKS if size < len(half)] + [len(half)]
    stamped = torch.zeros(0, dtype=torch.int64)
    for size in looks:
        stamped = torch.cat([stamped, stamped_predictions(trial, trigger, half[len(stamped) : size])])
        look = look_at(trial, half[:size], stamped)
        k, n = int(look.hits[look.target]), int(look.counted[look.target])
        counts = zip(look.hits.tolist(), look.counted.tolist(), strict=True)
        bounds = {target: upper_bound(h, c, LOOK_LEVEL) for target, (h, c) in enumerate(counts) if c > 0}
        if max(bounds.values(), default=1.0) < trial.threshold and not (
            look.one_source or one_source(trial, trigger, half, stamped)
        ):
            return Screened(trigger, look.target, size, k, n, False)
        others = [bound for target, bound in bounds.items() if target != look.target]
        low = lower_bound(k, n, LOOK_LEVEL)
        if low >= trial.threshold and low - look.base > max(others, default=0.0):
            return Screened(trigger, look.target, size, k, n, True)
    return Screened(trigger, look.target, len(half), k, n, True)


def dropped(screened: Screened) -> TriggerRow:
    low, high = intervals.wilson(screened.hits, screened.counted)
    value = screened.hits / screened.counted if screened.counted else None
    return TriggerRow(
        trigger=screened.trigger.spec(),
        family=screened.trigger.family,
        target=screened.target,
        target_source=SCREENED_OUT,
        images=screened.seen,
        asr=Rate(value, screened.counted, low, high),
        outcome=PASSES,
        reason=f"every class is below the threshold (one-sided level {LOOK_LEVEL} a look)",
    )
