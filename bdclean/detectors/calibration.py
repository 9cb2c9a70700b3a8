"""What detectors say of networks without a backdoor, shipped as numbers, and how odd a network is among those.

`python -m bdclean.bench calibrate` makes the numbers. No published threshold of a detector holds on clean networks:
what may decide is the rank of a network's statistic among those of clean networks of its kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
LEAST_MATCHING = 19
"""Of fewer clean networks no p-value is as small as 0.05."""
FEW_CLASSES = 4
"""Up to so many, the least or largest of the classes has hardly others to stand out from."""
BY_ITSELF = ("patches",)
"""What these say of a class does not depend on how many others there are: their clean networks are of any number."""
SIDES = (16, 64)
"""Of small images; nothing is known of larger ones."""


@dataclass(frozen=True)
class Clean:
    """A clean network: its kind, and the statistic of each detector that was asked. None: it could not say anything."""

    network: str
    family: str
    classes: int
    side: int
    scores: Mapping[str, float | None]


@lru_cache(maxsize=1)
def table() -> tuple[Clean, ...]:
    """All clean networks, as shipped."""
    return tuple(Clean(**row) for row in json.loads(FILE.read_text(encoding="utf-8")))


def kind(classes: int, side: int, detector: str = "") -> tuple[bool, bool]:
    """What two networks must have in common to be held against each other: few classes or not, small images or not."""
    return classes <= FEW_CLASSES and detector not in BY_ITSELF, SIDES[0] <= side <= SIDES[1]


def kind_said(classes: int, side: int, detector: str = "") -> str:
    """The same in words."""
    few, small = kind(classes, side, detector)
    counts = f"up to {FEW_CLASSES}" if few else f"more than {FEW_CLASSES}"
    if detector in BY_ITSELF:
        counts = "any number of"
    return f"{counts} classes, images {'of' if small else 'beyond'} {SIDES[0]} to {SIDES[1]} pixels"


def matching(detector: str, classes: int, side: int, without: str | None = None) -> list[float]:
    """The statistics of `detector` of the clean networks of this kind, ascending; `without` the one of that name."""
    scores = (
        clean.scores.get(detector)
        for clean in table()
        if clean.network != without
        and kind(clean.classes, clean.side, detector) == kind(classes, side, detector)
    )
    return sorted(score for score in scores if score is not None)


def p_value(score: float, scores: list[float]) -> float | None:
    """(1 + those of `scores` that are as large) / (1 + their number), None of fewer than LEAST_MATCHING."""
    if len(scores) < LEAST_MATCHING:
        return None
    return (1 + sum(other >= score for other in scores)) / (1 + len(scores))
