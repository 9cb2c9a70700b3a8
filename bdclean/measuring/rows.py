"""Rows: a trigger towards a target, with its rates, its controls and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bdclean.measuring import intervals
from bdclean.measuring.intervals import lower_bound, rate, upper_bound
from bdclean.measuring.metrics import attack_success
from bdclean.measuring.trial import LEAST_SOURCE, LEVEL, SCREENED, Bench, Target, ranks, stamped_predictions
from bdclean.record.rule import CERTAIN, fails
from bdclean.record.run import (
    FAILS,
    INCONCLUSIVE,
    NOT_MEASURED,
    PASSES,
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


def measure_all(
    bench: Bench,
    jobs: Sequence[tuple[Trigger, Target]],
    chosen: Tensor,
    source: str,
    tried: int,
    found: list[TriggerRow],
) -> list[TriggerRow]:
    rows: list[TriggerRow] = []
    stamped = torch.zeros(0, dtype=torch.int64)
    beside = source == SCREENED or (source != "each" and len(jobs) <= FEW_ROWS)
    for done, (trigger, target) in enumerate(jobs):
        if not done or trigger is not jobs[done - 1][0]:
            stamped = stamped_predictions(bench, trigger, chosen)
        rows.append(_row(bench, trigger, target, chosen, stamped, source, tried, beside))
        found.append(rows[-1])
        bench.tell("measuring", done + 1, len(jobs), failing=sum(row.outcome == FAILS for row in rows))
    return rows


def _row(
    bench: Bench, trigger: Trigger, target: Target, chosen: Tensor, stamped: Tensor, source: str, tried: int,
    beside: bool,
) -> TriggerRow:  # fmt: skip
    """One trigger towards one target on the images `chosen`, corrected for `tried` looks, with its controls.

    `stamped` are the predictions under it. What goes to the target without a stamp, too, is in the rates that are
    shown, and fails no row. A row that passes has controls if `beside`.
    """
    reference, clean = bench.reference[chosen], bench.clean[chosen]
    hits = attack_success(stamped, reference, target, bench.classes)
    base = attack_success(clean, reference, target, bench.classes)
    if bench.hits is not None:
        bench.hits[trigger.spec(), target] = hits
    row = TriggerRow(
        trigger=trigger.spec(),
        family=trigger.family,
        target=target,
        target_source=source,
        images=len(chosen),
        asr=rate(hits),
        base_rate=None if bench.own_reference else rate(base),
        robust_accuracy=rate(stamped == reference),
    )
    if not len(hits):
        return replace(row, outcome=NOT_MEASURED, reason="every image is of the target class")
    wanted = (reference + 1) % bench.classes if target == "next" else torch.full_like(reference, int(target))
    movable = (reference != wanted) & (clean != wanted)
    moved = _Moved(chosen[movable], reference[movable], wanted[movable], stamped[movable])
    n, k = len(moved.chosen), int((moved.stamped == moved.wanted).sum())
    if n == 0:
        return replace(row, outcome=INCONCLUSIVE, reason="every image goes to the target without a stamp")
    level = LEVEL / max(1, tried * bench.readings)
    sources = _sources(moved)
    worst = max(sources, key=lambda s: s[1] / s[2], default=None)
    if worst is not None:
        row.worst_source = _worst_entry(worst, len(sources))
    lows = {c: lower_bound(found, of, level / len(sources)) for c, found, of in sources}
    at_stake = [c for c in sorted(lows, key=lambda c: -lows[c]) if lows[c] >= bench.threshold]
    shown, of = int(hits.sum()), len(hits)
    passes = upper_bound(shown, of, level) < bench.threshold
    low, settled = lower_bound(k, n, level), passes and not at_stake
    if settled and not beside:
        return replace(row, outcome=PASSES)
    decided = settled or low >= max(CERTAIN, bench.threshold)
    first = torch.arange(n) < (SHOWN_IMAGES if decided else CONTROL_IMAGES)
    rates = [float(found.mean()) for found in _controls(bench, trigger, moved, first)]
    if rates:
        ordered = sorted(rates)
        row.control_rate = {
            "median": ordered[len(ordered) // 2],
            "highest": ordered[-1],
            "count": len(ordered),
        }
    if settled:
        return replace(row, outcome=PASSES)
    ceiling = max([*rates, 0.0])
    if fails(low, ceiling, bench.threshold, bool(rates)):
        return replace(row, outcome=FAILS)
    # sources only where the whole does not decide
    highest: dict[int, float] = dict.fromkeys(at_stake, 0.0)
    if at_stake:
        few = torch.isin(moved.reference, torch.tensor(at_stake)) & (ranks(moved.reference) < SOURCE_IMAGES)
        found = _controls(bench, trigger, moved, few)
        highest |= {
            c: max((float(f[moved.reference[few] == c].mean()) for f in found), default=0.0) for c in at_stake
        }
    for c in at_stake:
        if fails(lows[c], highest[c], bench.threshold, bool(rates)):
            return replace(row, outcome=FAILS, reason=f"images of class {c} go to the target")
    if passes:
        c = at_stake[0]
        reason = f"images of class {c} reach the threshold, but under a control {highest[c]:.3f} of them go there, too"
    elif low >= bench.threshold:
        reason = f"reaches the threshold, but a control reaches {ceiling:.3f}"
    elif lower_bound(shown, of, level) >= bench.threshold:
        reason = "reaches the threshold with what goes to the target without a stamp"
    elif (needed := _needed(shown, of, bench.threshold, level)) < MANY:
        reason = f"the interval reaches the threshold: about {needed} images would settle it"
    else:
        reason = "the rate is too near the threshold for any number of images to settle it"
    return replace(row, outcome=INCONCLUSIVE, reason=reason)


@dataclass(frozen=True)
class _Moved:
    """The images that a trigger could move: neither of the target class nor predicted as it unstamped.

    Indices `chosen`, `reference` classes, classes `wanted` under the trigger, predictions `stamped`: int64 [n] each.
    """

    chosen: Tensor
    reference: Tensor
    wanted: Tensor
    stamped: Tensor


def _sources(moved: _Moved) -> list[tuple[int, int, int]]:
    """(source class, hits, n) of every class that has at least LEAST_SOURCE images."""
    hit = moved.stamped == moved.wanted
    sizes = torch.bincount(moved.reference)
    hits = torch.bincount(moved.reference, hit.float(), minlength=len(sizes)).long()
    return [(k, int(hits[k]), int(sizes[k])) for k in (sizes >= LEAST_SOURCE).nonzero().squeeze(1).tolist()]


def _worst_entry(worst: tuple[int, int, int], tried: int) -> dict[str, Any]:
    k, hits, n = worst
    low, high = intervals.wilson(hits, n, LEVEL / tried)
    return {"class": k, "value": hits / n, "n": n, "low": low, "high": high}


def _controls(bench: Bench, trigger: Trigger, moved: _Moved, few: Tensor) -> list[Tensor]:
    """Which of the images `few` (bool [n]) at least CONTROLS controls send to the target: float [m] each."""
    generator = torch.Generator().manual_seed(bench.seed + 1)
    return [
        (stamped_predictions(bench, control, moved.chosen[few]) == moved.wanted[few]).float()
        for control in trigger.controls(CONTROLS, generator)
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
