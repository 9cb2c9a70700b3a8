"""The tables of a report: measures, trigger rows, before and after, findings, as plain strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bdclean.record.rule import decisive, moved
from bdclean.record.run import (
    FAILS,
    INCONCLUSIVE,
    NOT_MEASURED,
    PASSES,
    Bound,
    Finding,
    Measure,
    RunRecord,
    Side,
    TriggerRow,
)
from bdclean.report import wording
from bdclean.report.ranking import (
    by_trigger,
    headline,
    knowledge,
    of_source,
    paired_rank,
    rank,
    same,
    speaking_source,
)


@dataclass
class Table:
    """Rows of plain strings under a title."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    lead: str = ""  # where columns have no room side by side: what a row begins with,
    outcome: str = ""  # what stands beside it,
    brief: list[str] = field(default_factory=list)  # and the line under it
    calm: list[bool] = field(default_factory=list)  # of each row: a terminal shows it only when asked for all
    whole_calm: bool = False  # the same of the whole table


TITLES = (
    "Triggers of families that the recipe did not train on",
    "Triggers of families that the recipe trained on",
    "Triggers that the recipe was told, and trained on",
)


def apart(record: RunRecord) -> list[tuple[str, list[TriggerRow]]]:
    """Returns the rows that the verdict hangs on under titles, by how much a recipe knew of them, the least first."""
    rows = record.rows()
    if not (record.recipe and record.recipe.families) and not any(map(knowledge, rows)):
        return [("Triggers", rows)]
    return [(title, [row for row in rows if knowledge(row) == known]) for known, title in enumerate(TITLES)]


def tables(record: RunRecord) -> list[Table]:
    """Returns the tables of one run; those without rows are for the caller to leave out."""
    found, names = [_measures(record)], record.class_names()
    if record.before is not None and record.after is not None:
        found += [_pairs(title, record.before, rows, names) for title, rows in apart(record)]
    else:
        found += [_triggers(title, rows, names) for title, rows in apart(record)]
    found.append(_probes(record.rows(), "Other probes", names))
    if record.output is not None and record.output.new_head is not None and record.before is not None:
        found.append(_probes(record.before.triggers, "Other probes on the suspect", names))
    found.append(_findings(record))
    return found


def findings(record: RunRecord) -> list[Finding]:
    """Returns what detectors say of the suspect and of the output, in this order."""
    before = record.before.findings if record.before is not None else []
    return sorted([*before, *record.findings], key=lambda finding: finding.seen_on == "output")


def _findings(record: RunRecord) -> Table:
    """The findings; of a cleansing with the network that each was seen on."""
    found = findings(record)
    rows = [
        [
            f.detector,
            f.verdict,
            (f.seen_on or wording.NOTHING) if record.command == "cleanse" else "",
            _number(f.score),
            odd(f) or wording.NOTHING,
            _number(f.p_value),
            f.reason,
        ]
        for f in found
    ]
    columns = ["detector", "verdict", "seen on", "score", "odd", "p", "reason"]
    calm = [f.verdict in ("no-outlier", "usual", "reported") for f in found]
    brief = [seen(f, of_two=record.command == "cleanse") for f in found]
    title = "Findings without a known trigger"
    return without_empty(Table(title, columns, rows, "", "detector", "verdict", brief, calm))


def seen(finding: Finding, *, of_two: bool) -> str:
    """Returns a finding's figures: with `of_two` networks on which of them it was seen, its score, and what is odd."""
    parts = [
        f"seen on the {finding.seen_on}" if of_two and finding.seen_on else "",
        "" if finding.score is None else f"score {_number(finding.score)}",
        f"odd {odd(finding)}" if finding.odd else odd(finding),
        "" if finding.p_value is None else f"p {_number(finding.p_value)}",
    ]
    return ", ".join(part for part in parts if part)


