"""What a cleansing leaves behind, in sentences and in tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from bdclean.record.rates import Rate
from bdclean.record.run import RunRecord
from bdclean.record.sequela import TRIGGER, Injection, Membership, PathPoint, Reactivation, Sequela
from bdclean.report import wording
from bdclean.report.rows import Table

TITLE = "What is left behind"
PARTS = {"reinjection": "Re-injection", "retuning": "Re-tuning"}


def sentences(record: RunRecord) -> list[str]:
    """Returns a sentence for each question that was answered; what was not is among what was not done."""
    found = record.sequela
    if found is None:
        return []
    said = [_told(row) for row in found.membership]
    for part, title in PARTS.items():
        rows = [row for row in found.injections if row.part == part]
        rows.sort(key=_arm)
        for (model, trigger, poisoned, images), some in groupby(rows, key=_arm):
            told = "; ".join(f"{row.stamped if row.poisoned else TRIGGER} {_rise(row)}" for row in some)
            said.append(
                f"{title} of {trigger} into the {model}, {poisoned} of {images} images poisoned: {told}."
            )
    for (model, trigger), changes in groupby(found.reactivation, key=lambda row: (row.model, row.trigger)):
        rates = ", ".join(f"{row.change} {wording.rate(row.asr)}" for row in changes)
        said.append(f"Re-activation of {trigger} on the {model}, ASR %: {rates}.")
    for trigger, points in groupby(found.path, key=lambda point: point.trigger):
        said.append(_walked(trigger, list(points)))
    return said


def tables(record: RunRecord) -> list[Table]:
    """Returns the same in full; empty tables are for the caller to leave out."""
    found = record.sequela
    if found is None:
        return []
    names = record.class_names()
    injected = [_injections(found, part, title, names) for part, title in PARTS.items()]
    return [_membership(found), *injected, _reactivation(found, names), _path(found, names)]


# --- sentences ----------------------------------------------------------------------------------------------


def _told(row: Membership) -> str:
    """How well one network tells one group of images from those that it was not trained on."""
    who = "the images of --members" if row.members == "given" else "the images to cleanse with"
    low = [
        f"{wording.rate(each.true_positive_rate)} % are told at {_share(each.false_positive_rate)} false positives"
        if each.true_positive_rate.value is not None
        else f"at {_share(each.false_positive_rate)} not measured ({each.reason})"
        for each in row.low
    ]
    moved = [] if row.change is None else [f"change {_area(row.change)}"]
    parts = ", ".join([f"AUC {_area(row.auc)}", *moved, *low])
    return f"Membership of {who}, by the {row.model}'s loss on {row.loss}: {parts}."


def _share(rate: float) -> str:
    return f"{100 * rate:g} %"


def _arm(row: Injection) -> tuple[str, str, int, int]:
    return row.model, row.trigger, row.poisoned, row.images


def _rise(row: Injection) -> str:
    """When half of the images obey; what was not reached is a bound, no number."""
    if not row.scores:
        return "not measured"
    ends = f"{wording.percent(row.scores[0].asr.value)} -> {wording.percent(row.scores[-1].asr.value)} %"
    return f"{ends}, {_reached(row)}"


def _reached(row: Injection) -> str:
    if row.reached == 0:
        return "50 % from the start"
    return f"50 % not by step {row.until}" if row.reached is None else f"50 % by step {row.reached}"


def _walked(trigger: str, points: Sequence[PathPoint]) -> str:
    rates = ", ".join(f"{point.share:g}: {wording.percent(point.asr.value)}" for point in points)
    return f"Path from suspect to output, ASR % of {trigger} by share of the output: {rates}."


# --- tables -------------------------------------------------------------------------------------------------


def _membership(found: Sequela) -> Table:
    columns = ["network", "members", "images", "non-members", "loss of", "AUC", "change"]
    columns += [f"told at {100 * wrong:g} % false positives, %" for wrong in _wrong_rates(found.membership)]
    rows = [
        [
            row.model,
            row.members,
            f"{row.images:,}",
            f"{row.non_members:,}",
            row.loss,
            _area(row.auc),
            _area(row.change),
            *(
                wording.rate(each.true_positive_rate)
                if each.true_positive_rate.value is not None
                else f"not measured: {each.reason}"
                for each in row.low
            ),
        ]
        for row in found.membership
    ]
    note = "Members are told by a low loss; an AUC of 0.5 is chance. Change: of the output against the suspect, paired."
    return Table("Membership", columns, rows, note, whole_calm=True)


def _wrong_rates(rows: Iterable[Membership]) -> list[float]:
    return next(([each.false_positive_rate for each in row.low] for row in rows), [])


def _injections(found: Sequela, part: str, title: str, names: Sequence[str] | None) -> Table:
    rows = [row for row in found.injections if row.part == part]
    steps = sorted({score.steps for row in rows for score in row.scores})
    cells = []
    for row in rows:
        at = {score.steps: score for score in row.scores}
        last = row.scores[-1] if row.scores else None
        cells.append(
            [
                row.model,
                row.trigger,
                wording.label(row.target, names),
                row.stamped,
                f"{row.poisoned} of {row.images}",
                *(wording.rate(at[step].asr if step in at else None) for step in steps),
                _reached(row),
                wording.rate(last.base_rate if last else None),
                wording.rate(last.accuracy if last else None),
            ]
        )
    columns = ["network", "trigger", "target", "stamped", "poisoned", *(f"ASR % at {step}" for step in steps)]
    columns += ["reached", "base % at last", f"{_right(found)} % at last"]
    note = (
        "ASR of the stamp that was put in, by steps of tuning; none are taken once it is 90 %. Control: a stamp of the "
        "trigger's place and strength with other content, which is new to every network. What was not reached is only "
        f"known not to be by the last step. Tuned on, and held against, {found.labels}."
    )
    return Table(title, columns, cells, note, whole_calm=True)


def _reactivation(found: Sequela, names: Sequence[str] | None) -> Table:
    def cells(row: Reactivation) -> list[str]:
        target = wording.label(row.target, names)
        return [
            row.model,
            row.trigger,
            target,
            row.change,
            wording.rate(row.asr),
            wording.rate(row.base_rate),
        ]

    note = (
        "One perturbation for all images, learnt on others; what it does on top of nothing is no backdoor's."
    )
    columns = ["network", "trigger", "target", "change", "ASR %", "base %"]
    return Table("Re-activation", columns, [cells(row) for row in found.reactivation], note, whole_calm=True)


def _path(found: Sequela, names: Sequence[str] | None) -> Table:
    columns = ["share of the output", "trigger", "target", "ASR %", "base %", f"{_right(found)} %"]
    rows = [
        [
            f"{point.share:g}",
            point.trigger,
            wording.label(point.target, names),
            wording.rate(point.asr),
            wording.rate(point.base_rate),
            wording.rate(point.accuracy),
        ]
        for point in found.path
    ]
    note = "Between the ends batch norm has the statistics of the images to cleanse with."
    return Table("Path from suspect to output", columns, rows, note, whole_calm=True)


def _right(found: Sequela) -> str:
    """What the share of images that are given their reference class is."""
    return "accuracy" if found.labels == "labels" else "agreement"


def _area(found: Rate | None) -> str:
    """An area or a difference of two, with its interval."""
    if found is None or found.value is None:
        return wording.NOTHING
    if found.low is None or found.high is None:
        return f"{found.value:.3f} (n {found.n})"
    joint = " to " if found.low < 0 else "-"
    return f"{found.value:.3f} ({found.low:.3f}{joint}{found.high:.3f}, n {found.n})"
