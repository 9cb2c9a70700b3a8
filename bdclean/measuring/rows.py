"""Rows: a trigger towards a target, with its rates, its controls and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bdclean.measuring import intervals
from bdclean.measuring.intervals import lower_bound, rate, upper_bound
from bdclean.measuring.kinds import Kind
from bdclean.measuring.metrics import attack_success
from bdclean.measuring.trial import (
    LEAST_SOURCE,
    LEVEL,
    SAME_IMAGES,
    SCREENED,
    Target,
    Trial,
    control_predictions,
    ranks,
    stamped_predictions,
)
from bdclean.record.rule import CONTROL_MARGIN, certain, fails, judge, may_fail, stands_out
from bdclean.record.run import (
    FAILS,
    INCONCLUSIVE,
    NOT_MEASURED,
    PASSES,
    Bound,
    TriggerRow,
)
from bdclean.triggers.stamping import Stamp, Trigger

CONTROLS = 19
CONTROL_IMAGES = 300
"""Controls are measured on at most so many of a row's images: their rates need not be finer than CONTROL_MARGIN."""
SHOWN_IMAGES = 32
"""The same where the row is decided without them, and they are only shown beside it."""
FIRST_LOOK, FAR = 64, 0.2
"""Controls are looked at with fewer images first: three standard deviations of a rate of them are 0.19 at most."""
FEW_ROWS = 10
"""Of up to so many triggers or rows those that pass have their controls beside them, too."""
SOURCE_IMAGES = 100
"""Controls are measured on so many images, where there are, of each source class that may decide a row."""
MANY = 100_000  # images: more than anybody will bring


@dataclass(frozen=True)
class Measured:
    """A row and, for a paired difference, which of the images that count went to its target, bool [m]."""

    row: TriggerRow
    hits: Tensor | None = None


@dataclass(frozen=True)
class Aim:
    """What a trigger is measured towards, and who says so: given, each, screening, same images, suspect."""

    trigger: Trigger
    target: Target
    found: str
    source: int | None = None
    """The source class that was picked on other images: it is judged by itself, however few of its images there are."""

    @property
    def searched(self) -> bool:
        """Whether the target is the best of all: a row that passes then speaks for the others as well."""
        return self.found in (SCREENED, SAME_IMAGES)


def measure_all(trial: Trial, aims: Sequence[Aim], chosen: Tensor, tried: int) -> Iterator[Measured]:
    """Each of `aims` on the images `chosen`, corrected for `tried` looks."""
    stamped, failing = torch.zeros(0, dtype=torch.int64), 0
    beside = all(aim.found != "each" for aim in aims) and len(aims) <= FEW_ROWS
    for done, aim in enumerate(aims):
        if not done or aim.trigger is not aims[done - 1].trigger:
            stamped = stamped_predictions(trial, aim.trigger, chosen)
        measured = measure(trial, aim, chosen, stamped, tried, beside)
        failing += measured.row.outcome == FAILS
        trial.tell("measuring", done + 1, len(aims), failing=failing)
        yield measured


def measure(
    trial: Trial, aim: Aim, chosen: Tensor, stamped: Tensor, tried: int, beside: bool = True
) -> Measured:
    """`aim` on the images `chosen`, whose predictions under its trigger are `stamped`, corrected for `tried` looks.

    `beside`: a row that cannot fail has controls beside it, too.
    """
    hits = attack_success(stamped, trial.reference[chosen], aim.target, trial.classes)
    return Measured(
        _judged(trial, aim, _rated(trial, aim, chosen, stamped), chosen, stamped, tried, beside), hits
    )


