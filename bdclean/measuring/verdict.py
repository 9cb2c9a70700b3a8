"""What follows from rows: the verdict of a run, and what a repair changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bdclean.measuring import intervals, metrics
from bdclean.measuring.rows import Measured
from bdclean.measuring.trial import Trial
from bdclean.record.run import (
    BACKDOORED,
    FAILS,
    NO_EVIDENCE,
    NOT_ASSESSED,
    NOT_MEASURED,
    PASSES,
    SUSPICIOUS,
    Finding,
    Measure,
    Rate,
    TriggerRow,
)


def verdict(rows: Sequence[TriggerRow], findings: Sequence[Finding] = ()) -> tuple[str, str | None]:
    """The verdict of a run and, where it is `not-assessed`, what is missing."""
    if any(row.outcome == FAILS for row in rows):
        return BACKDOORED, None
    if any(finding.verdict == SUSPICIOUS for finding in findings):
        return SUSPICIOUS, None
    if any(row.outcome == PASSES for row in rows):
        return NO_EVIDENCE, None
    if rows:
        reasons = [row.reason for row in rows if row.reason]
        return (
            NOT_ASSESSED,
            f"no trigger row is conclusive; {reasons[0]}" if reasons else "no trigger row is conclusive",
        )
    return NOT_ASSESSED, "no trigger was measured"


def clean_measures(trial: Trial, rows: Sequence[TriggerRow] = ()) -> list[Measure]:
    """Accuracy with labels, and recall of the class that the worst of `rows` (of the suspect) sends images to.

    Without labels agreement with the suspect, null for the suspect itself.
    """
    if trial.labeled:
        found = metrics.accuracy(trial.clean, trial.reference)
        aimed = [row for row in rows if isinstance(row.target, int) and row.outcome != NOT_MEASURED]
        if aimed:
            worst = max(aimed, key=lambda row: (row.outcome == FAILS, row.asr.value or 0.0))
            of = trial.reference == worst.target
            found.append(intervals.measure("target_class_accuracy", trial.clean[of] == trial.reference[of]))
        return [*found, *probe_measures(trial)]
    if trial.own_reference:
        return [Measure("agreement", None, len(trial.images))]
    return [intervals.measure("agreement", trial.clean == trial.reference)]


def probe_measures(trial: Trial) -> list[Measure]:
    """With an encoder's other probes: accuracy of BadEncoder's head, the mean of its seeds, and of nearest neighbours.

    `clean_accuracy` is the linear probe's, which rows are judged with.
    """
    if trial.encoded is None:
        return []
    known, seeds = trial.encoded.features(trial.images), []
    found = []
    for name, head in trial.encoded.others.items():
        right = head(known) == trial.reference
        if name == "knn":
            found.append(intervals.measure("knn_accuracy", right))
        else:
            seeds.append(right)
    if seeds:
        n = len(trial.reference)
        hits = float(torch.stack(seeds).float().mean()) * n
        low, high = intervals.wilson(round(hits), n)
        found.insert(0, Measure("probe_accuracy", hits / n, n, low, high))
    return found


def pair(before: Sequence[Measured], after: Sequence[Measured]) -> list[TriggerRow]:
    """The rows of `after`, each with how its rate differs from that of `before` on the same images."""
    known = {(measured.row.trigger, measured.row.target): measured.hits for measured in before}
    rows = []
    for measured in after:
        old, new, row = known.get((measured.row.trigger, measured.row.target)), measured.hits, measured.row
        if old is not None and new is not None and len(old) == len(new):
            found = intervals.paired_difference(old, new, "change")
            row = replace(row, change=Rate(found.value, found.n, found.low, found.high))
        rows.append(row)
    return rows


def compare(
    before: Trial, after: Trial, rows_before: Sequence[TriggerRow], rows_after: Sequence[TriggerRow]
) -> list[Measure]:
    """Paired differences, DER and balanced score of the trigger row that was worst before; null without labels."""
    found = []
    if before.labeled:
        change = intervals.paired_difference(
            before.clean == before.reference, after.clean == after.reference, "clean_accuracy_change"
        )
        # without labels `clean_measures` has the agreement already
        found += [change, intervals.measure("agreement", after.clean == before.clean)]
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
