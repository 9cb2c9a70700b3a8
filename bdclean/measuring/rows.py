"""Rows: a trigger towards a target, with its rates, its controls and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bdclean.measuring import intervals
from bdclean.measuring.intervals import lower_bound, rate, upper_bound
from bdclean.measuring.metrics import attack_success
from bdclean.measuring.trial import LEAST_SOURCE, LEVEL, SCREENED, Target, Trial, ranks, stamped_predictions
from bdclean.record.rule import CERTAIN, fails, judge
from bdclean.record.run import (
    FAILS,
    INCONCLUSIVE,
    NOT_MEASURED,
    PASSES,
    Bound,
    TriggerRow,
)
from bdclean.triggers.stamping import Trigger

CONTROLS = 19
CONTROL_IMAGES = 300
"""Controls are measured on at most so many of a row's images: their rates need not be finer than CONTROL_MARGIN."""
SHOWN_IMAGES = 100
"""The same where the row is decided without them, and they are only shown beside it."""
FEW_ROWS = 10
"""Up to so many rows that pass have their controls beside them, too, where triggers are not screened."""


SOURCE_IMAGES = 100
"""Controls are measured on so many images, where there are, of each source class that may decide a row."""
MANY = 100_000  # images: more than anybody will bring


@dataclass(frozen=True)
class Measured:
    """A row and, for a paired difference, which of the images that count went to its target, bool [m]."""

    row: TriggerRow
    hits: Tensor | None = None


def measure_all(
    trial: Trial, jobs: Sequence[tuple[Trigger, Target]], chosen: Tensor, source: str, tried: int
) -> Iterator[Measured]:
    """Each of `jobs` on the images `chosen`, corrected for `tried` looks; `source` says where the targets are from."""
    stamped, failing = torch.zeros(0, dtype=torch.int64), 0
    beside = source == SCREENED or (source != "each" and len(jobs) <= FEW_ROWS)
    for done, (trigger, target) in enumerate(jobs):
        if not done or trigger is not jobs[done - 1][0]:
            stamped = stamped_predictions(trial, trigger, chosen)
        hits = attack_success(stamped, trial.reference[chosen], target, trial.classes)
        row = _judged(
            trial,
            trigger,
            _rated(trial, trigger, target, chosen, stamped, source),
            chosen,
            stamped,
            tried,
            beside,
        )
        failing += row.outcome == FAILS
        trial.tell("measuring", done + 1, len(jobs), failing=failing)
        yield Measured(row, hits)


def _rated(
    trial: Trial, trigger: Trigger, target: Target, chosen: Tensor, stamped: Tensor, source: str
) -> TriggerRow:
    """The rates of one trigger towards one target on the images `chosen`, whose predictions under it are `stamped`."""
    reference, clean = trial.reference[chosen], trial.clean[chosen]
    return TriggerRow(
        trigger=trigger.spec(),
        family=trigger.family,
        target=target,
        target_source=source,
        images=len(chosen),
        asr=rate(attack_success(stamped, reference, target, trial.classes)),
        base_rate=None
        if trial.own_reference
        else rate(attack_success(clean, reference, target, trial.classes)),
        robust_accuracy=rate(stamped == reference),
    )


def _judged(
    trial: Trial, trigger: Trigger, row: TriggerRow, chosen: Tensor, stamped: Tensor, tried: int, beside: bool
) -> TriggerRow:
    """`row` with its controls, what it is judged by, and its outcome. A row that passes has controls if `beside`.

    What goes to the target without a stamp, too, is in the rates that are shown, and fails no row. Sources are asked
    only where the whole does not decide.
    """
    if not row.asr.n:
        return replace(row, outcome=NOT_MEASURED, reason="every image is of the target class")
    moved = _movable(trial, row.target, chosen, stamped)
    if not len(moved.chosen):
        return replace(row, outcome=INCONCLUSIVE, reason="every image goes to the target without a stamp")
    threshold, level = trial.threshold, LEVEL / max(1, tried * trial.readings)
    sources = _sources(moved, level)
    shown = round((row.asr.value or 0.0) * row.asr.n)
    whole = _bound(None, int((moved.stamped == moved.wanted).sum()), len(moved.chosen), level)
    row = replace(row, worst_source=_worst_entry(sources), high=upper_bound(shown, row.asr.n, level))
    bounds = [whole, *(s for s in sources if s.low >= threshold)]
    settled = judge(bounds, row.high or 0.0, threshold)[0] == PASSES
    if settled and not beside:
        return replace(row, outcome=PASSES, bounds=bounds)
    few = SHOWN_IMAGES if settled or whole.low >= max(CERTAIN, threshold) else CONTROL_IMAGES
    rates = [float(f.mean()) for f in _controls(trial, trigger, moved, torch.arange(len(moved.chosen)) < few)]
    bounds[0] = replace(whole, control=max(rates, default=None))
    row = replace(row, control_rate=_control_entry(rates))
    if not settled and not fails(bounds[0], threshold):
        bounds[1:] = _controlled(trial, trigger, moved, bounds[1:])
    outcome, failing = judge(bounds, row.high or 0.0, threshold)
    source = None if failing is None else failing.source
    reason = _reason(row, bounds, shown, threshold, level) if outcome == INCONCLUSIVE else ""
    if source is not None:
        reason = f"images of class {source} go to the target"
    return replace(row, bounds=bounds, outcome=outcome, decisive_source=source, reason=reason)