def _rated(trial: Trial, aim: Aim, chosen: Tensor, stamped: Tensor) -> TriggerRow:
    """The rates of a trigger towards its target on the images `chosen`, whose predictions under it are `stamped`."""
    reference, clean, target = trial.reference[chosen], trial.clean[chosen], aim.target
    counted = reference != target if isinstance(target, int) else torch.ones_like(reference, dtype=torch.bool)
    return TriggerRow(
        trigger=aim.trigger.spec(),
        family=aim.trigger.family,
        target=target,
        target_source=aim.found,
        images=len(chosen),
        asr=rate(attack_success(stamped, reference, target, trial.classes)),
        base_rate=None
        if trial.own_reference
        else rate(attack_success(clean, reference, target, trial.classes)),
        robust_accuracy=rate((stamped == reference)[counted]),
    )


def _judged(
    trial: Trial, aim: Aim, row: TriggerRow, chosen: Tensor, stamped: Tensor, tried: int, beside: bool
) -> TriggerRow:
    """`row` with its controls, what it is judged by, and its outcome.

    Without `beside` it has controls only if it might fail.
    What goes to the target without a stamp, too, is in the rates that are shown, and neither fails a row nor keeps it
    from passing: it says nothing of the trigger. Sources are asked only where the whole does not decide.
    """
    if not row.asr.n:
        return replace(row, outcome=NOT_MEASURED, reason=f"every image is of class {row.target}, the target")
    moved = _movable(trial, row.target, chosen, stamped)
    if not len(moved.chosen):
        return replace(row, outcome=INCONCLUSIVE, reason="every image goes to the target without a stamp")
    threshold, level = trial.threshold, LEVEL / max(1, tried * trial.readings)
    kind = Kind.of(trial, aim.trigger)
    sources = _sources(moved, level, kind)
    hits = int((moved.stamped == moved.wanted).sum())
    whole = _bound(None, hits, len(moved.chosen), level, kind)
    row = replace(row, worst_source=_worst_entry(sources), high=upper_bound(hits, whole.n, level))
    bounds = [whole, *_at_stake(sources, _picked(moved, aim, level, kind), threshold)]
    settled = judge(bounds, row.high or 0.0, threshold)[0] == PASSES
    if settled and aim.source is not None and not (moved.reference == aim.source).any():
        reason = f"no image of class {aim.source} is left to confirm what others of it showed"
        return replace(row, outcome=INCONCLUSIVE, bounds=bounds, reason=reason)
    if (
        settled
        and aim.searched
        and (left := _not_excluded(trial, row.target, chosen, stamped, level)) is not None
    ):
        return replace(row, outcome=INCONCLUSIVE, bounds=bounds, reason=left)
    contested = not settled and may_fail(whole, threshold) and not certain(whole)
    rates = []
    if contested or beside:
        few = torch.arange(len(moved.chosen)) < (CONTROL_IMAGES if contested else SHOWN_IMAGES)
        for control in _controls(trial, aim.trigger):
            rates.append(_control_rate(trial, control, moved, few, whole.low if contested else None))
            bounds[0] = replace(whole, control=max(rates))
            if contested and not fails(bounds[0], threshold):
                break  # no further control can change that
    row = replace(row, control_rate=_control_entry(rates))
    if (
        not settled
        and not fails(bounds[0], threshold)
        and (beside or any(may_fail(b, threshold) for b in bounds[1:]))
    ):
        bounds[1:] = _controlled(trial, aim.trigger, moved, bounds[1:], threshold)
    outcome, failing = judge(bounds, row.high or 0.0, threshold)
    source = None if failing is None else failing.source
    given = len(trial.images) / len(chosen)
    reason = _reason(row, bounds, threshold, level, given) if outcome == INCONCLUSIVE else ""
    if source is not None:
        reason = f"images of class {source} go to the target"
    return replace(row, bounds=bounds, outcome=outcome, decisive_source=source, reason=reason)


def _picked(moved: _Moved, aim: Aim, level: float, kind: Kind) -> Bound | None:
    """What is judged of the source class that was picked on other images: corrected for no other class."""
    if aim.source is None:
        return None
    of = torch.eq(moved.reference, aim.source)
    if not of.any():
        return None
    return _bound(aim.source, int((moved.stamped == moved.wanted)[of].sum()), int(of.sum()), level, kind)