def odd(finding: Finding) -> str:
    """Returns from which score on, and on which side, a network is odd; nothing where the detector does not say."""
    if finding.threshold is None:
        return ""
    return f"{finding.odd or 'threshold'} {_number(finding.threshold)}"


def _measures(record: RunRecord) -> Table:
    if record.before is None or record.after is None:
        rows = [[m.name, wording.signed(m)] for m in record.measures]
        return Table("Measures", ["measure", "value"], rows, whole_calm=True)
    before = {m.name: m for m in record.before.measures}
    after = {m.name: m for m in [*record.measures, *record.after.measures]}
    names = list(dict.fromkeys([*before, *after]))
    rows = [[name, wording.signed(before.get(name)), wording.signed(after.get(name))] for name in names]
    adapted = record.output is not None and record.output.new_head is not None
    note = f"Accuracy {wording.PROBED_BEFORE}." if adapted else ""
    return Table("Measures", ["measure", "before", "after"], rows, note, whole_calm=True)


def _triggers(title: str, rows: Sequence[TriggerRow], names: Sequence[str] | None) -> Table:
    columns = ["trigger", "target", "ASR %", "base %", "controls %", "robust %", "worst source %", "outcome"]
    ordered = sorted(rows, key=rank)
    cells = [
        [
            row.trigger,
            wording.label(row.target, names),
            success(row),
            wording.rate(row.base_rate),
            _controls(row),
            wording.rate(row.robust_accuracy),
            _source(row, names),
            row.outcome,
        ]
        for row in ordered
    ]
    calm = [row.outcome == PASSES for row in ordered]
    brief = [f"to {wording.label(row.target, names)}, {_brief(row, success(row))}" for row in ordered]
    return without_empty(Table(title, columns, cells, "", "trigger", "outcome", brief, calm))


def _probes(rows: Sequence[TriggerRow], title: str, names: Sequence[str] | None) -> Table:
    """What other probes on an encoder's features say of its triggers; without rows for a classifier."""
    probed = sorted((row for row in rows if row.probes), key=rank)
    probes = list(dict.fromkeys(name for row in probed for name in row.probes))
    cells = [
        [
            row.trigger,
            wording.label(row.target, names),
            *(wording.rate(row.probes.get(name)) for name in probes),
            wording.rate(row.asr_all_images),
            wording.rate(row.reference_rate),
        ]
        for row in probed
    ]
    columns = [
        "trigger",
        "target",
        *(f"{name} %" for name in probes),
        "of all images %",
        "of the reference %",
    ]
    note = (
        "ASR with other probes; over all images, those of the target class, too, as BadEncoder counts; of the clean "
        "encoder of --reference."
    )
    return without_empty(Table(title, columns, cells, note, whole_calm=True))


def _pairs(title: str, before: Side, after: Sequence[TriggerRow], names: Sequence[str] | None) -> Table:
    rows, brief, calm = [], [], []
    paired = [(row, same(before.triggers, row)) for row in after]
    for row, old in sorted(paired, key=lambda pair: paired_rank(*pair)):
        calm.append(row.outcome == PASSES and (old is None or old.outcome == PASSES))
        was = "" if old is None else f"{wording.percent(old.asr.value)} -> "
        brief.append(f"to {wording.label(row.target, names)}, {_brief(row, f'{was}{wording.rate(row.asr)}')}")
        rows.append(
            [
                row.trigger,
                wording.label(row.target, names),
                success(old) if old else wording.NOTHING,
                success(row),
                wording.rate(row.change),
                wording.rate(row.base_rate),
                _controls(row),
                wording.rate(old.robust_accuracy if old else None),
                wording.rate(row.robust_accuracy),
                f"{old.outcome if old else NOT_MEASURED} -> {row.outcome}",
            ]
        )
    columns = [
        "trigger",
        "target",
        "ASR % before",
        "ASR % after",
        "change",
        "base % after",
        "controls % after",
    ]
    columns += ["robust % before", "robust % after", "outcome"]
    return without_empty(Table(title, columns, rows, "", "trigger", "outcome", brief, calm))


