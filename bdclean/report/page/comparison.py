"""Several runs side by side: a line each, and every trigger in every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bdclean.record.run import RunRecord, TriggerRow
from bdclean.report import wording
from bdclean.report.document import sentence
from bdclean.report.page import bars, numbers, words
from bdclean.report.page.numbers import Number
from bdclean.report.ranking import headline, worst_pair, worst_row
from bdclean.report.rows import TITLES, compared


@dataclass
class Line:
    """One run: its worst row and its accuracy, for a cleansing before and after."""

    number: int
    name: str
    what: str
    verdict: str
    tone: str
    asr: Number
    accuracy: Number
    why: str = ""  # of a run that has no rate: the sentence that says why


@dataclass
class Shade:
    """A rate in the grid: the higher, the deeper its ground. `share` is None where it was not measured."""

    shown: str
    share: float | None
    tone: str
    spoken: str


@dataclass
class Grid:
    """Rates of triggers (rows) in runs (columns), for the triggers that do not pass everywhere."""

    columns: list[tuple[str, str]]
    rows: list[tuple[str, str, list[Shade]]]
    """A trigger, the title over those that a recipe knew as much of (none where it knew nothing), and its rates."""


def lines(records: Sequence[RunRecord]) -> list[Line]:
    """Returns a line for each of the runs, numbered in the order given."""
    return [_line(record, number) for number, record in enumerate(records, 1)]


def grid(records: Sequence[RunRecord]) -> Grid:
    """Returns every trigger in every run; those that a recipe knew most of come last."""
    found, titles = compared(records), ("", *TITLES[1:])
    rows = [
        (name, titles[known], [_shade(side.get(name)) for side in found.sides])
        for name, known in found.known.items()
    ]
    return Grid(found.columns, rows)


def _line(record: RunRecord, number: int) -> Line:
    names = record.class_names()
    first, now = worst_pair(record)
    worst = worst_row(record.rows())
    asr = Number("", wording.NOTHING)
    if first is not None and now is not None:
        asr = numbers.of_row("", now, names, first)
    elif worst is not None:
        asr = numbers.of_row("", worst, names)
    before = numbers.of_suspect(record, "clean_accuracy")
    value, interval = numbers.cell(record.measure("clean_accuracy"))
    change, change_interval = bars.signed(record.measure("clean_accuracy_change"))
    what = [f"cleanse {record.recipe.name}" if record.recipe else record.command]
    if record.seconds is not None:
        what.append(wording.duration(record.seconds))
    return Line(
        number,
        words.name(record),
        ", ".join(what),
        words.heading(record).removesuffix(" of a backdoor"),
        words.tone(record),
        asr,
        Number("", value, interval, "", numbers.cell(before)[0] if before else "", change, change_interval),
        "" if worst is not None else sentence(record),
    )


def _shade(row: TriggerRow | None) -> Shade:
    if row is None or row.asr.value is None:
        return Shade(wording.NOTHING, None, "none", "not measured")
    rate, source = headline(row)
    tone = {"fails": "bad", "inconclusive": "doubt"}.get(row.outcome, "calm")
    share = round(min(1.0, max(0.0, rate.value or 0.0)), 3)
    of = "" if source is None else f" of class {source}"
    return Shade(wording.percent(rate.value), share, tone, f"{row.outcome}, {bars.interval(rate)}{of}")
