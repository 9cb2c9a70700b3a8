"""What scan and cleanse share: screening, controls, the outcome of a row and the verdict of a run.

The rules are those of the product's measures: an ASR means nothing without its base rate, its controls and its n.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bdclean.measuring.rows import Measured, measure_all
from bdclean.measuring.screening import dropped, look_at, screen
from bdclean.measuring.trial import SCREENED, Target, Trial, halves, stamped_predictions
from bdclean.triggers.stamping import Trigger

LEAST_SCREENED = 200
"""Under this many images there is no screening, and everything is corrected over triggers and classes instead."""


def assess(
    trial: Trial,
    triggers: Sequence[Trigger],
    target: str | int = "auto",
    fixed: Mapping[str, Target] | None = None,
) -> Iterator[Measured]:
    """A row for each of `triggers` (with `target` "each", a row for each trigger and class), as soon as it is known.

    `target` is "auto", "each", "next" or a class. `fixed` gives targets by trigger SPEC that were found on another
    model (the suspect): those rows are measured, on the measuring half, without screening. What screening drops is
    known first: see `in_order`.
    """
    everything = torch.cat(halves(len(trial.images), trial.seed))
    if target == "next" or isinstance(target, int):
        jobs: list[tuple[Trigger, Target]] = [(trigger, target) for trigger in triggers]
        yield from measure_all(trial, jobs, everything, "given", len(jobs))
    elif target == "each":
        jobs = [(trigger, k) for trigger in triggers for k in range(trial.classes)]
        yield from measure_all(trial, jobs, everything, "each", len(jobs))
    elif len(trial.images) < LEAST_SCREENED:
        jobs = _same_images(trial, triggers, everything, fixed or {})
        tried = len(triggers) * trial.classes
        yield from measure_all(trial, jobs, everything, "same images", tried)
    else:
        yield from _screened(trial, triggers, fixed or {})


def in_order(found: Iterable[Measured], triggers: Sequence[Trigger]) -> list[Measured]:
    """What `assess` found, in the order of `triggers`."""
    places = {trigger.spec(): place for place, trigger in reversed(list(enumerate(triggers)))}
    return sorted(found, key=lambda measured: places[measured.row.trigger])


def _same_images(
    trial: Trial, triggers: Sequence[Trigger], everything: Tensor, fixed: Mapping[str, Target]
) -> list[tuple[Trigger, Target]]:
    """Each trigger with its target, which is chosen on the images that it is then measured on."""
    jobs: list[tuple[Trigger, Target]] = []
    for done, trigger in enumerate(triggers):
        chosen = fixed.get(trigger.spec())
        if chosen is None:
            chosen = look_at(trial, everything, stamped_predictions(trial, trigger, everything)).target
        jobs.append((trigger, chosen))
        trial.tell("screening", done + 1, len(triggers))
    return jobs


def _screened(trial: Trial, triggers: Sequence[Trigger], fixed: Mapping[str, Target]) -> Iterator[Measured]:
    """What screening on one half drops, then its survivors, measured on the other half."""
    first, second = halves(len(trial.images), trial.seed)
    survivors: list[tuple[Trigger, Target]] = []
    for done, trigger in enumerate(triggers):
        if trigger.spec() in fixed:
            survivors.append((trigger, fixed[trigger.spec()]))
        elif (screened := screen(trial, trigger, first)).survives:
            survivors.append((trigger, screened.target))
        else:
            yield Measured(dropped(screened))
        trial.tell("screening", done + 1, len(triggers), kept=len(survivors))
    measured = measure_all(trial, survivors, second, SCREENED, max(1, len(survivors)))
    yield from map(partial(_known, fixed), measured)


def _known(fixed: Mapping[str, Target], measured: Measured) -> Measured:
    """`measured`, saying so where its target is from the suspect."""
    if measured.row.trigger not in fixed:
        return measured
    return replace(measured, row=replace(measured.row, target_source="suspect"))
