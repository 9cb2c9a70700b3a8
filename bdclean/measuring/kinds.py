"""Kinds of changes: what networks without a backdoor do under them, and what it takes to do more."""

from __future__ import annotations

from dataclasses import dataclass

from bdclean.measuring.trial import Trial
from bdclean.triggers.stamping import Trigger

SMALL = 0.1
"""Share of the pixels up to which a change is a small patch."""
FEW_CLASSES, FEW_STAMPED = 4, 64
PATCH, PICTURE = 0.5, 0.9
WAVES = ((15, 0.9), (30, 0.98))
"""The lower bounds from which on controls do not matter, since copies of a trigger fire like it: of small patches, of
larger changes, and of waves by their strength (root mean square, grey levels), above which controls always matter.

Of 40 networks without a backdoor (bench small-networks) under the stock bank and squares up to 8 of 32 pixels small
patches moved at most 0.34 of the images, and blended pictures 0.7. Waves of up to 15 grey levels moved 0.63, of up to
30 0.96, stronger ones 0.99, with over FEW_CLASSES classes. With fewer all of a picture may move: there controls always
matter. Waves that were a trigger moved 0.996 and more, their controls as much."""
MOVED = (0.5, 0.85)
"""So much of all images must move under a change that is no small patch, and under waves: networks that had no such
trigger moved 0.43 and 0.76 of them under stripes, beside 0.20 and 0.53 under the highest of 19 controls, whose
frequencies they mind less. Waves that were a trigger moved 0.996 and more."""
NEEDED = (0.7, 0.9)
"""So much of one source class must move, under a small patch and under a larger change: without a backdoor 0.60 of one
moved under small patches, 0.9 and more under others, where controls always matter."""


@dataclass(frozen=True)
class Kind:
    """Shares of images, and of a source class's, that decide a row of such changes: see WAVES, MOVED, NEEDED.

    `certain`: a lower bound from which on controls do not matter, None where they always do; `needed`: what must move.
    In a network whose answers hardly stay by themselves (Trial.steady) every change is held as strong waves are: with
    random filters under a fitted head small patches moved up to 0.59 of the images, their controls up to 0.31. So is
    what nobody counted on networks without a backdoor (Trial.counted).
    """

    certain: float | None
    needed: float
    source_certain: float | None
    source_needed: float

    @staticmethod
    def of(trial: Trial, trigger: Trigger) -> Kind:
        if not (trial.steady and trial.counted):
            return Kind(None, MOVED[True], None, NEEDED[1])
        some = trial.images[:FEW_STAMPED]
        change = trigger(some).float() - some.float()
        if float((change != 0).any(1).float().mean()) <= SMALL:
            return Kind(PATCH, 0.0, PICTURE, NEEDED[0])
        certain: float | None = PICTURE
        wave = trigger.family == "wave"
        if trial.classes <= FEW_CLASSES:
            certain = None
        elif wave:
            strength = float(change.square().mean().sqrt())
            certain = next((level for most, level in WAVES if strength <= most), None)
        return Kind(certain, MOVED[wave], None, NEEDED[1])
