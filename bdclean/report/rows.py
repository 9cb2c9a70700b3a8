"""The tables of a report: measures, trigger rows, before and after, findings, as plain strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from bdclean.record.rule import decisive, worst_source_rate
from bdclean.record.run import (
    FAILS,
    INCONCLUSIVE,
    NOT_MEASURED,
    PASSES,
    Bound,
    Measure,
    RunRecord,
    Side,
    TriggerRow,
)
from bdclean.report import wording

ORDER = {FAILS: 0, INCONCLUSIVE: 1, NOT_MEASURED: 2, PASSES: 3}


@dataclass
class Table:
    """Rows of plain strings under a title."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    details: tuple[str, ...] = ()  # columns that a narrow terminal leaves out
    calm: list[bool] = field(default_factory=list)  # of each row: a terminal shows it only when asked for all
    whole_calm: bool = False  # the same of the whole table


def worst_row(rows: Iterable[TriggerRow]) -> TriggerRow | None:
    """Returns the row that matters most: by its outcome, what a recipe knew least of first, then by its rate."""
    measured = [row for row in rows if row.outcome != NOT_MEASURED and row.asr.value is not None]
    if not measured:
        return None
    return max(
        measured,
        key=lambda r: (-ORDER.get(r.outcome, 4), -knowledge(r), r.asr.value or 0.0, worst_source_rate(r)),
    )


UNSEEN, SEEN, UNLEARNED = range(3)
"""How much a recipe knew of a row's trigger: nothing, its family, or the trigger itself."""


def knowledge(row: TriggerRow) -> int:
    """Returns what a recipe knew of the trigger of `row`: UNSEEN, SEEN or UNLEARNED."""
    return UNLEARNED if row.trained_on else SEEN if row.seen_family else UNSEEN


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
    found = [_measures(record)]
    if record.before is not None and record.after is not None:
        found += [_pairs(title, record.before, rows) for title, rows in apart(record)]
    else:
        found += [_triggers(title, rows) for title, rows in apart(record)]
    found.append(_probes(record.rows(), "Other probes"))
    if record.output is not None and record.output.new_head is not None and record.before is not None:
        found.append(_probes(record.before.triggers, "Other probes on the suspect"))
    found.append(
        Table(
            "Findings without a known trigger",
            ["detector", "verdict", "score", "threshold", "p", "reason"],
            [
                [f.detector, f.verdict, _number(f.score), _number(f.threshold), _number(f.p_value), f.reason]
                for f in record.findings
            ],
            calm=[f.verdict in ("no-outlier", "usual", "reported") for f in record.findings],
        )
    )
    return found


def _measures(record: RunRecord) -> Table:
    if record.before is None or record.after is None:
        rows = [[m.name, wording.measure(m)] for m in record.measures]
        return Table("Measures", ["measure", "value"], rows, whole_calm=True)
    before = {m.name: m for m in record.before.measures}
    after = {m.name: m for m in [*record.measures, *record.after.measures]}
    names = list(dict.fromkeys([*before, *after]))
    rows = [[name, wording.measure(before.get(name)), wording.measure(after.get(name))] for name in names]
    adapted = record.output is not None and record.output.new_head is not None
    note = f"Accuracy {wording.PROBED_BEFORE}." if adapted else ""
    return Table("Measures", ["measure", "before", "after"], rows, note, whole_calm=True)


def _triggers(title: str, rows: Sequence[TriggerRow]) -> Table:
    columns = ["trigger", "target", "ASR %", "base %", "controls %", "robust %", "worst source %", "outcome"]
    ordered = sorted(rows, key=rank)
    cells = [
        [
            row.trigger,
            _target(row),
            wording.rate(row.asr),
            wording.rate(row.base_rate),
            _controls(row),
            wording.rate(row.robust_accuracy),
            _source(row),
            row.outcome,
        ]
        for row in ordered
    ]
    calm = [row.outcome == PASSES for row in ordered]
    return _without_empty(
        Table(title, columns, cells, details=("base %", "robust %", "worst source %"), calm=calm)
    )


def _probes(rows: Sequence[TriggerRow], title: str) -> Table:
    """What other probes on an encoder's features say of its triggers; without rows for a classifier."""
    probed = sorted((row for row in rows if row.probes), key=rank)
    names = list(dict.fromkeys(name for row in probed for name in row.probes))
    cells = [
        [
            row.trigger,
            _target(row),
            *(wording.rate(row.probes.get(name)) for name in names),
            wording.rate(row.asr_all_images),
            wording.rate(row.reference_rate),
        ]
        for row in probed
    ]
    columns = ["trigger", "target", *(f"{name} %" for name in names), "of all images %", "of the reference %"]
    note = (
        "ASR with other probes; over all images, those of the target class, too, as BadEncoder counts; of the clean "
        "encoder of --reference."
    )
    return _without_empty(Table(title, columns, cells, note, whole_calm=True))


