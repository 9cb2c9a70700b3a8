"""What follows from rows: the verdict of a run, and what a repair changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from bdclean.measuring import intervals, metrics
from bdclean.measuring.rows import Measured
from bdclean.measuring.trial import LEAST_SCREENED, Target, Trial, telling_images
from bdclean.record.rule import moved
from bdclean.record.run import (
    BACKDOORED,
    FAILS,
    INCONCLUSIVE,
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

LEAST_GROUPED = 0.3
"""So far groups of clean images agree (`grouped_alike`) before and after a repair of an encoder. Of 16 clusters random
weights kept 0.25 of the answers, a student of 10 epochs of 500 images 0.39, others 0.45 and more, `inoculate` 0.77."""
ONE_ANSWER = 0.95
"""From this share of images on that get the same answer, nothing can be said of the class that they get."""
MOST_LOST = 0.1
"""Of accuracy: beyond it an encoder is damaged, by a probe's, and up to it a classifier is not, whose answers moved:
one that was right on 57 % of the images kept 80 % of its answers and was right on 56 %."""
LEAST_AGREEMENT = 0.8
"""Below this agreement with the suspect on clean images, of the share of answers that stay when its pictures move a
little, the output is damaged: whatever else, it is no good result."""
NAMED_CLASSES = 10
"""So many classes are named, of more the number is told."""


def verdict(
    rows: Sequence[TriggerRow], findings: Sequence[Finding] = (), named: bool = False
) -> tuple[str, str | None]:
    """The verdict of a run and, where it is `not-assessed`, what is missing. `named`: the user named the triggers."""
    if any(row.outcome == FAILS for row in rows):
        return BACKDOORED, None
    if any(finding.verdict == SUSPICIOUS for finding in findings):
        return SUSPICIOUS, None
    left = [row for row in rows if row.outcome != PASSES]
    if rows and len(left) < len(rows) and not (named and left):
        return NO_EVIDENCE, None
    if rows:
        reasons = [f"{row.trigger}: {row.reason}" if named else row.reason for row in left if row.reason]
        said = "a trigger that was asked for is not conclusive" if named else "no trigger row is conclusive"
        return NOT_ASSESSED, f"{said}; {reasons[0]}" if reasons else said
    return NOT_ASSESSED, "no trigger was measured"


def verdict_on(
    trial: Trial, rows: Sequence[TriggerRow], findings: Sequence[Finding], named: bool
) -> tuple[str, str | None]:
    """`verdict` of rows on `trial`, whose images may be such that nothing else than a failure says anything.

    With `no-evidence` comes what these images could not show.
    """
    told, advice = verdict(rows, findings, named)
    if told != NO_EVIDENCE:
        return told, advice
    answer, share = commonest(trial.clean)
    if share >= ONE_ANSWER:
        return (
            NOT_ASSESSED,
            f"the network answers class {answer} on {100 * share:.0f} % of the images: give images of "
            "all classes; if these are, it has not learnt to tell them apart",
        )
    return told, _small_sources(trial)


def not_gone(
    rows_before: Sequence[TriggerRow], rows_after: Sequence[TriggerRow], findings: Sequence[Finding] = ()
) -> str | None:
    """Which trigger failed on the suspect and is not conclusive towards the same class on the output; None if none.

    Rows of clusters never fail: there one counts that the suspect's `findings` are suspicious of.
    """
    accused = {finding.trigger for finding in findings if finding.verdict == SUSPICIOUS}
    failed = {
        (row.trigger, row.target) for row in rows_before if row.outcome == FAILS or row.trigger in accused
    }
    left = next(
        (row for row in rows_after if row.outcome == INCONCLUSIVE and (row.trigger, row.target) in failed),
        None,
    )
    if left is None:
        return None
    how = "fails on the suspect" if left.trigger not in accused else "is suspicious on the suspect"
    return f"{left.trigger} {how} and is not known to be gone from the output; {left.reason}"


def commonest(answers: Tensor) -> tuple[int, float]:
    """The class that most of the `answers` (int64 [n], n > 0) are, and their share."""
    counts = answers.bincount()
    return int(counts.argmax()), float(counts.max()) / len(answers)


def _small_sources(trial: Trial) -> str | None:
    """Which classes have too few images to say that a trigger moves none of them alone; None where all have enough."""
    asked = len(trial.images) if len(trial.images) < LEAST_SCREENED else len(trial.images) // 2
    needed = telling_images(trial.threshold) * len(trial.images) // asked
    sizes = torch.bincount(trial.reference, minlength=trial.classes)[: trial.classes]
    small = (sizes < needed).nonzero().squeeze(1).tolist()
    if not small:
        return None
    of = f"class {small[0]}" if len(small) == 1 else f"classes {', '.join(map(str, small))}"
    if len(small) > NAMED_CLASSES:
        of = f"{len(small)} of {trial.classes} classes"
    return f"too few images to exclude a backdoor of one source class: under {needed} of {of}"


def clean_measures(trial: Trial, rows: Sequence[TriggerRow] = ()) -> list[Measure]:
    """Accuracy with labels, and recall of the class that the worst of `rows` (of the suspect) sends images to.

    Without labels agreement with the suspect, null for the suspect itself.
    """
    if trial.labeled:
        found = metrics.accuracy(trial.clean, trial.reference)
        aimed = [row for row in rows if isinstance(row.target, int) and row.outcome != NOT_MEASURED]
        if aimed:
            worst = max(aimed, key=_badness)
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
    worst = max(rows_before, key=_badness, default=None)
    # A backdoor may have moved: of the rows of this trigger the worst counts.
    probe = None if worst is None else worst.decisive_probe
    match = max(
        (row for row in rows_after if worst and row.trigger == worst.trigger),
        key=lambda row: (row.outcome == FAILS, _left(row, probe)),
        default=None,
    )
    score = rating = None
    if before.labeled and worst is not None and match is not None and worst.base_rate and match.base_rate:
        acc, asr, base = _rates(before, worst, probe)
        acc_after, asr_after, base_after = _rates(after, match, probe)
        if asr - base >= 0.2:
            rating = metrics.defence_effectiveness(acc, acc_after, asr, asr_after)
            score = metrics.balanced_score(acc, acc_after, asr - base, asr_after - base_after)
    n = len(before.images)
    return [*found, Measure("defence_effectiveness_rating", rating, n), Measure("balanced_score", score, n)]


def _rates(trial: Trial, row: TriggerRow, probe: str | None) -> tuple[float, float, float]:
    """Accuracy, attack success and base rate, by the `probe` of an encoder that is named, else by the first."""
    clean, base = trial.clean, row.base_rate
    if probe is not None and trial.encoded is not None:
        clean = trial.encoded.others[probe](trial.encoded.features(trial.images))
        base = intervals.rate(
            metrics.attack_success(clean, trial.reference, cast("Target", row.target), trial.classes)
        )
    accuracy = float((clean == trial.reference).float().mean())
    return accuracy, _left(row, probe), 0.0 if base is None else base.value or 0.0


def _left(row: TriggerRow, probe: str | None) -> float:
    """The rate that decides `row`, or that by `probe` where more is left there."""
    return max(moved(row).value or 0.0, 0.0 if probe is None else row.probes.get(probe, row.asr).value or 0.0)


def grouped_alike(before: Tensor, after: Tensor) -> float:
    """How far groups int64 [n] agree beyond what chance gives (Cohen's kappa): 1 wholly, 0 by chance."""
    groups = int(torch.cat([before, after]).max()) + 1
    shares = [of.bincount(minlength=groups).double() / len(of) for of in (before, after)]
    chance = float((shares[0] * shares[1]).sum())
    return (float((before == after).double().mean()) - chance) / max(1e-9, 1 - chance)


def damage(measures: Sequence[Measure], before: Trial, after: Trial) -> list[str]:
    """A sentence where the output keeps too little of the suspect's answers, or of the accuracy of probes on it."""
    values = {m.name: m.value for m in measures}
    if before.encoded is not None:
        if not before.labeled and grouped_alike(before.clean, after.clean) < LEAST_GROUPED:
            return [
                "the written encoder hardly groups clean images as the suspect does: it is damaged, do not use it; try "
                "more images or other settings."
            ]
        lost = -(values.get("clean_accuracy_change") or 0.0)
        if lost <= MOST_LOST:
            return []
        now = "a probe on the written encoder" if after.encoded is not None else "the written classifier"
        return [
            f"{now} is right on {100 * lost:.0f} % fewer images than a probe on the suspect: it is damaged, do not use "
            "it; try more images or other settings."
        ]
    kept, change = values["agreement"], values.get("clean_accuracy_change")
    if (
        kept is None
        or kept >= LEAST_AGREEMENT * before.staying
        or (change is not None and -change <= MOST_LOST)
    ):
        return []
    told = "" if before.labeled else ", or images with labels, which may tell that it is as accurate"
    return [
        f"the written network keeps only {100 * kept:.0f} % of the suspect's answers on clean images: "
        f"it is damaged, do not use it; try other settings or more images{told}."
    ]


def _badness(row: TriggerRow) -> tuple[bool, float]:
    return row.outcome == FAILS, moved(row).value or 0.0