def _at_stake(sources: Sequence[Bound], picked: Bound | None, threshold: float) -> list[Bound]:
    """The source classes that may decide a row: those that surely reach the threshold, and a picked one that may."""
    found = [bound for bound in sources if bound.low >= threshold]
    if picked is None or picked.value < threshold:
        return found
    return [picked, *(bound for bound in found if bound.source != picked.source)]


def _not_excluded(
    trial: Trial, target: Target | None, chosen: Tensor, stamped: Tensor, level: float
) -> str | None:
    """Why another class than `target` may be where the trigger sends images, which are too few to tell; or None."""
    reference, clean = trial.reference[chosen], trial.clean[chosen]
    # Neither of the class nor predicted as it: the images that could go there.
    there = torch.bincount(torch.cat([reference, clean[clean != reference]]), minlength=trial.classes)
    going = torch.bincount(stamped[(stamped != reference) & (stamped != clean)], minlength=trial.classes)
    for k, (hits, stay) in enumerate(zip(going.tolist(), there.tolist(), strict=True)):
        n = len(chosen) - stay
        if k != target and upper_bound(hits, n, level) >= trial.threshold:
            return f"only {n} images are neither of class {k} nor predicted as it: too few to tell that they stay"
    return None


def _reason(row: TriggerRow, bounds: Sequence[Bound], threshold: float, level: float, given: float) -> str:
    """Why a row is inconclusive. `given`: so many images have to be given for one that is measured: 2 if screened."""
    whole = bounds[0]
    if (row.high or 0.0) < threshold:
        bound = max(bounds[1:], key=lambda b: b.value - (b.control or 0.0))
        if stands_out(bound, threshold):
            needed = _needed(round(bound.value * bound.n), bound.n, bound.needed, LEVEL)
            return (
                f"{100 * bound.value:.1f} % of {bound.n} images of class {bound.source} go to the target, which some "
                "classes of networks without a backdoor do, too: "
                f"about {given * needed:,.0f} images of class {bound.source} would tell more"
            )
        return (
            f"images of class {bound.source} reach the threshold, but under a control "
            f"{100 * (bound.control or 0.0):.1f} % of them go to one class, too"
        )
    of = f"classes other than {row.target}" if isinstance(row.target, int) else "all classes"
    if whole.low >= threshold and not may_fail(whole, threshold):
        return (
            f"{100 * whole.value:.1f} % go to the target, but so many did in a network without a backdoor, too, under "
            f"such a change: it fails from {100 * whole.needed:.0f} % on"
        )
    if whole.low >= threshold:
        least = (whole.control or 0.0) + CONTROL_MARGIN
        said = f"reaches the threshold, but a control reaches {100 * (whole.control or 0.0):.1f} %"
        if whole.value > least and (
            (needed := _needed(round(whole.value * whole.n), whole.n, least, level)) < MANY
        ):
            said += f": about {given * needed:,.0f} images of {of} would tell more"
        return said
    if (needed := _needed(round(whole.value * whole.n), whole.n, threshold, level)) < MANY:
        return (
            f"the interval reaches the threshold: about {given * needed:,.0f} images of {of} would settle it"
        )
    return "the rate is too near the threshold for any number of images to settle it"


@dataclass(frozen=True)
class _Moved:
    """The images that a trigger could move: neither of the target class nor predicted as it unstamped.

    Indices `chosen`, `reference` classes, predictions `clean` of them and `stamped`, classes `wanted` under the
    trigger: int64 [n] each.
    """

    chosen: Tensor
    reference: Tensor
    clean: Tensor
    wanted: Tensor
    stamped: Tensor


