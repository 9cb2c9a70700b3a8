"""The numbers of a record: shares and named measures, always with n and an interval."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Rate:
    """A share in [0, 1] of `n` images with its 95 % interval; None where it was not measured."""

    value: float | None = None
    n: int = 0
    low: float | None = None
    high: float | None = None


@dataclass
class Measure:
    """A named number with its interval: clean_accuracy, agreement, ... None where it was not measured."""

    name: str
    value: float | None = None
    n: int = 0
    low: float | None = None
    high: float | None = None
