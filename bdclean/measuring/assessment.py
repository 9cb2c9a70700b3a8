"""What scan and cleanse share: screening, controls, the outcome of a row and the verdict of a run.

The rules are those of the product's measures: an ASR means nothing without its base rate, its controls and its n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bdclean.measuring.rows import measure_all
from bdclean.measuring.screening import Screened, dropped, look_at, screen
from bdclean.measuring.trial import SCREENED, Bench, Target, halves, stamped_predictions
from bdclean.record.run import (
    TriggerRow,
)
from bdclean.triggers.stamping import Trigger

LEAST_SCREENED = 200
"""Under this many images there is no screening, and everything is corrected over triggers and classes instead."""


def assess(
    bench: Bench,
    triggers: Sequence[Trigger],
    target: str | int = "auto",
    fixed: dict[str, Target] | None = None,
    found: list[TriggerRow] | None = None,
) -> list[TriggerRow]:
    """A row for each of `triggers` (with `target` "each", a row for each trigger and class).

    `target` is "auto", "each", "next" or a class. `fixed` gives targets by trigger SPEC that were found on another
    model (the suspect): those rows are measured, on the measuring half, without screening. `found` gets each row as
    soon as it is known, for the record of a run that does not end.
    """
    found = [] if found is None else found
    n = len(bench.images)
    everything = torch.cat(halves(n, bench.seed))
    if target == "next" or isinstance(target, int):
        jobs = [(trigger, target) for trigger in triggers]
        return measure_all(bench, jobs, everything, "given", len(jobs), found)
    if target == "each":
        jobs = [(trigger, k) for trigger in triggers for k in range(bench.classes)]
        return measure_all(bench, jobs, everything, "each", len(jobs), found)
    fixed = fixed or {}
    if n < LEAST_SCREENED:
        jobs = []

        def target_of(trigger: Trigger) -> int:
            return look_at(bench, everything, stamped_predictions(bench, trigger, everything)).target

        for done, trigger in enumerate(triggers):
            chosen = fixed.get(trigger.spec())
            jobs.append((trigger, target_of(trigger) if chosen is None else chosen))
            bench.tell("screening", done + 1, len(triggers))
        return measure_all(bench, jobs, everything, "same images", len(triggers) * bench.classes, found)
    first, second = halves(n, bench.seed)
    screened = []
    for done, trigger in enumerate(triggers):
        if trigger.spec() in fixed:
            screened.append(Screened(trigger, fixed[trigger.spec()], 0, 0, 0, True))
        else:
            screened.append(screen(bench, trigger, first))
        if not screened[-1].survives:
            found.append(dropped(screened[-1]))
        bench.tell("screening", done + 1, len(triggers), kept=sum(s.survives for s in screened))
    survivors = [(s.trigger, s.target) for s in screened if s.survives]
    measured = iter(measure_all(bench, survivors, second, SCREENED, max(1, len(survivors)), found))
    rows = [next(measured) if s.survives else dropped(s) for s in screened]
    for row in rows:
        if row.trigger in fixed:
            row.target_source = "suspect"
    return rows