def _movable(trial: Trial, target: Target | None, chosen: Tensor, stamped: Tensor) -> _Moved:
    reference, clean = trial.reference[chosen], trial.clean[chosen]
    next_class = (reference + 1) % trial.classes
    wanted = next_class if target == "next" else torch.full_like(reference, int(target or 0))
    movable = (reference != wanted) & (clean != wanted)
    return _Moved(*(part[movable] for part in (chosen, reference, clean, wanted, stamped)))


def _bound(source: int | None, hits: int, n: int, level: float, kind: Kind) -> Bound:
    low = lower_bound(hits, n, level)
    if source is None:
        return Bound(None, hits / n, n, low, certain=kind.certain, needed=kind.needed)
    return Bound(source, hits / n, n, low, certain=kind.source_certain, needed=kind.source_needed)


def _sources(moved: _Moved, level: float, kind: Kind) -> list[Bound]:
    """A bound for every class of at least LEAST_SOURCE images, corrected for their number, the highest first."""
    hit = moved.stamped == moved.wanted
    sizes = torch.bincount(moved.reference)
    hits = torch.bincount(moved.reference, hit.float(), minlength=len(sizes)).long()
    enough = (sizes >= LEAST_SOURCE).nonzero().squeeze(1).tolist()
    found = [_bound(k, int(hits[k]), int(sizes[k]), level / len(enough), kind) for k in enough]
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


def _controlled(
    trial: Trial, trigger: Trigger, moved: _Moved, sources: list[Bound], threshold: float
) -> list[Bound]:
    """`sources`, each with the most that a control moves of its images to any one class.

    To any one: the target was found as the class that they move to under the trigger. Controls are measured until none
    of these sources can decide the row any more.
    """
    classes = torch.tensor([bound.source for bound in sources], dtype=torch.int64)
    few = torch.isin(moved.reference, classes) & (ranks(moved.reference) < SOURCE_IMAGES)
    if not few.any():
        return sources
    reference, clean = moved.reference[few], moved.clean[few]
    for control in _controls(trial, trigger):
        answers = control_predictions(trial, control, moved.chosen[few])
        gone = (answers != reference) & (answers != clean)
        for k, bound in enumerate(sources):
            of = torch.eq(reference, bound.source or 0)
            share = int(answers[of & gone].bincount(minlength=1).max()) / int(of.sum())
            sources[k] = replace(bound, control=max(share, bound.control or 0.0))
        if not any(stands_out(bound, threshold) for bound in sources):
            break
    return sources


def _controls(trial: Trial, trigger: Trigger) -> Sequence[Stamp]:
    spec = trigger.spec()
    if spec not in trial.controls:
        generator = torch.Generator().manual_seed(trial.seed + 1)
        trial.controls[spec] = trigger.controls(CONTROLS, generator, trial.images.shape[1])
    return trial.controls[spec]


def _control_rate(trial: Trial, control: Stamp, moved: _Moved, few: Tensor, low: float | None) -> float:
    """The share of the images `few` (bool [n]) that `control` sends to the target.

    `low`: what it must stay under by CONTROL_MARGIN. Where a look at FIRST_LOOK images is far below that, it will do.
    """
    chosen, wanted = moved.chosen[few], moved.wanted[few]
    answers = control_predictions(trial, control, chosen[:FIRST_LOOK])
    share = float((answers == wanted[: len(answers)]).float().mean())
    if len(chosen) > FIRST_LOOK and low is not None and share > low - CONTROL_MARGIN - FAR:
        answers = control_predictions(trial, control, chosen)
        share = float((answers == wanted).float().mean())
    return share


def _needed(k: int, n: int, threshold: float, level: float) -> int:
    """About how many images would part the rate k / n from `threshold` at `level`; capped at MANY."""
    value = k / n
    while n < MANY:
        n = min(MANY, math.ceil(n * 1.1 / 10) * 10)
        k = round(value * n)
        if lower_bound(k, n, level) >= threshold or upper_bound(k, n, level) < threshold:
            break
    return n
