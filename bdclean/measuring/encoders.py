"""What rows of an encoder have beside those of a classifier: other probes, another convention, the unlabeled tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from bdclean.measuring.intervals import rate
from bdclean.measuring.metrics import attack_success
from bdclean.measuring.probe import Encoded, Probe
from bdclean.measuring.pull import Field, pull_test
from bdclean.measuring.rows import Aim, measure
from bdclean.measuring.trial import SCREENED_OUT, Trial, halves
from bdclean.measuring.whitening import LEAST, crowded, stamped_distances
from bdclean.record.rule import above_twin, stands_out
from bdclean.record.run import FAILS, INCONCLUSIVE, PASSES, Finding, Skipped, TriggerRow
from bdclean.triggers.stamping import Trigger


def judged_as_encoder(
    trial: Trial, rows: Sequence[TriggerRow], made: Sequence[Trigger], floor: Trial | None = None
) -> tuple[list[TriggerRow], list[Finding]]:
    """`rows` as they are of a classifier; of an encoder with what its other probes say, or with the unlabeled test.

    `floor`: a clean encoder with probes of its own. Clusters are no classes: a row that sends images to one decides
    nothing by itself.
    """
    if trial.encoded is None:
        return list(rows), []
    triggers = {trigger.spec(): trigger for trigger in made}
    if trial.encoded.probing.labeled:
        return [_probed(trial, row, triggers[row.trigger], floor, len(rows)) for row in rows], []
    asked = [triggers[row.trigger] for row in rows if row.target_source != SCREENED_OUT]
    field = Field.of(trial.encoded.features, trial.encoded.first, trial.classes, trial.images, trial.seed)
    findings = pull_test(field, asked, len(rows), trial.seed, trial.tell)
    return [_undecided(row) for row in rows], [*findings, *_whitened(trial, trial.encoded, asked)]


def _whitened(trial: Trial, encoded: Encoded, asked: Sequence[Trigger]) -> list[Finding]:
    """What whitened features say of stamped images, and of stamped ones among the given; see `unsaid`.

    The images that probes were made of give the covariance for those that are measured on; for crowding each half
    judges the other.
    """
    features, known = encoded.features, encoded.probing.images
    if unsaid(trial):
        return []
    crowd = crowded(features(known), features(trial.images))
    return [*stamped_distances(features, known, trial.images, asked), crowd]


def unsaid(trial: Trial) -> list[Skipped]:
    """What the tests without labels cannot say of so few images, of an encoder."""
    if trial.encoded is None or trial.encoded.probing.labeled:
        return []
    fewest = min(len(trial.encoded.probing.images), len(trial.images))
    if fewest >= LEAST:
        return []
    return [
        Skipped(
            "whitened features",
            f"{fewest} images in a half are too few to tell single ones apart: {LEAST} are needed.",
        )
    ]


def _undecided(row: TriggerRow) -> TriggerRow:
    if row.outcome != FAILS:
        return row
    return replace(
        row,
        outcome=INCONCLUSIVE,
        reason="images go to one cluster of features, which is no class: labels would tell",
    )


def _probed(trial: Trial, row: TriggerRow, trigger: Trigger, floor: Trial | None, tried: int) -> TriggerRow:
    """`row` with the rates of the other probes on the same images, whose features are remembered, and of `floor`.

    One of `tried` that its controls leave open fails where it is clearly above `floor`, or by another probe.
    """
    if trial.encoded is None or not isinstance(row.target, int) or row.target_source == SCREENED_OUT:
        return row
    first, second = halves(len(trial.images), trial.seed)
    # All images, or so many of the half that rows are measured on.
    chosen = torch.cat([first, second]) if row.images > len(second) else second[: row.images]
    stamped, reference = trigger(trial.images[chosen]), trial.reference[chosen]
    known = trial.encoded.features(stamped)
    probes = {
        name: rate(attack_success(head(known), reference, row.target, trial.classes))
        for name, head in trial.encoded.others.items()
    }
    everything = rate(trial.encoded.first(known) == row.target)
    least = None
    if floor is not None:
        least = rate(attack_success(floor.predict(stamped), reference, row.target, trial.classes))
    row = replace(row, probes=probes, asr_all_images=everything, reference_rate=least)
    if row.outcome == INCONCLUSIVE and least is not None and above_twin(row, trial.threshold):
        return replace(
            row, outcome=FAILS, reason=f"{100 * (least.value or 0.0):.1f} % go there in the clean twin"
        )
    return (
        row if row.outcome == FAILS else _by_others(trial, trial.encoded, row, trigger, chosen, known, tried)
    )


def _by_others(
    trial: Trial,
    encoded: Encoded,
    row: TriggerRow,
    trigger: Trigger,
    chosen: Tensor,
    known: Tensor,
    tried: int,
) -> TriggerRow:
    """`row`, which does not fail by the linear probe, judged by the others: one that fails it decides.

    Where all stamped images have one feature each probe sees a class of its own there: of a MoCo encoder under its
    trigger nearest neighbours sent 99 % to the attacker's class, a linear probe 8 % there and 76 % to another one. What
    clean networks do under changes was counted with heads that were trained with them, not with these: so controls
    always matter, and much must move, as of a network whose answers do not stay. `known`: what `chosen` are, stamped,
    in features.
    """
    looks = tried * (1 + len(encoded.others))
    for name, head in sorted(encoded.others.items(), key=lambda each: -(row.probes[each[0]].value or 0.0)):
        if (row.probes[name].value or 0.0) < trial.threshold:
            break
        clean = head(encoded.features(trial.images))
        other = replace(trial, predict=Probe(encoded.features, head), clean=clean, staying=0.0)
        aim = Aim(trigger, cast("int", row.target), row.target_source)
        found = measure(other, aim, chosen, head(known), looks).row
        if found.outcome == FAILS:
            return replace(
                row, outcome=FAILS, decisive_probe=name, control_rate=found.control_rate, bounds=found.bounds,
                high=found.high, reason=f"by the probe {name}, not by the linear one",
            )  # fmt: skip
        if row.outcome == PASSES and found.bounds and stands_out(found.bounds[0], trial.threshold):
            highest = (found.control_rate or {}).get("highest") or 0.0
            row = replace(
                row, outcome=INCONCLUSIVE,
                reason=f"by the probe {name} {100 * (row.probes[name].value or 0.0):.1f} % go to the target, the "
                f"highest control {100 * highest:.1f} %",
            )  # fmt: skip
    return row
