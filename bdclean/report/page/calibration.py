"""Where a detector's score lies among those of clean networks, drawn: a tick for each, and this network's mark."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bdclean.record.run import Calibration, RunRecord

WIDTH, MARGIN = 600, 12  # in units of the drawing
MOST_TICKS = 2_000
MOST_STRIPS = 16


@dataclass
class Strip:
    """The drawing of one detector: places along its width, and what it says in words."""

    detector: str
    ticks: list[float]
    mark: float
    low: float
    high: float
    said: str


def strips(record: RunRecord) -> list[Strip]:
    """Returns a drawing for each calibrated detector; what is not finite, or not there, is left out."""
    return [made for found in (record.calibration or [])[:MOST_STRIPS] if (made := _strip(found)) is not None]


def _strip(found: Calibration) -> Strip | None:
    scores = [score for score in found.scores[:MOST_TICKS] if math.isfinite(score)]
    if not scores or not math.isfinite(found.score):
        return None
    low, high = min([*scores, found.score]), max([*scores, found.score])
    span = (high - low) or 1.0

    def place(score: float) -> float:
        return round(MARGIN + (WIDTH - 2 * MARGIN) * (score - low) / span, 1)

    above = sum(score >= found.score for score in scores)
    said = f"{found.kind}: {above} of {len(scores)} clean networks score as high"
    if found.p_value is None:
        said += "; too few to calibrate"
    return Strip(found.detector, [place(score) for score in scores], place(found.score), low, high, said)
