"""What scan and cleanse share: screening, controls, the outcome of a row and the verdict of a run.

The rules are those of the product's measures: an ASR means nothing without its base rate, its controls and its n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bdclean import metrics
from bdclean.metrics import Predictor, attack_success, lower_bound, rate, upper_bound
from bdclean.record import (
    BACKDOORED,
    FAILS,
    INCONCLUSIVE,
    NO_EVIDENCE,
    NOT_ASSESSED,
    NOT_MEASURED,
    PASSES,
    Measure,
    Rate,
    TriggerRow,
)  # fmt: skip
from bdclean.training import Tell, quiet

LOOKS = (64, 256, 1024, 4096)
"""Sample sizes at which screening looks; the last look is always at the whole half."""
LOOK_LEVEL = 0.001
LEVEL = 0.05
CONTROLS = 19
CONTROL_IMAGES = 300
"""Controls are measured on at most so many of a row's images: their rates need not be finer than CONTROL_MARGIN."""
SHOWN_IMAGES = 100
"""The same where the row is decided without them, and they are only shown beside it."""
FEW_ROWS = 10
"""Up to so many rows that pass have their controls beside them, too, where triggers are not screened."""
CONTROL_MARGIN = 0.1
STAMPED_AT_ONCE = 1000
STAMPED_PIXELS = 1 << 22
"""Images, and pixels of them, that are stamped at once: a float picture takes twelve bytes a pixel, several times."""
CERTAIN = 0.9
LEAST_SCREENED = 200
"""Under this many images there is no screening, and everything is corrected over triggers and classes instead."""
SCREENED, SCREENED_OUT = "screening", "screened out"
LEAST_SOURCE = 10
"""A source class with fewer images gets no rate of its own."""
SOURCE_IMAGES = 100
"""Controls are measured on so many images, where there are, of each source class that may decide a row."""
MANY = 100_000  # images: more than anybody will bring


class Trigger(Protocol):
    """What measuring needs of a trigger."""

    @property
    def family(self) -> str: ...
    def spec(self) -> str: ...
    def __call__(self, images: Tensor) -> Tensor: ...
    def controls(self, count: int, generator: torch.Generator) -> Sequence[Callable[[Tensor], Tensor]]: ...


Target = int | str
"""A class, or "next": label + 1, all-to-all."""


@dataclass(frozen=True)
class Bench:
    """One model, the images it is measured on, and the reference classes that its answers are held against.

    `reference` are labels, or the suspect's clean predictions (`labeled` false); `clean` are this model's own clean
    predictions; both int64 [n]. `own_reference`: the reference is this very model's, so base rates say nothing.
    """

    predict: Predictor
    images: Tensor
    reference: Tensor
    clean: Tensor
    classes: int
    labeled: bool
    own_reference: bool
    threshold: float
    seed: int
    tell: Tell = quiet
    readings: int = 1
    """How many normalisations are tried, of which the worst counts: what is tried is corrected for them, too."""
    hits: dict[tuple[str, Target], Tensor] | None = None
    """Where given, `assess` leaves here which images went to the target, bool [m], for `pair`."""


@dataclass
class _Screened:
    trigger: Trigger
    target: Target
    seen: int
    """Images that screening looked at; `hits` of `counted` of them went to the target."""
    hits: int
    counted: int
    survives: bool