@dataclass
class Compared:
    """Several runs: `columns`, number and before or after, with the rows of each by trigger in `sides`; in `known` the
    triggers that do not pass everywhere, and how much a recipe knew of each, in the order in which they are shown."""

    columns: list[tuple[str, str]]
    sides: list[dict[str, TriggerRow]]
    known: dict[str, int]


def compared(records: Sequence[RunRecord]) -> Compared:
    """Returns every trigger in every run; those that a recipe knew most of come last, and higher rates first."""
    columns: list[tuple[str, str]] = []
    sides: list[dict[str, TriggerRow]] = []
    for number, record in enumerate(records, 1):
        if record.before is not None:
            columns.append((f"#{number}", "before"))
            sides.append(by_trigger(record.before.triggers))
        if record.rows():
            columns.append((f"#{number}", "after" if record.before is not None else ""))
            sides.append(by_trigger(record.rows()))
    found: dict[str, list[TriggerRow]] = {}
    for side in sides:
        for name, row in side.items():
            found.setdefault(name, []).append(row)
    shown = {name: rows for name, rows in found.items() if any(row.outcome != PASSES for row in rows)}
    known = {name: max(map(knowledge, rows)) for name, rows in shown.items()}

    def place(name: str) -> tuple[int, float]:
        rates = [headline(row)[0].value for row in shown[name]]
        return known[name], -max(-1.0 if rate is None else rate for rate in rates)

    return Compared(columns, sides, {name: known[name] for name in sorted(known, key=place)})


def matrix(records: Sequence[RunRecord]) -> Table:
    """Returns the rate of every trigger in every run, for the triggers that do not pass everywhere."""
    found = compared(records)
    heads = [f"{number} {when}".rstrip() for number, when in found.columns]
    sides = list(zip(heads, found.sides, strict=True))
    cells = [
        [
            name,
            ("", "seen", "unlearned")[known],
            *(wording.rate(headline(rows[name])[0] if name in rows else None) for _, rows in sides),
        ]
        for name, known in found.known.items()
    ]
    note = (
        "ASR in percent. Triggers that pass in every run are left out. Seen: a recipe trained on this family; "
        "unlearned: on this very trigger."
    )
    brief = [
        ", ".join(
            f"{side} {wording.percent(headline(rows[name])[0].value)}" for side, rows in sides if name in rows
        )
        for name in found.known
    ]
    columns = ["trigger", "family", *heads]
    return without_empty(Table("Triggers", columns, cells, note, "trigger", "family", brief))


# --- cells --------------------------------------------------------------------------------------------------


def _controls(row: TriggerRow) -> str:
    controls = row.control_rate or {}
    highest, median, count = (controls.get(key) for key in ("highest", "median", "count"))
    if not isinstance(highest, (int, float)):
        return wording.NOTHING
    middle = f", median {wording.percent(median)}" if isinstance(median, (int, float)) else ""
    return f"highest {wording.percent(highest)}{middle} of {count}"


def success(row: TriggerRow) -> str:
    """Returns the rate that decides a row and, where it is not the linear one, the encoder's probe that it is by."""
    by = "" if row.decisive_probe is None else f", by {row.decisive_probe}"
    return f"{wording.rate(moved(row))}{by}"


def _brief(row: TriggerRow, asr: str) -> str:
    """The attack success rate of a row, which is said already, with its controls."""
    highest = (row.control_rate or {}).get("highest")
    controls = f", controls to {wording.percent(highest)} %" if isinstance(highest, (int, float)) else ""
    return f"ASR {asr} %{controls}"