def _pairs(title: str, before: Side, after: Sequence[TriggerRow]) -> Table:
    rows, calm = [], []
    for row in sorted(after, key=rank):
        old = same(before.triggers, row)
        calm.append(row.outcome == PASSES and (old is None or old.outcome == PASSES))
        rows.append(
            [
                row.trigger,
                _target(row),
                wording.rate(old.asr if old else None),
                wording.rate(row.asr),
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
    details = ("change", "base % after", "controls % after", "robust % before", "robust % after")
    return _without_empty(Table(title, columns, rows, details=details, calm=calm))


def matrix(records: Sequence[RunRecord]) -> Table:
    """Returns the rate of every trigger in every run, for the triggers that do not pass everywhere."""
    sides: list[tuple[str, dict[str, TriggerRow]]] = []
    for number, record in enumerate(records, 1):
        if record.before is not None:
            sides.append((f"#{number} before", {row.trigger: row for row in record.before.triggers}))
        if record.rows():
            after = " after" if record.before is not None else ""
            sides.append((f"#{number}{after}", {row.trigger: row for row in record.rows()}))
    names = list(dict.fromkeys(name for _, rows in sides for name in rows))
    chosen = [n for n in names if any(n in rows and rows[n].outcome != PASSES for _, rows in sides)]
    known = {name: max(knowledge(rows[name]) for _, rows in sides if name in rows) for name in chosen}
    chosen.sort(key=known.__getitem__)
    cells = [
        [
            name,
            ("", "seen", "unlearned")[known[name]],
            *(wording.rate(rows[name].asr if name in rows else None) for _, rows in sides),
        ]
        for name in chosen
    ]
    note = (
        "ASR in percent. Triggers that pass in every run are left out. Seen: a recipe trained on this family; "
        "unlearned: on this very trigger."
    )
    return _without_empty(Table("Triggers", ["trigger", "family", *(name for name, _ in sides)], cells, note))


# --- cells --------------------------------------------------------------------------------------------------


def same(rows: Sequence[TriggerRow], row: TriggerRow) -> TriggerRow | None:
    """Returns the row of the other model that `row` is to be compared with: same trigger, same target."""
    found = [other for other in rows if other.trigger == row.trigger]
    return next(
        (other for other in found if other.target == row.target), found[0] if len(found) == 1 else None
    )


def rank(row: TriggerRow) -> tuple[int, float, float]:
    """Returns what rows are sorted by, the worst first."""
    return ORDER.get(row.outcome, 4), -(row.asr.value or 0.0), -worst_source_rate(row)


def _target(row: TriggerRow) -> str:
    return wording.NOTHING if row.target is None else str(row.target)


def _controls(row: TriggerRow) -> str:
    controls = row.control_rate or {}
    highest, median, count = (controls.get(key) for key in ("highest", "median", "count"))
    if not isinstance(highest, (int, float)):
        return wording.NOTHING
    middle = f", median {wording.percent(median)}" if isinstance(median, (int, float)) else ""
    return f"highest {wording.percent(highest)}{middle} of {count}"


def _source(row: TriggerRow) -> str:
    worst = row.worst_source or {}
    if row.outcome not in (FAILS, INCONCLUSIVE) or not isinstance(worst.get("value"), (int, float)):
        return wording.NOTHING
    found = Measure("", worst["value"], int(worst.get("n") or 0), worst.get("low"), worst.get("high"))
    return f"class {worst.get('class')}: {wording.rate(found)}"


def evidence(row: TriggerRow) -> str:
    """Returns what a failing row shows, as a sentence."""
    source, moved, control = decisive(row), f"{wording.rate(row.asr)} % of images", None
    highest = (row.control_rate or {}).get("highest")
    if source is not None:
        moved = f"{share(source)} of the images of class {source.source}, {wording.rate(row.asr)} % of all,"
        highest = source.control
    if isinstance(highest, (int, float)):
        count = (row.control_rate or {}).get("count")
        control = f"the highest of {count} controls {wording.percent(highest)} %"
    sentence = f"{row.trigger} sends {moved} to {towards(row)}"
    return f"{sentence}, {control}." if control else f"{sentence}."


def share(bound: Bound) -> str:
    """Returns the share of images that a bound is about, with its n."""
    return f"{wording.percent(bound.value)} % (n {bound.n})"


def towards(row: TriggerRow) -> str:
    """Returns where a row's trigger sends images."""
    return "the next class" if row.target == "next" else f"class {_target(row)}"


def why(row: TriggerRow) -> str:
    """Returns a row with the reason of its outcome."""
    return f"{row.trigger}: {row.reason or row.outcome} (ASR {wording.rate(row.asr)} %, {towards(row)})"


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
    """Returns a row's attack success rate, for a cleansing before -> after."""
    if row is None:
        return wording.NOTHING
    old = same(record.before.triggers, row) if record.before else None
    return (
        wording.rate(row.asr)
        if old is None
        else f"{wording.percent(old.asr.value)} -> {wording.rate(row.asr)}"
    )


def _without_empty(table: Table) -> Table:
    """Returns the table without the columns in which nothing was measured."""
    keep = [
        i for i in range(len(table.columns)) if any(row[i] not in (wording.NOTHING, "") for row in table.rows)
    ]
    rows = [[row[i] for i in keep] for row in table.rows]
    return replace(table, columns=[table.columns[i] for i in keep], rows=rows)


def _number(value: float | None) -> str:
    return wording.NOTHING if value is None else f"{value:.4g}"
