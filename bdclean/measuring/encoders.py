"""What rows of an encoder have beside those of a classifier: other probes, another convention, the unlabeled tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from bdclean.measuring.assessment import SUSPECTED
from bdclean.measuring.intervals import rate
from bdclean.measuring.metrics import attack_success
from bdclean.measuring.probe import Encoded, Probe
from bdclean.measuring.pull import Field, pull_test
from bdclean.measuring.rows import Aim, measure
from bdclean.measuring.screening import screen
from bdclean.measuring.trial import (
    LEAST_SCREENED,
    SCREENED,
    SCREENED_OUT,
    Trial,
    halves,
    stamped_features,
    stamped_predictions,
)
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
        probes = _Probes.of(trial, trial.encoded, floor, len(rows))
        return [judged for row in rows for judged in probes.judged(row, triggers[row.trigger])], []
    named = dict.fromkeys(row.trigger for row in rows if row.target_source != SCREENED_OUT)
    asked = [triggers[name] for name in named]  # once, however many rows it has
    field = Field.of(trial.encoded.features, trial.encoded.first, trial.classes, trial.images, trial.seed)
    findings = pull_test(field, asked, len(triggers) * trial.readings, trial.seed, trial.tell)
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
        # At no other threshold does it fail either.
        bounds=[replace(bound, certain=None, control=None) for bound in row.bounds],
    )


@dataclass(frozen=True)
class _Probes:
    """The probes of an encoder beside the first, which `trial` is by: each is a trial of its own in `others`.

    What clean networks do under changes was not counted with these: so for them controls always matter, and much must
    move, as of a network whose answers do not stay.
    """

    trial: Trial
    encoded: Encoded
    others: dict[str, Trial]
    floor: Trial | None
    tried: int
    """Rows that are asked, with one for each class that another probe may pick, or that was chosen on these images."""

    @staticmethod
    def of(trial: Trial, encoded: Encoded, floor: Trial | None, rows: int) -> _Probes:
        known = encoded.features(trial.images)
        others = {
            name: replace(trial, predict=Probe(encoded.features, head), clean=head(known), counted=False)
            for name, head in encoded.others.items()
        }
        targets = trial.classes + 1 if len(trial.images) < LEAST_SCREENED else 1 + len(others)
        return _Probes(trial, encoded, others, floor, rows * targets)

    def judged(self, row: TriggerRow, trigger: Trigger) -> list[TriggerRow]:
        """`row` with the rates of all probes, and what follows where another one than the first fails it.

        Where screening picked its class it may give way to a row towards another class; one whose class was found on
        the suspect stays, and has such a row beside it.
        """
        if isinstance(row.target, int) and row.target_source != SCREENED_OUT:
            row = self._probed(row, trigger)
        if row.outcome == FAILS or row.target_source not in (SCREENED, SCREENED_OUT, SUSPECTED):
            return [row]
        found = self._found(row, trigger)
        if found is None:
            return [row]
        return [row, found] if row.target_source == SUSPECTED else [found]

    def _found(self, row: TriggerRow, trigger: Trigger) -> TriggerRow | None:
        """The row towards another class than that of `row` which another probe picks, where it fails or leaves it open.

        Screening looks at the same stamped images for each, whose features are remembered.
        """
        first, second = halves(len(self.trial.images), self.trial.seed)
        judged = None if row.target_source == SCREENED_OUT else row.target
        asked: set[tuple[int, int | None]] = set()
        for other in self.others.values():
            screened = screen(other, trigger, first)
            if not screened.survives or not isinstance(screened.target, int) or screened.target == judged:
                continue
            source = screened.source(screened.target)
            if (screened.target, source) in asked:  # every probe was, then
                continue
            asked.add((screened.target, source))
            aim = Aim(trigger, screened.target, SCREENED, source)
            stamped = stamped_predictions(self.trial, trigger, second)
            alone = measure(self.trial, aim, second, stamped, self.tried, beside=False).row
            found = self._probed(alone, trigger)
            if found.outcome == FAILS or (row.outcome == PASSES and found.outcome != alone.outcome):
                return found
        return None

    def _probed(self, row: TriggerRow, trigger: Trigger) -> TriggerRow:
        """`row` with the rates of the other probes on the same images, and of `floor`.

        One that its controls leave open fails where it is clearly above `floor`, or by another probe.
        """
        trial, target = self.trial, cast("int", row.target)
        first, second = halves(len(trial.images), trial.seed)
        # All images, or so many of the half that rows are measured on.
        chosen = torch.cat([first, second]) if row.images > len(second) else second[: row.images]
        reference, known = trial.reference[chosen], stamped_features(trial, trigger, chosen)
        answers = {name: head(known) for name, head in self.encoded.others.items()}
        probes = {
            name: rate(attack_success(of, reference, target, trial.classes)) for name, of in answers.items()
        }
        everything = rate(self.encoded.first(known) == target)
        least = None
        if self.floor is not None:
            least = rate(
                attack_success(
                    stamped_predictions(self.floor, trigger, chosen), reference, target, trial.classes
                )
            )
        row = replace(row, probes=probes, asr_all_images=everything, reference_rate=least)
        if row.outcome == INCONCLUSIVE and least is not None and above_twin(row, trial.threshold):
            return replace(
                row, outcome=FAILS, reason=f"{100 * (least.value or 0.0):.1f} % go there in the clean twin"
            )
        return row if row.outcome == FAILS else self._by_others(row, trigger, chosen, answers)

    def _by_others(
        self, row: TriggerRow, trigger: Trigger, chosen: Tensor, answers: Mapping[str, Tensor]
    ) -> TriggerRow:
        """`row`, which does not fail by the first probe, judged by the others, whose `answers` to `chosen` are known.

        Where all stamped images have one feature each probe sees a class of its own there: of a MoCo encoder under its
        trigger nearest neighbours sent 99 % to the attacker's class, a linear probe 8 % there and 76 % to another one.
        """
        rates = {name: of.value or 0.0 for name, of in row.probes.items()}
        aim = Aim(trigger, cast("int", row.target), row.target_source)
        for name in sorted(rates, key=lambda name: -rates[name]):
            if rates[name] < self.trial.threshold:
                break
            looks = self.tried * (1 + len(rates))
            found = measure(self.others[name], aim, chosen, answers[name], looks).row
            if found.outcome == FAILS:
                return replace(
                    row, outcome=FAILS, decisive_probe=name, decisive_source=found.decisive_source,
                    control_rate=found.control_rate, bounds=found.bounds, high=found.high,
                    reason=f"by the probe {name}, not by the linear one",
                )  # fmt: skip
            if row.outcome == PASSES and found.bounds and stands_out(found.bounds[0], self.trial.threshold):
                highest = (found.control_rate or {}).get("highest") or 0.0
                row = replace(
                    row, outcome=INCONCLUSIVE,
                    reason=f"by the probe {name} {100 * rates[name]:.1f} % go to the target, the highest control "
                    f"{100 * highest:.1f} %",
                )  # fmt: skip
        return row