def halves(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two seeded random halves of the indices 0..n-1: one for screening, one for measuring."""
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return shuffled[: n // 2], shuffled[n // 2 :]


def assess(
    bench: Bench,
    triggers: Sequence[Trigger],
    target: str | int = "auto",
    fixed: dict[str, Target] | None = None,
    found: list[TriggerRow] | None = None,
) -> list[TriggerRow]:
    """A row for each of `triggers` (with `target` "each", a row for each trigger and class).

    `target` is "auto", "each", "next" or a class. `fixed` gives targets by trigger SPEC that were found on another
    model (the suspect): those rows are measured, on the measuring half, without screening. `found` gets each row as
    soon as it is known, for the record of a run that does not end.
    """
    found = [] if found is None else found
    n = len(bench.images)
    everything = torch.cat(halves(n, bench.seed))
    if target == "next" or isinstance(target, int):
        jobs = [(trigger, target) for trigger in triggers]
        return _measure_all(bench, jobs, everything, "given", len(jobs), found)
    if target == "each":
        jobs = [(trigger, k) for trigger in triggers for k in range(bench.classes)]
        return _measure_all(bench, jobs, everything, "each", len(jobs), found)
    fixed = fixed or {}
    if n < LEAST_SCREENED:
        jobs = []

        def target_of(trigger: Trigger) -> int:
            return _look(bench, everything, stamped_predictions(bench, trigger, everything)).target

        for done, trigger in enumerate(triggers):
            chosen = fixed.get(trigger.spec())
            jobs.append((trigger, target_of(trigger) if chosen is None else chosen))
            bench.tell("screening", done + 1, len(triggers))
        return _measure_all(bench, jobs, everything, "same images", len(triggers) * bench.classes, found)
    first, second = halves(n, bench.seed)
    screened = []
    for done, trigger in enumerate(triggers):
        if trigger.spec() in fixed:
            screened.append(_Screened(trigger, fixed[trigger.spec()], 0, 0, 0, True))
        else:
            screened.append(_screen(bench, trigger, first))
        if not screened[-1].survives:
            found.append(_dropped(screened[-1]))
        bench.tell("screening", done + 1, len(triggers), kept=sum(s.survives for s in screened))
    survivors = [(s.trigger, s.target) for s in screened if s.survives]
    measured = iter(_measure_all(bench, survivors, second, SCREENED, max(1, len(survivors)), found))
    rows = [next(measured) if s.survives else _dropped(s) for s in screened]
    for row in rows:
        if row.trigger in fixed:
            row.target_source = "suspect"
    return rows


@dataclass
class _Look:
    """What stamping the images of a look does: `hits` of `counted` images [classes] each go to a class."""

    target: int
    """The class with the largest gain over unstamped images, or that of one source where no gain is a backdoor's."""
    base: float
    """The share of unstamped images that go to the target."""
    hits: Tensor
    counted: Tensor
    one_source: bool
    """Whether half or more of some source class moves to one other class: such a backdoor hides in the rest."""


def _look(bench: Bench, chosen: Tensor, stamped: Tensor) -> _Look:
    """What the predictions `stamped` on the stamped images `chosen` say."""
    reference, clean = bench.reference[chosen], bench.clean[chosen]
    sizes = torch.bincount(reference, minlength=bench.classes)[: bench.classes]
    counted = len(chosen) - sizes
    # pairs of source and target, and by how many more images go from one to the other than unstamped
    pairs = torch.cat([reference * bench.classes + predictions for predictions in (stamped, clean)])
    signs = torch.ones(len(pairs)).index_fill(0, torch.arange(len(chosen), len(pairs)), -1)
    pairs, place = pairs.unique(return_inverse=True)
    gained = torch.zeros(len(pairs)).index_add(0, place, signs)
    sources, targets = pairs // bench.classes, pairs % bench.classes
    gained[sources == targets] = 0
    gains = torch.zeros(bench.classes).index_add(0, targets, gained)
    gain = gains / counted.clamp_min(1)
    target = int(gain.argmax())
    share = torch.where(sizes[sources] < LEAST_SOURCE, 0.0, gained / sizes[sources].clamp_min(1))
    one_source = bool(share.max() >= 0.5)
    if one_source and gain[target] < bench.threshold:
        target = int(targets[share.argmax()])
    hits = torch.bincount(stamped[stamped != reference], minlength=bench.classes)
    base = int(hits[target] - gains[target]) / max(1, int(counted[target]))
    return _Look(target, base, hits, counted, one_source)


def stamped_predictions(bench: Bench, stamp: Callable[[Tensor], Tensor], chosen: Tensor) -> Tensor:
    """Predictions, int64 [n], on the images `chosen` under `stamp`: a few at a time, for stamping takes many times
    the memory of the images, which may be more than fit."""
    few = max(1, min(STAMPED_AT_ONCE, STAMPED_PIXELS // bench.images[0, 0].numel()))
    return torch.cat([bench.predict(stamp(bench.images[part])) for part in chosen.split(few)])


def _ranks(reference: Tensor) -> Tensor:
    """Of each image, how many of its class come before it: int64 [n]."""
    order = reference.argsort(stable=True)
    sizes = torch.bincount(reference)
    first = (sizes.cumsum(0) - sizes)[reference[order]]
    return torch.empty_like(order).index_copy(0, order, torch.arange(len(order)) - first)


def _one_source(bench: Bench, trigger: Trigger, half: Tensor, stamped: Tensor) -> bool:
    """Whether a source class moves, asked before a trigger is dropped whose first images of `half` gave `stamped`.

    Classes with too few images among those to tell get more of their own.
    """
    reference = bench.reference[half]
    few = (_ranks(reference) < LEAST_SOURCE) & (torch.bincount(reference)[reference] >= LEAST_SOURCE)
    few[: len(stamped)] = False
    more = half[few]
    if not len(more):
        return False
    chosen = torch.cat([half[: len(stamped)], more])
    return _look(bench, chosen, torch.cat([stamped, stamped_predictions(bench, trigger, more)])).one_source


def _screen(bench: Bench, trigger: Trigger, half: Tensor) -> _Screened:
    """Look at growing samples of `half` until every class is below the threshold, or the half is used up.

    Each look adds images to those of the last one. A trigger that is sure to survive is looked at no further: where the
    lower bound of its target is at the threshold (same level), and no other class can gain as much.
    """
    looks = [size for size in LOOKS if size < len(half)] + [len(half)]
    stamped = torch.zeros(0, dtype=torch.int64)
    for size in looks:
        stamped = torch.cat([stamped, stamped_predictions(bench, trigger, half[len(stamped) : size])])
        look = _look(bench, half[:size], stamped)
        k, n = int(look.hits[look.target]), int(look.counted[look.target])
        counts = zip(look.hits.tolist(), look.counted.tolist(), strict=True)
        bounds = {target: upper_bound(h, c, LOOK_LEVEL) for target, (h, c) in enumerate(counts) if c > 0}
        if max(bounds.values(), default=1.0) < bench.threshold and not (
            look.one_source or _one_source(bench, trigger, half, stamped)
        ):
            return _Screened(trigger, look.target, size, k, n, False)
        others = [bound for target, bound in bounds.items() if target != look.target]
        low = lower_bound(k, n, LOOK_LEVEL)
        if low >= bench.threshold and low - look.base > max(others, default=0.0):
            return _Screened(trigger, look.target, size, k, n, True)
    return _Screened(trigger, look.target, len(half), k, n, True)


def _dropped(screened: _Screened) -> TriggerRow:
    low, high = metrics.wilson(screened.hits, screened.counted)
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


def _measure_all(
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
    if _fails(low, ceiling, bench.threshold, bool(rates)):
        return replace(row, outcome=FAILS)
    # sources only where the whole does not decide
    highest: dict[int, float] = dict.fromkeys(at_stake, 0.0)
    if at_stake:
        few = torch.isin(moved.reference, torch.tensor(at_stake)) & (_ranks(moved.reference) < SOURCE_IMAGES)
        found = _controls(bench, trigger, moved, few)
        highest |= {
            c: max((float(f[moved.reference[few] == c].mean()) for f in found), default=0.0) for c in at_stake
        }
    for c in at_stake:
        if _fails(lows[c], highest[c], bench.threshold, bool(rates)):
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


def _fails(low: float, control: float, threshold: float, controlled: bool) -> bool:
    """The rule of a row: certain by itself, or above the threshold and clearly above every control."""
    return low >= max(CERTAIN, threshold) or (controlled and low >= max(threshold, control + CONTROL_MARGIN))


def _sources(moved: _Moved) -> list[tuple[int, int, int]]:
    """(source class, hits, n) of every class that has at least LEAST_SOURCE images."""
    hit = moved.stamped == moved.wanted
    sizes = torch.bincount(moved.reference)
    hits = torch.bincount(moved.reference, hit.float(), minlength=len(sizes)).long()
    return [(k, int(hits[k]), int(sizes[k])) for k in (sizes >= LEAST_SOURCE).nonzero().squeeze(1).tolist()]


def _worst_entry(worst: tuple[int, int, int], tried: int) -> dict[str, Any]:
    k, hits, n = worst
    low, high = metrics.wilson(hits, n, LEVEL / tried)
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


def verdict(rows: Sequence[TriggerRow]) -> tuple[str, str | None]:
    """The verdict of a run and, where it is `not-assessed`, what is missing."""
    if any(row.outcome == FAILS for row in rows):
        return BACKDOORED, None
    if any(row.outcome == PASSES for row in rows):
        return NO_EVIDENCE, None
    if rows:
        reasons = [row.reason for row in rows if row.reason]
        return (
            NOT_ASSESSED,
            f"no trigger row is conclusive; {reasons[0]}" if reasons else "no trigger row is conclusive",
        )
    return NOT_ASSESSED, "no trigger was measured"


def clean_measures(bench: Bench, rows: Sequence[TriggerRow] = ()) -> list[Measure]:
    """Accuracy with labels, and recall of the class that the worst of `rows` (of the suspect) sends images to.

    Without labels agreement with the suspect, null for the suspect itself.
    """
    if bench.labeled:
        found = metrics.accuracy(bench.clean, bench.reference)
        aimed = [row for row in rows if isinstance(row.target, int) and row.outcome != NOT_MEASURED]
        if aimed:
            worst = max(aimed, key=lambda row: (row.outcome == FAILS, row.asr.value or 0.0))
            of = bench.reference == worst.target
            found.append(metrics.measure("target_class_accuracy", bench.clean[of] == bench.reference[of]))
        return found
    if bench.own_reference:
        return [Measure("agreement", None, len(bench.images))]
    return [metrics.measure("agreement", bench.clean == bench.reference)]


def pair(before: Bench, after: Bench, rows: Sequence[TriggerRow]) -> None:
    """Notes in each of `rows`, of `after`, how its rate differs from that of `before` on the same images."""
    for row in rows:
        key = (row.trigger, row.target if row.target is not None else "")
        old, new = (before.hits or {}).get(key), (after.hits or {}).get(key)
        if old is not None and new is not None and len(old) == len(new):
            found = metrics.paired_difference(old, new, "change")
            row.change = Rate(found.value, found.n, found.low, found.high)


def compare(
    before: Bench, after: Bench, rows_before: Sequence[TriggerRow], rows_after: Sequence[TriggerRow]
) -> list[Measure]:
    """Paired differences, DER and balanced score of the trigger row that was worst before; null without labels."""
    found = []
    if before.labeled:
        change = metrics.paired_difference(
            before.clean == before.reference, after.clean == after.reference, "clean_accuracy_change"
        )
        # without labels `clean_measures` has the agreement already
        found += [change, metrics.measure("agreement", after.clean == before.clean)]
    worst = max(rows_before, key=lambda row: row.asr.value or 0.0, default=None)
    match = next((row for row in rows_after if worst is not None and row.trigger == worst.trigger), None)
    score = rating = None
    if before.labeled and worst is not None and match is not None and worst.base_rate and match.base_rate:
        acc = [float((b.clean == b.reference).float().mean()) for b in (before, after)]
        asr = [row.asr.value or 0.0 for row in (worst, match)]
        excess = [asr[0] - (worst.base_rate.value or 0.0), asr[1] - (match.base_rate.value or 0.0)]
        if excess[0] >= 0.2:
            rating = metrics.defence_effectiveness(acc[0], acc[1], asr[0], asr[1])
            score = metrics.balanced_score(acc[0], acc[1], excess[0], excess[1])
    n = len(before.images)
    return [*found, Measure("defence_effectiveness_rating", rating, n), Measure("balanced_score", score, n)]
