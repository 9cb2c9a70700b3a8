"""RunRecords -> one HTML page that opens offline: no script, nothing loaded, every string of a record escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bdclean import __version__
from bdclean.files import text
from bdclean.record.run import Finding, RunRecord
from bdclean.report import sequela, wording
from bdclean.report.document import LIMITS, WARNINGS, facts, page
from bdclean.report.page import (
    bars,
    calibration,
    comparison,
    embedded,
    numbers,
    plots,
    scatter,
    tradeoff,
    words,
)
from bdclean.report.page.numbers import Number, Row
from bdclean.report.rows import Table, findings, seen

ELSEWHERE = ("Inconclusive", "Not measured", WARNINGS, sequela.TITLE)  # at the bars, the title, in a panel


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
    calibrations: list[calibration.Strip]
    heats: list[embedded.Heat]
    scatter: scatter.Scatter | None
    curves: list[tuple[str, Any, float, float]]
    facts: list[tuple[str, str]]
    command: str
    next: str  # what to type next
    findings: list[tuple[Finding, str]]  # with their figures in words
    left_behind: list[str]
    tables: list[Table]
    lists: list[tuple[str, list[str]]]
    threshold: float | None
    names: list[str] | None = None


def render(records: Sequence[RunRecord]) -> str:
    """Returns the page, in ASCII with character references: the same bytes for the same records, always."""
    # Imported here: no other format needs it.
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def harmless(value: Any) -> Any:
        """Every string that is shown, but what this module built as markup: controls and bidi marks as escapes."""
        return text.plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    def spec(value: str) -> Markup:
        """A SPEC that may break after its commas; Markup escapes the parts that it joins."""
        return Markup(",<wbr>").join(text.plain(part) for part in value.split(","))

    environment = Environment(
        loader=PackageLoader("bdclean.report.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "curve_notes": words.CURVES,
        "label": wording.label,
        "number": _plain_number,
        "spec": spec,
    }
    runs = [_run(record, number) for number, record in enumerate(records, 1)]
    several = len(runs) > 1
    shown = environment.get_template("page.html").render(
        runs=runs,
        several=several,
        title=f"{len(runs)} runs" if several else f"{runs[0].heading}: {runs[0].name}",
        compared=comparison.lines(records) if several else [],
        grid=comparison.grid(records) if several else None,
        tradeoffs=tradeoff.panels(records) if several else [],
        rule=words.RULE,
        limits=LIMITS,
        version=__version__,
    )
    return shown.encode("ascii", "xmlcharrefreplace").decode("ascii").rstrip("\n") + "\n"


def _run(record: RunRecord, number: int) -> Run:
    names = record.class_names()
    laid_out = page(record)
    return Run(
        record=record,
        anchor=f"run-{number}",
        heading=words.heading(record),
        tone=words.tone(record),
        name=words.name(record),
        sentence=words.lead(record),
        numbers=numbers.head(record),
        meaning=[*words.accepted(record), *words.meaning(record)],
        untested=words.untested(record),
        measures=numbers.measures(record),
        groups=bars.groups(record),
        strips=embedded.strips(record),
        masks=embedded.masks(record),
        calibrations=calibration.strips(record),
        heats=embedded.heats(record),
        scatter=scatter.scatter(record),
        curves=plots.curves(record.curve or [], f"run-{number}"),
        facts=_provenance(record),
        command=words.command(record),
        next=laid_out.command if record.command == "scan" else "",  # of a cleansing it is this page
        findings=[(found, seen(found, of_two=record.command == "cleanse")) for found in findings(record)],
        left_behind=sequela.sentences(record),
        tables=laid_out.tables,
        lists=[(title, items) for title, items in laid_out.lists if title not in ELSEWHERE],
        threshold=None if record.threshold is None else round(100 * min(1.0, max(0.0, record.threshold)), 2),
        names=names,
    )


def _provenance(record: RunRecord) -> list[tuple[str, str]]:
    """What the other formats say of where the numbers are from, and all that repeating them needs."""
    data = record.data
    more = [
        ("data digest", (data.digest or "") if data else ""),
        ("labels", (data.labels_source or "") if data else ""),
        ("threshold", "" if record.threshold is None else f"{wording.percent(record.threshold, 0)} %"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("stages", "; ".join(str(stage) for stage in record.recipe.stages) if record.recipe else ""),
        ("problem", record.problem.digest or "" if record.problem else ""),
    ]
    return [*facts(record), *((name, value) for name, value in more if value)]


def _plain_number(value: float) -> str:
    return f"{value:.4g}"