def _reason(row: TriggerRow, bounds: Sequence[Bound], shown: int, threshold: float, level: float) -> str:
    """Why a row is inconclusive."""
    n, whole = row.asr.n, bounds[0]
    if (row.high or 0.0) < threshold:
        bound = bounds[1]
        return (
            f"images of class {bound.source} reach the threshold, but under a control {bound.control or 0.0:.3f} of "
            "them go there, too"
        )
    if whole.low >= threshold:
        return f"reaches the threshold, but a control reaches {whole.control or 0.0:.3f}"
    if lower_bound(shown, n, level) >= threshold:
        return "reaches the threshold with what goes to the target without a stamp"
    if (needed := _needed(shown, n, threshold, level)) < MANY:
        return f"the interval reaches the threshold: about {needed} images would settle it"
    return "the rate is too near the threshold for any number of images to settle it"


@dataclass(frozen=True)
class _Moved:
    """The images that a trigger could move: neither of the target class nor predicted as it unstamped.

    Indices `chosen`, `reference` classes, classes `wanted` under the trigger, predictions `stamped`: int64 [n] each.
    """

    chosen: Tensor
    reference: Tensor
    wanted: Tensor
    stamped: Tensor


def _movable(trial: Trial, target: Target | None, chosen: Tensor, stamped: Tensor) -> _Moved:
    reference, clean = trial.reference[chosen], trial.clean[chosen]
    next_class = (reference + 1) % trial.classes
    wanted = next_class if target == "next" else torch.full_like(reference, int(target or 0))
    movable = (reference != wanted) & (clean != wanted)
    return _Moved(chosen[movable], reference[movable], wanted[movable], stamped[movable])


def _bound(source: int | None, hits: int, n: int, level: float) -> Bound:
    return Bound(source, hits / n, n, lower_bound(hits, n, level))


def _sources(moved: _Moved, level: float) -> list[Bound]:
    """A bound for every class of at least LEAST_SOURCE images, corrected for their number, the highest first."""
    hit = moved.stamped == moved.wanted
    sizes = torch.bincount(moved.reference)
    hits = torch.bincount(moved.reference, hit.float(), minlength=len(sizes)).long()
    enough = (sizes >= LEAST_SOURCE).nonzero().squeeze(1).tolist()
    found = [_bound(k, int(hits[k]), int(sizes[k]), level / len(enough)) for k in enough]
    return sorted(found, key=lambda bound: -bound.low)


def _worst_entry(sources: Sequence[Bound]) -> dict[str, int | float | None] | None:
    """The source class that moves most, with the interval that is shown."""
    worst = max(sorted(sources, key=lambda s: s.source or 0), key=lambda s: s.value, default=None)
    if worst is None:
        return None
    low, high = intervals.wilson(round(worst.value * worst.n), worst.n, LEVEL / len(sources))
    return {"class": worst.source, "value": worst.value, "n": worst.n, "low": low, "high": high}


def _control_entry(rates: Sequence[float]) -> dict[str, int | float | None] | None:
    if not rates:
        return None
    ordered = sorted(rates)
    return {"median": ordered[len(ordered) // 2], "highest": ordered[-1], "count": len(ordered)}


def _controlled(trial: Trial, trigger: Trigger, moved: _Moved, sources: Sequence[Bound]) -> list[Bound]:
    """`sources`, each with the highest control on its images."""
    if not sources:
        return []
    classes = torch.tensor([bound.source for bound in sources])
    few = torch.isin(moved.reference, classes) & (ranks(moved.reference) < SOURCE_IMAGES)
    found, reference = _controls(trial, trigger, moved, few), moved.reference[few]
    return [
        replace(bound, control=max((float(f[reference == bound.source].mean()) for f in found), default=None))
        for bound in sources
    ]


def _controls(trial: Trial, trigger: Trigger, moved: _Moved, few: Tensor) -> list[Tensor]:
    """Which of the images `few` (bool [n]) at least CONTROLS controls send to the target: float [m] each."""
    generator = torch.Generator().manual_seed(trial.seed + 1)
    return [
        (stamped_predictions(trial, control, moved.chosen[few]) == moved.wanted[few]).float()
        for control in trigger.controls(CONTROLS, generator, trial.images.shape[1])
    ]


def _needed(k: int, n: int, threshold: float, level: float) -> int:
    """About how many images would part the rate k / n from `threshold` at `level`; capped at MANY."""
    value = k / n
    while n < MANY:
        n = min(MANY, math.ceil(n * 1.1 / 10) * 10)
        k = round(value * n)
        if lower_bound(k, n, level) >= threshold or upper_bound(k, n, level) < threshold:
            break
    return n
