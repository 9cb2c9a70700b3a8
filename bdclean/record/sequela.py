"""What a cleansing leaves behind, as it stands in a record: who was trained on, and how near the backdoor still is."""

from __future__ import annotations

from dataclasses import dataclass, field

from bdclean.record.rates import Rate

SUSPECT, OUTPUT, REFERENCE = "suspect", "output", "reference"
"""Whom a row is about: the network that was read, the one that was written, the clean twin of `--reference`."""
TRIGGER, CONTROL, UNPOISONED = "trigger", "control", "none"
"""What an attacker stamps on his images: the trigger, another of its place and strength, nothing."""


@dataclass
class LowRate:
    """The share of members that is told where hardly a non-member is taken for one; null where those are too few."""

    false_positive_rate: float
    true_positive_rate: Rate = field(default_factory=Rate)  # its interval takes the threshold as given
    reason: str = ""  # why it is null


@dataclass
class Membership:
    """How well the losses of one network tell images that it was trained on from others: an AUC of 0.5 is chance."""

    model: str  # suspect or output
    members: str  # given: of --members; cleansing: the images that the recipe was given
    images: int
    non_members: int
    loss: str  # of labels, or of the network's own answers where not all of these images have labels
    auc: Rate = field(default_factory=Rate)  # n members
    low: list[LowRate] = field(default_factory=list)
    change: Rate | None = None  # of the output: its AUC minus the suspect's, in [-1, 1], paired interval


@dataclass
class Score:
    """What a network does after so many steps of an attacker's tuning."""

    steps: int
    asr: Rate = field(default_factory=Rate)
    base_rate: Rate = field(default_factory=Rate)
    accuracy: Rate = field(default_factory=Rate)


@dataclass
class Injection:
    """A copy of a network tuned on images of which some are poisoned: does a backdoor come (back) in, and how soon?"""

    part: str  # reinjection or retuning
    model: str  # suspect, output or reference
    trigger: str  # its SPEC
    target: int | str | None
    stamped: str  # with the trigger, with a control of its place and strength, or none
    poisoned: int
    images: int
    scores: list[Score] = field(
        default_factory=list
    )  # none behind the one at which the backdoor was in for sure
    reached: int | None = (
        None  # the first step scored at which half of the images obey; null: by none, see `until`
    )
    until: int = 0  # the last step scored: what was not reached is censored here


@dataclass
class Reactivation:
    """A trigger that was changed, on a network that was not."""

    model: str  # suspect or output
    trigger: str
    target: int | str | None
    change: str  # as it is; amplified; moved; optimised, and the same without the trigger
    asr: Rate = field(default_factory=Rate)
    base_rate: Rate = field(default_factory=Rate)


@dataclass
class PathPoint:
    """A network between suspect and output: its weights are (1 - share) of the suspect's and share of the output's."""

    share: float
    trigger: str
    target: int | str | None
    asr: Rate = field(default_factory=Rate)
    base_rate: Rate = field(default_factory=Rate)
    accuracy: Rate = field(default_factory=Rate)


@dataclass
class Sequela:
    """What `--sequela` measured; what it could not is among what was `skipped`, with the reason."""

    asked: list[str] = field(default_factory=list)
    labels: str = ""  # what accuracy and tuning go by: labels, or the suspect's own answers
    membership: list[Membership] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)
    reactivation: list[Reactivation] = field(default_factory=list)
    path: list[PathPoint] = field(default_factory=list)
