"""Which rows of a record matter most, which of two models are the same one, and the rate that speaks for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bdclean.record.rule import decisive, moved, worst_source_rate
from bdclean.record.run import (
    BACKDOORED,
    FAILS,
    INCONCLUSIVE,
    NO_EVIDENCE,
    NOT_MEASURED,
    PASSES,
    RAN,
    SUSPICIOUS,
    Rate,
    RunRecord,
    TriggerRow,
)

ORDER = {FAILS: 0, INCONCLUSIVE: 1, NOT_MEASURED: 2, PASSES: 3}
UNSEEN, SEEN, UNLEARNED = range(3)
"""How much a recipe knew of a row's trigger: nothing, its family, or the trigger itself."""


def knowledge(row: TriggerRow) -> int:
    """Returns what a recipe knew of the trigger of `row`: UNSEEN, SEEN or UNLEARNED."""
    return UNLEARNED if row.trained_on else SEEN if row.seen_family else UNSEEN


def worst_row(rows: Iterable[TriggerRow]) -> TriggerRow | None:
    """Returns the row that matters most: by its outcome, what a recipe knew least of first, then by its rate."""
    measured = [row for row in rows if row.outcome != NOT_MEASURED and row.asr.value is not None]
    if not measured:
        return None
    return max(
        measured,
        key=lambda r: (-ORDER.get(r.outcome, 4), -knowledge(r), r.asr.value or 0.0, worst_source_rate(r)),
    )


def rank(row: TriggerRow) -> tuple[int, float, float]:
    """Returns what rows are sorted by, the worst first."""
    return ORDER.get(row.outcome, 4), -(row.asr.value or 0.0), -worst_source_rate(row)


def paired_rank(row: TriggerRow, old: TriggerRow | None) -> tuple[int, float]:
    """Returns what the rows of a cleansing are sorted by: what fails, what failed before, then what is inconclusive."""
    now, before = rank(row)[0], rank(old)[0] if old is not None else len(ORDER)
    rates = [found.asr.value or 0.0 for found in (row, old) if found is not None]
    return min(2 * now, 2 * before + 1), -max(rates)


def by_severity(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns the runs, the worst verdict first, then by the rate of the worst row: a report numbers them so."""

    def severity(record: RunRecord) -> tuple[int, float]:
        # What was not measured comes before what shows no evidence.
        place = (
            {BACKDOORED: 0, SUSPICIOUS: 1, NO_EVIDENCE: 3}.get(record.verdict, 2)
            if record.outcome == RAN
            else 2
        )
        worst = worst_row(record.rows())
        return place, -(worst.asr.value or 0.0) if worst else 0.0

    return sorted(records, key=severity)


def same(rows: Sequence[TriggerRow], row: TriggerRow) -> TriggerRow | None:
    """Returns the row of the other model that `row` is to be compared with: same trigger, same target.

    Where the other model's only row of the trigger passes, no class is the trigger's, and it is that.
    """
    found = [other for other in rows if other.trigger == row.trigger]
    alone = found[0] if len(found) == 1 and found[0].outcome == PASSES else None
    return next((other for other in found if other.target == row.target), alone)


def worst_pair(record: RunRecord) -> tuple[TriggerRow | None, TriggerRow | None]:
    """Returns the worst row of a cleansing's suspect and the same one of its output; None where there is none."""
    first = worst_row(record.before.triggers) if record.before is not None else None
    return first, same(record.rows(), first) if first is not None else None


def by_trigger(rows: Iterable[TriggerRow]) -> dict[str, TriggerRow]:
    """Returns the worst row of each trigger: it has one for each class that it was measured towards."""
    found: dict[str, TriggerRow] = {}
    for row in rows:
        if row.trigger not in found or rank(row) < rank(found[row.trigger]):
            found[row.trigger] = row
    return found


def headline(row: TriggerRow) -> tuple[Rate, int | None]:
    """Returns the rate that speaks for a row, and of which source class it is: the one that fails it, else of all.

    Where one source class moves, the average over all of them says nothing.
    """
    bound = decisive(row)
    if bound is None:
        return moved(row), None
    return of_source(row, bound.source) or Rate(bound.value, bound.n), bound.source


def speaking_source(row: TriggerRow, before: TriggerRow | None) -> int | None:
    """Returns the source class that speaks for a row, or for the same one `before`; None where it is all of them."""
    return next((of for each in (row, before) if each and (of := headline(each)[1]) is not None), None)


def of_source(row: TriggerRow, source: int | None) -> Rate | None:
    """Returns what a row moves of one source class, None where the record does not say; of all images without one."""
    if source is None:
        return row.asr
    worst = row.worst_source or {}
    if worst.get("class") == source and isinstance(worst.get("value"), (int, float)):
        return Rate(worst["value"], int(worst.get("n") or 0), worst.get("low"), worst.get("high"))
    bound = next((bound for bound in row.bounds if bound.source == source), None)
    return None if bound is None else Rate(bound.value, bound.n)
