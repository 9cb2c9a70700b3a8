"""Screening: growing samples of one half of the images, until a trigger is below the threshold or sure to survive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bdclean.measuring import intervals
from bdclean.measuring.intervals import lower_bound, upper_bound
from bdclean.measuring.trial import (
    LEVEL,
    SCREENED_OUT,
    Target,
    Trial,
    ranks,
    stamped_predictions,
    telling_images,
)
from bdclean.record.run import PASSES, Rate, TriggerRow
from bdclean.triggers.stamping import Trigger

FIRST_LOOK, SECOND_LOOK = 64, 256
"""Sample sizes at which screening looks: 64 images, then half as many more as are needed to tell of each class by
itself (just as many where those are over 256), then twice as many each time, at last the whole half.

Just as many of ten classes miss 7 of 120 simulated sources of which 30 % move, half as many more 1 of 120."""
SURE_LOOK = 256
"""From so many images on a trigger that surely reaches the threshold is looked at no further, though another class may
gain as much: what is told apart from controls does not hang on the third digit of a gain."""
LOOK_LEVEL = 0.001
LEAST_PAIR = 3
"""Of fewer images a source class is not picked: even if all of them moved, as many others could not confirm it."""


@dataclass(frozen=True)
class Pair:
    """A source class and the class that a trigger sends `hits` of its `counted` images to."""

    source: int
    target: int
    hits: int
    counted: int

    def open(self, threshold: float) -> bool:
        """Whether `threshold` is still possible: only if half of it is seen, of few images all of it."""
        if self.counted == 0 or upper_bound(self.hits, self.counted, LEVEL) < threshold:
            return False
        many = upper_bound(0, self.counted, LEVEL) < threshold
        return self.hits >= threshold * self.counted / (2 if many else 1)


@dataclass(frozen=True)
class Look:
    """What stamping the images of a look does."""

    target: Target
    """The class with the largest gain over unstamped images, or "next"; with no gain the class least excluded."""
    gain: float
    hits: int
    counted: int
    """Of `counted` images of other classes `hits` went to the target."""
    low: float
    """The lower bound of those that went there and do not without a stamp."""
    highest: float
    """The highest upper bound of any class, and of label + 1 in place of a class."""
    others: float
    """The same of all but the target."""
    pairs: tuple[Pair, ...]
    """Of source classes and where they go, those that are still open, the strongest first."""


def look_at(trial: Trial, chosen: Tensor, stamped: Tensor) -> Look:
    """What the predictions `stamped` on the stamped images `chosen` say."""
    reference, clean = trial.reference[chosen], trial.clean[chosen]
    rates = list(_rates(trial, reference, clean, stamped))
    if trial.classes == 2:
        rates.pop()  # which is each class in turn
    best = max(rates, key=lambda rate: (rate.gain, rate.target != "next"))
    if best.gain <= 0:
        best = max(rates[: trial.classes], key=lambda rate: rate.high)
    pairs = [pair for pair in _pairs(trial, reference, clean, stamped) if pair.open(trial.threshold)]
    if pairs and best.gain < trial.threshold:
        best = next(rate for rate in rates if rate.target == pairs[0].target)
    others = max(rate.high for rate in rates if rate is not best)
    return Look(
        best.target,
        best.gain,
        best.hits,
        best.counted,
        best.low,
        max(best.high, others),
        others,
        tuple(pairs),
    )


@dataclass(frozen=True)
class _Rate:
    """Of `counted` images `hits` go to a target under the stamp, `before` without it.

    `moved` of those that do not go there without it, the `movable`, go there under it.
    """

    target: Target
    hits: int
    before: int
    counted: int
    moved: int

    @property
    def movable(self) -> int:
        return self.counted - self.before

    @property
    def gain(self) -> float:
        return (self.hits - self.before) / max(1, self.counted)

    @property
    def high(self) -> float:
        return upper_bound(self.moved, self.movable, LOOK_LEVEL)

    @property
    def low(self) -> float:
        return lower_bound(self.moved, self.movable, LOOK_LEVEL)


def _rates(trial: Trial, reference: Tensor, clean: Tensor, stamped: Tensor) -> Iterator[_Rate]:
    """Of every class, the images of other classes that go there; at last of label + 1 in place of a class."""
    sizes, hits, before, moved = (
        torch.bincount(classes, minlength=trial.classes)[: trial.classes].tolist()
        for classes in (
            reference, stamped[stamped != reference], clean[clean != reference],
            stamped[(stamped != reference) & (stamped != clean)],
        )
    )  # fmt: skip
    for k in range(trial.classes):
        yield _Rate(k, hits[k], before[k], len(reference) - sizes[k], moved[k])
    following = (reference + 1) % trial.classes
    arrived, there = stamped == following, clean == following
    anew = int((arrived & ~there).sum())
    yield _Rate("next", int(arrived.sum()), int(there.sum()), len(reference), anew)


def _pairs(trial: Trial, reference: Tensor, clean: Tensor, stamped: Tensor) -> list[Pair]:
    """Every source class and where its images go, the highest lower bound first, without those that go there anyhow."""
    sizes = torch.bincount(reference, minlength=1)
    going = (stamped != reference) & (stamped != clean) & (sizes[reference] >= LEAST_PAIR)
    keys, hits = (reference[going] * trial.classes + stamped[going]).unique(return_counts=True)
    there, times = (reference * trial.classes + clean).unique(return_counts=True)
    already = dict(zip(there.tolist(), times.tolist(), strict=True))
    found = [
        Pair(
            key // trial.classes,
            key % trial.classes,
            k,
            int(sizes[key // trial.classes]) - already.get(key, 0),
        )
        for key, k in zip(keys.tolist(), hits.tolist(), strict=True)
    ]
    return sorted(found, key=lambda pair: -lower_bound(pair.hits, pair.counted, LEVEL))


@dataclass(frozen=True)
class Screened:
    """A trigger, and what the last look at the images of one half said; `stamped` are its predictions on them."""

    trigger: Trigger
    half: Tensor
    stamped: Tensor
    look: Look
    survives: bool

    @property
    def target(self) -> Target:
        return self.look.target

    @property
    def seen(self) -> int:
        return len(self.stamped)

    def source(self, target: Target) -> int | None:
        """The source class that is picked towards `target`, if one is."""
        return next((pair.source for pair in self.look.pairs if pair.target == target), None)


def screen(trial: Trial, trigger: Trigger, half: Tensor) -> Screened:
    """Look at growing samples of `half` until every class is below the threshold, or the half is used up.

    Classes have as many images in a sample as there are of them, up to the same number. Each look adds images to those
    of the last one. A trigger is dropped where no class, nor label + 1, may reach the threshold (level 0.001 a look),
    and no source class (0.05). One that is sure to survive is looked at no further: where the lower bound of its target
    is at the threshold, and no other class can gain as much or SURE_LOOK images were seen.
    """
    half = half[ranks(trial.reference[half]).argsort(stable=True)]
    stamped = torch.zeros(0, dtype=torch.int64)
    telling = telling_images(trial.threshold) * len(trial.reference[half].unique())
    for size in _looks(len(half), telling):
        stamped = torch.cat([stamped, stamped_predictions(trial, trigger, half[len(stamped) : size])])
        look = look_at(trial, half[:size], stamped)
        if look.highest < trial.threshold and not look.pairs and size >= min(telling, len(half)):
            return Screened(trigger, half, stamped, look, False)
        if look.low >= trial.threshold and (look.low > look.others or size >= SURE_LOOK):
            break
    return Screened(trigger, half, stamped, look, True)


def to_the_end(trial: Trial, screened: Screened) -> Screened:
    """`screened` after a look at the whole half."""
    rest = stamped_predictions(trial, screened.trigger, screened.half[screened.seen :])
    stamped = torch.cat([screened.stamped, rest])
    return Screened(
        screened.trigger, screened.half, stamped, look_at(trial, screened.half, stamped), screened.survives
    )


def _looks(n: int, telling: int) -> list[int]:
    """Sizes of samples of `n` images, the second of which tells of each class."""
    sizes, size = [FIRST_LOOK], max(2 * FIRST_LOOK, telling, min(SECOND_LOOK, telling * 3 // 2))
    while size < n:
        sizes.append(size)
        size *= 2
    return [size for size in sizes if size < n] + [n]


def dropped(screened: Screened) -> TriggerRow:
    look = screened.look
    low, high = intervals.wilson(look.hits, look.counted)
    value = look.hits / look.counted if look.counted else None
    return TriggerRow(
        trigger=screened.trigger.spec(),
        family=screened.trigger.family,
        target=look.target,
        target_source=SCREENED_OUT,
        images=screened.seen,
        asr=Rate(value, look.counted, low, high),
        outcome=PASSES,
        reason=f"every class is below the threshold (one-sided level {LOOK_LEVEL} a look)",
    )
