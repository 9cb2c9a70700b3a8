"""The figures of a page: those of its head, and the measures before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bdclean.record.gate import SCORES
from bdclean.record.run import INCONCLUSIVE, Measure, RunRecord, TriggerRow
from bdclean.report import wording
from bdclean.report.page import bars, words
from bdclean.report.ranking import of_source, speaking_source, worst_pair, worst_row
from bdclean.report.rows import beside


@dataclass
class Number:
    """A figure of the page's head or a cell of a table; `before` where there is one."""

    label: str
    value: str
    interval: str = ""
    note: str = ""
    before: str = ""
    change: str = ""
    change_interval: str = ""
    tone: str = ""


@dataclass
class Row:
    """A measure before, after, and how they differ."""

    label: str
    note: str
    cells: list[tuple[str, str]]


def head(record: RunRecord) -> list[Number]:
    """The figures of the head: the worst row beside its floors, and what the network is worth otherwise."""
    names = record.class_names()
    worst = worst_row(record.rows())
    found = []
    if record.before is not None:
        first, now = worst_pair(record)
        if first is not None and now is not None:
            found.append(of_row("Attack success, worst trigger", now, names, first))
        if worst is not None and worst is not now:
            left = of_row("Highest rate left", worst, names)
            harmless = beside(worst) if worst.outcome == INCONCLUSIVE else ""
            found.append(replace(left, note=f"{left.note}; {harmless}" if harmless else left.note))
    elif worst is not None:
        found.append(of_row("Attack success, worst trigger", worst, names))
        controls = worst.control_rate or {}
        base, highest = worst.base_rate, controls.get("highest")
        if base is not None and base.value is not None:
            shown = f"{wording.percent(base.value)}\u00a0%"
            found.append(Number("Base rate", shown, bars.interval(base), "the same images, unstamped"))
        if isinstance(highest, (int, float)):
            note = f"highest of {controls.get('count')} stamps with other content"
            found.append(Number("Controls", f"{wording.percent(highest)}\u00a0%", "", note))
    for name in ("clean_accuracy", "agreement"):
        after = record.measure(name)
        if after is not None and after.value is not None:
            before = of_suspect(record, name)
            change, change_interval = bars.signed(record.measure(f"{name}_change"))
            title, note = words.measure(record, name)
            found.append(
                Number(
                    title,
                    f"{wording.percent(after.value)}\u00a0%",
                    bars.interval(after),
                    note,
                    f"{wording.percent(before.value)}\u00a0%" if before is not None else "",
                    change,
                    change_interval,
                )
            )
    return found[:4]


def of_row(
    title: str, row: TriggerRow, names: Sequence[str] | None, before: TriggerRow | None = None
) -> Number:
    """The rate that speaks for a row, and for the same one `before`: of one source class where that decides."""
    tones = {"fails": "bad", "inconclusive": "doubt"}
    source = speaking_source(row, before)
    now, was = of_source(row, source), of_source(before, source) if before is not None else None
    change, change_interval = bars.signed(row.change) if before is not None and source is None else ("", "")
    said = "" if source is None else f"of {wording.label(source, names)}, "
    return Number(
        title,
        wording.NOTHING if now is None else f"{wording.percent(now.value)}\u00a0%",
        bars.interval(now),
        f"{said}{row.trigger} \u2192 {wording.label(row.target, names)}",
        f"{wording.percent(was.value)}\u00a0%" if was is not None else "",
        change,
        change_interval,
        tones.get(row.outcome, ""),
    )


def of_suspect(record: RunRecord, name: str) -> Measure | None:
    found = record.before.measures if record.before is not None else []
    return next((m for m in found if m.name == name and m.value is not None), None)


def measures(record: RunRecord) -> list[Row]:
    """Each measure, for a cleansing before, after and the difference; scores and what has no other side alone."""
    after = {m.name: m for m in [*record.measures, *(record.after.measures if record.after else [])]}
    names = [m.name for m in record.before.measures] if record.before is not None else []
    rows = []
    for name in dict.fromkeys([*after, *names]):
        if name.endswith("_change"):
            continue
        measure = after.get(name)
        title, note = words.measure(record, name)
        cells = [cell(measure)]
        if record.before is not None:
            before = of_suspect(record, name)
            change = bars.signed(after.get(f"{name}_change"))
            if (
                not change[0]
                and before is not None
                and before.value is not None
                and measure is not None
                and measure.value is not None
            ):
                change = (bars.signed(Measure(name, measure.value - before.value))[0], "no paired interval")
            cells = [cell(before), *cells, change]
        rows.append(Row(title, note, cells))
    return rows


def cell(measure: Measure | None) -> tuple[str, str]:
    if measure is None or measure.value is None:
        return wording.NOTHING, ""
    if measure.name in SCORES:
        return f"{measure.value:.3f}", ""
    return f"{wording.percent(measure.value)}\u00a0%", bars.interval(measure)