def _source(row: TriggerRow, names: Sequence[str] | None) -> str:
    worst = row.worst_source or {}
    if row.outcome not in (FAILS, INCONCLUSIVE) or not isinstance(worst.get("value"), (int, float)):
        return wording.NOTHING
    found = Measure("", worst["value"], int(worst.get("n") or 0), worst.get("low"), worst.get("high"))
    return f"{wording.label(worst.get('class'), names)}: {wording.rate(found)}"


def evidence(row: TriggerRow, names: Sequence[str] | None = None) -> str:
    """Returns what a failing row shows, as a sentence; `names` are those of the classes, where they are known."""
    source, said, control = decisive(row), f"{wording.rate(moved(row))} % of images", None
    highest = (row.control_rate or {}).get("highest")
    if source is not None:
        said, highest = share(source, names), source.control
    if isinstance(highest, (int, float)):
        count = (row.control_rate or {}).get("count")
        control = f"the highest of {count} controls {wording.percent(highest)} %"
    if row.decisive_probe is not None:
        said = f"{said}, by the probe {row.decisive_probe},"
    elif source is None and row.reference_rate is not None and row.reference_rate.value is not None:
        twin = f"in the clean twin {wording.percent(row.reference_rate.value)} %"
        control = f"{control}, {twin}" if control else twin
    sentence = f"{row.trigger} sends {said} to {wording.label(row.target, names)}"
    return f"{sentence}, {control}." if control else f"{sentence}."


def share(bound: Bound, names: Sequence[str] | None) -> str:
    """Returns how many images of its source class a bound is about."""
    of = f"the {bound.n} images of {wording.label(bound.source, names)}"
    return (
        f"all {of.removeprefix('the ')}" if bound.value == 1 else f"{wording.percent(bound.value)} % of {of}"
    )


def beside(row: TriggerRow) -> str:
    """Returns what harmless stamps do in place of the row's trigger, nothing where none was measured."""
    highest = (row.control_rate or {}).get("highest")
    if not isinstance(highest, (int, float)):
        return ""
    return f"harmless stamps of the same strength (controls) move up to {wording.percent(highest)} %"


def why(row: TriggerRow, names: Sequence[str] | None) -> str:
    """Returns a row with the reason of its outcome."""
    rate, target = wording.rate(row.asr), wording.label(row.target, names)
    return f"{row.trigger}: {row.reason or row.outcome} (ASR {rate} %, {target})"


def accuracy(record: RunRecord) -> str:
    """Returns the clean accuracy, for a cleansing before -> after."""
    after = wording.measure(record.measure("clean_accuracy"))
    before = (
        next((m for m in record.before.measures if m.name == "clean_accuracy"), None)
        if record.before
        else None
    )
    return after if before is None else f"{wording.percent(before.value)} -> {after}"


def change(record: RunRecord, row: TriggerRow | None) -> str:
    """Returns a row's attack success rate, for a cleansing before -> after; of one source where that decides."""
    if row is None:
        return wording.NOTHING
    old, names = same(record.before.triggers, row) if record.before else None, record.class_names()
    source = speaking_source(row, old)

    def told(each: TriggerRow, interval: bool) -> str:
        found = of_source(each, source)
        shown = wording.rate if interval else lambda rate: wording.percent(rate.value)
        if source is None or found is None:
            return shown(each.asr)
        return f"{shown(found)} of {wording.label(source, names)}"

    return told(row, True) if old is None else f"{told(old, False)} -> {told(row, True)}"


def without_empty(table: Table) -> Table:
    """Returns the table without the columns in which nothing was measured, but for those that a row begins with."""
    keep = [
        i
        for i, column in enumerate(table.columns)
        if column in (table.lead, table.outcome)
        or any(row[i] not in (wording.NOTHING, "") for row in table.rows)
    ]
    rows = [[row[i] for i in keep] for row in table.rows]
    return replace(table, columns=[table.columns[i] for i in keep], rows=rows)


def _number(value: float | None) -> str:
    return wording.NOTHING if value is None else f"{value:.4g}"
