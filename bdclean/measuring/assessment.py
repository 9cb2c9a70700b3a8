"""What scan and cleanse share: screening, controls, the outcome of a row and the verdict of a run.

The rules are those of the product's measures: an ASR means nothing without its base rate, its controls and its n.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bdclean.measuring.rows import FEW_ROWS, Aim, Measured, measure, measure_all
from bdclean.measuring.screening import Screened, dropped, look_at, screen, to_the_end
from bdclean.measuring.trial import (
    LEAST_SCREENED,
    SAME_IMAGES,
    SCREENED,
    Target,
    Trial,
    halves,
    stamped_predictions,
    telling_images,
)
from bdclean.record.run import FAILS, INCONCLUSIVE, PASSES
from bdclean.triggers.stamping import Trigger

LOOKS_AT_EACH = 3
"""So often a survivor is looked at: on a part of the images, on all, and at its best pair of classes."""
SUSPECTED = "suspect"
"""Where a target is from that was found on another model."""


def assess(
    trial: Trial,
    triggers: Sequence[Trigger],
    target: str | int = "auto",
    fixed: Mapping[str, Target] | None = None,
) -> Iterator[Measured]:
    """A row for each of `triggers` (with `target` "each", a row for each trigger and class), as soon as it is known.

    `target` is "auto", "each", "next" or a class. `fixed` gives targets by trigger SPEC that were found on another
    model (the suspect): those are measured in any case, and screened for other classes. What screening drops is known
    first: see `in_order`.
    """
    everything = torch.cat(halves(len(trial.images), trial.seed))
    if target == "next" or isinstance(target, int):
        aims = [Aim(trigger, target, "given") for trigger in triggers]
        yield from measure_all(trial, aims, everything, len(aims))
    elif target == "each":
        aims = [Aim(trigger, k, "each") for trigger in triggers for k in range(trial.classes)]
        yield from measure_all(trial, aims, everything, len(aims))
    elif len(trial.images) < LEAST_SCREENED:
        aims = list(_same_images(trial, triggers, everything, fixed or {}))
        yield from measure_all(trial, aims, everything, len(triggers) * (trial.classes + 1))
    else:
        yield from _screened(trial, triggers, fixed or {})


def in_order(found: Iterable[Measured], triggers: Sequence[Trigger]) -> list[Measured]:
    """What `assess` found, in the order of `triggers`."""
    places = {trigger.spec(): place for place, trigger in reversed(list(enumerate(triggers)))}
    return sorted(found, key=lambda measured: places[measured.row.trigger])


def _same_images(
    trial: Trial, triggers: Sequence[Trigger], everything: Tensor, fixed: Mapping[str, Target]
) -> Iterator[Aim]:
    """Each trigger with its target, which is chosen on the images that it is then measured on."""
    for done, trigger in enumerate(triggers):
        look = look_at(trial, everything, stamped_predictions(trial, trigger, everything))
        known = fixed.get(trigger.spec())
        if known is not None:
            yield Aim(trigger, known, SUSPECTED)
        if known is None or (look.gain > 0 and look.target != known):
            yield Aim(trigger, look.target, SAME_IMAGES)
        trial.tell("screening", done + 1, len(triggers))


def _screened(trial: Trial, triggers: Sequence[Trigger], fixed: Mapping[str, Target]) -> Iterator[Measured]:
    """What screening on one half drops, then its survivors, measured on the other half.

    What was found on the suspect is measured in any case, and screened for any other class: a backdoor may have moved.
    """
    first, second = halves(len(trial.images), trial.seed)
    kept: list[tuple[Screened, list[Aim]]] = []
    for done, trigger in enumerate(triggers):
        screened = screen(trial, trigger, first)
        aims = list(_aims(screened, fixed.get(trigger.spec())))
        if aims:
            kept.append((screened, aims))
        else:
            yield Measured(dropped(screened))
        trial.tell("screening", done + 1, len(triggers), kept=len(kept))
    tried, failing = LOOKS_AT_EACH * sum(len(aims) for _, aims in kept), 0
    for done, (screened, aims) in enumerate(kept):
        found = _measured(trial, screened, aims, second, tried, beside=len(triggers) <= FEW_ROWS)
        failing += any(measured.row.outcome == FAILS for measured in found)
        trial.tell("measuring", done + 1, len(kept), failing=failing)
        yield from found


def _measured(
    trial: Trial, screened: Screened, aims: Sequence[Aim], second: Tensor, tried: int, beside: bool
) -> list[Measured]:
    """Rows of one survivor: on a part of the images if it passes there, else on all, at last towards its best pair.

    `beside`: one that passes has controls beside it, too; else those alone whose target was found on another model.
    """
    trigger, few = screened.trigger, second[: max(LEAST_SCREENED, len(second) // 4)]

    def rows(chosen: Tensor, stamped: Tensor) -> list[Measured]:
        return [measure(trial, aim, chosen, stamped, tried, beside=False) for aim in aims]

    def with_controls(found: list[Measured], chosen: Tensor, stamped: Tensor) -> list[Measured]:
        return [
            measured
            if aim.searched and measured.row.outcome == PASSES and not beside
            else measure(trial, aim, chosen, stamped, tried)
            for aim, measured in zip(aims, found, strict=True)
        ]

    stamped = stamped_predictions(trial, trigger, few)
    if len(few) < len(second) and all(aim.searched and _tells(trial, aim.source, few) for aim in aims):
        found = rows(few, stamped)
        if all(measured.row.outcome == PASSES for measured in found):
            return with_controls(found, few, stamped)
    stamped = torch.cat([stamped, stamped_predictions(trial, trigger, second[len(few) :])])
    found = with_controls(rows(second, stamped), second, stamped)
    if found[-1].row.outcome == INCONCLUSIVE and (pair := _best_pair(trial, screened, aims)) is not None:
        confirmed = measure(trial, pair, second, stamped, tried, beside=False)
        if confirmed.row.outcome == FAILS:
            found.append(confirmed)
    return found


def _tells(trial: Trial, source: int | None, few: Tensor) -> bool:
    """Whether the images `few` are enough to pass the source class that was picked."""
    return source is None or int((trial.reference[few] == source).sum()) >= telling_images(trial.threshold)


def _aims(screened: Screened, known: Target | None) -> Iterator[Aim]:
    """The target that is `known` from the suspect, and that which screening found, if another."""
    trigger = screened.trigger
    if known is not None:
        yield Aim(trigger, known, SUSPECTED, screened.source(known))
    if screened.survives and screened.target != known:
        yield Aim(trigger, screened.target, SCREENED, screened.source(screened.target))


def _best_pair(trial: Trial, screened: Screened, aims: Sequence[Aim]) -> Aim | None:
    """The source class and its target that the first half speaks for most, towards another class than `aims`."""
    looked = to_the_end(trial, screened)
    targets = [aim.target for aim in aims]
    pair = next((pair for pair in looked.look.pairs if pair.target not in targets), None)
    return None if pair is None else Aim(screened.trigger, pair.target, SCREENED, pair.source)
