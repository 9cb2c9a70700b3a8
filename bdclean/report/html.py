"""RunRecords -> one HTML page that opens offline: no script, nothing loaded, every string of a record escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from bdclean import __version__
from bdclean.record import Measure, RunRecord, TriggerRow
from bdclean.report import bars, embedded, plots, text, words
from bdclean.report.content import LIMITS, facts, page
from bdclean.report.tables import Table, matrix, same, worst_row

IN_BARS = ("Inconclusive", "Not measured")  # lists whose reasons stand beside the bars
TONES = ("bad", "doubt", "none", "calm")  # the order in which a comparison lists runs


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


@dataclass
class Run:
    """One run as the template shows it."""

    record: RunRecord
    anchor: str
    heading: str
    tone: str
    name: str
    sentence: str
    numbers: list[Number]
    meaning: list[str]
    untested: list[str]
    measures: list[Row]
    groups: list[bars.Group]
    strips: list[embedded.Strip]
    masks: list[tuple[str, str]]
    heats: list[embedded.Heat]
    curves: list[tuple[str, Any, float, float]]
    facts: list[tuple[str, str]]
    command: str
    tables: list[Table]
    lists: list[tuple[str, list[str]]]
    threshold: float | None
    names: list[str] | None = None


@dataclass
class Compared:
    """A line of the comparison of several runs."""

    run: Run
    number: int
    recipe: str
    accuracy: Number
    worst: str
    asr: Number
    time: str


def render(records: Sequence[RunRecord]) -> str:
    """Returns the page, in ASCII with character references: the same bytes for the same records, always."""
    # Imported here: no other format needs it.
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def harmless(value: Any) -> Any:
        """Every string that is shown, but what this module built as markup: controls and bidi marks as escapes."""
        return text.plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader("bdclean.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"label": words.label, "number": _plain_number}
    runs = [_run(record, number) for number, record in enumerate(records, 1)]
    several = len(runs) > 1
    shown = environment.get_template("page.html").render(
        runs=runs,
        several=several,
        title=f"{len(runs)} runs" if several else f"{runs[0].heading}: {runs[0].name}",
        compared=_compared(runs) if several else [],
        matrix=matrix(list(records)) if several else None,
        rule=words.RULE,
        limits=LIMITS,
        version=__version__,
    )
    return shown.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _run(record: RunRecord, number: int) -> Run:
    names = record.data.classes if record.data else None
    laid_out = page(record)
    return Run(
        record=record,
        anchor=f"run-{number}",
        heading=words.heading(record),
        tone=words.tone(record),
        name=PurePath(record.checkpoint.path).name or record.checkpoint.path or record.command,
        sentence=words.lead(record),
        numbers=_numbers(record),
        meaning=words.meaning(record),
        untested=words.untested(record),
        measures=_measures(record),
        groups=bars.groups(record),
        strips=embedded.strips(record),
        masks=embedded.masks(record),
        heats=embedded.heats(record),
        curves=plots.curves(record.curve or []),
        facts=_provenance(record),
        command=words.command(record),
        tables=laid_out.tables,
        lists=[(title, items) for title, items in laid_out.lists if title not in IN_BARS],
        threshold=None if record.threshold is None else round(100 * min(1.0, max(0.0, record.threshold)), 2),
        names=names,
    )


def _numbers(record: RunRecord) -> list[Number]:
    """The figures of the head: the worst row beside its floors, and what the network is worth otherwise."""
    names = record.data.classes if record.data else None
    worst = worst_row(record.rows())
    found = []
    if record.before is not None:
        first = worst_row(record.before.triggers)
        now = same(record.rows(), first) if first is not None else None
        if first is not None and now is not None:
            found.append(_rate_number("Attack success, worst trigger of the suspect", now, names, first))
        if worst is not None and worst is not now:
            found.append(_rate_number("Highest that is left", worst, names))
    elif worst is not None:
        found.append(_rate_number("Attack success, worst trigger", worst, names))
        controls = worst.control_rate or {}
        base, highest = worst.base_rate, controls.get("highest")
        if base is not None and base.value is not None:
            shown = f"{text.percent(base.value)} %"
            found.append(Number("Base rate", shown, bars.interval(base), "the same images, unstamped"))
        if isinstance(highest, (int, float)):
            note = f"highest of {controls.get('count')} stamps with other content"
            found.append(Number("Controls", f"{text.percent(highest)} %", "", note))
    for name in ("clean_accuracy", "agreement"):
        after = record.measure(name)
        if after is not None and after.value is not None:
            before = _of_suspect(record, name)
            change, change_interval = bars.signed(record.measure(f"{name}_change"))
            found.append(
                Number(
                    words.MEASURES[name][0],
                    f"{text.percent(after.value)} %",
                    bars.interval(after),
                    words.MEASURES[name][1],
                    f"{text.percent(before.value)} %" if before is not None else "",
                    change,
                    change_interval,
                )
            )
    return found[:4]


def _rate_number(
    title: str, row: TriggerRow, names: Sequence[str] | None, before: TriggerRow | None = None
) -> Number:
    tones = {"fails": "bad", "inconclusive": "doubt"}
    change, change_interval = bars.signed(row.change) if before is not None else ("", "")
    return Number(
        title,
        f"{text.percent(row.asr.value)} %",
        bars.interval(row.asr),
        f"{row.trigger} \u2192 {words.label(row.target, names)}",
        f"{text.percent(before.asr.value)} %" if before is not None else "",
        change,
        change_interval,
        tones.get(row.outcome, ""),
    )


def _of_suspect(record: RunRecord, name: str) -> Measure | None:
    found = record.before.measures if record.before is not None else []
    return next((m for m in found if m.name == name and m.value is not None), None)


def _measures(record: RunRecord) -> list[Row]:
    """Each measure, for a cleansing before, after and the difference; scores and what has no other side alone."""
    after = {m.name: m for m in [*record.measures, *(record.after.measures if record.after else [])]}
    rows = []
    for name, measure in after.items():
        if name.endswith("_change"):
            continue
        title, note = words.MEASURES.get(name, (name.replace("_", " "), ""))
        cells = [_cell(measure)]
        if record.before is not None:
            before = _of_suspect(record, name)
            change = bars.signed(after.get(f"{name}_change"))
            if (
                not change[0]
                and before is not None
                and before.value is not None
                and measure.value is not None
            ):
                change = (bars.signed(Measure(name, measure.value - before.value))[0], "no paired interval")
            cells = [_cell(before), *cells, change]
        rows.append(Row(title, note, cells))
    return rows


def _cell(measure: Measure | None) -> tuple[str, str]:
    if measure is None or measure.value is None:
        return text.NOTHING, ""
    if measure.name in text.SCORES:
        return f"{measure.value:.3f}", ""
    return f"{text.percent(measure.value)} %", bars.interval(measure)


def _provenance(record: RunRecord) -> list[tuple[str, str]]:
    """What the other formats say of where the numbers are from, and all that repeating them needs."""
    data = record.data
    more = [
        ("data digest", (data.digest or "") if data else ""),
        ("labels", (data.labels_source or "") if data else ""),
        ("threshold", "" if record.threshold is None else f"{text.percent(record.threshold, 0)} %"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("stages", "; ".join(str(stage) for stage in record.recipe.stages) if record.recipe else ""),
        ("problem", record.problem.digest or "" if record.problem else ""),
    ]
    return [*facts(record), *((name, value) for name, value in more if value)]


def _compared(runs: Sequence[Run]) -> list[Compared]:
    """The runs, the worst verdict first, then by the rate of the worst row."""
    lines = []
    for number, run in enumerate(runs, 1):
        record = run.record
        worst = worst_row(record.rows())
        first = worst_row(record.before.triggers) if record.before is not None else None
        row = (same(record.rows(), first) if first is not None else None) or worst
        asr = Number("", text.NOTHING)
        if row is not None:
            asr = _rate_number("", row, run.names, first if row is not worst or first is not None else None)
        accuracy = record.measure("clean_accuracy")
        before = _of_suspect(record, "clean_accuracy")
        value, interval = _cell(accuracy)
        change, change_interval = bars.signed(record.measure("clean_accuracy_change"))
        lines.append(
            Compared(
                run,
                number,
                f"cleanse {record.recipe.name}" if record.recipe else record.command,
                Number("", value, interval, "", _cell(before)[0] if before else "", change, change_interval),
                row.trigger if row is not None else text.NOTHING,
                asr,
                text.duration(record.seconds),
            )
        )

    def severity(line: Compared) -> tuple[int, float]:
        worst = worst_row(line.run.record.rows())
        return TONES.index(line.run.tone), -(worst.asr.value or 0.0) if worst else 0.0

    return sorted(lines, key=severity)


def _plain_number(value: float) -> str:
    return f"{value:.4g}"
