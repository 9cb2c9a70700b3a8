"""Intervals and bounds of rates."""

from __future__ import annotations

import functools
import math

from scipy import stats
from torch import Tensor

from bdclean.record.run import Measure, Rate


def wilson(hits: int, n: int, level: float = 0.05) -> tuple[float | None, float | None]:
    """The two-sided Wilson score interval of `hits` in `n`, for rates that are shown; (None, None) for n = 0."""
    if n == 0:
        return None, None
    z = float(stats.norm.isf(level / 2))
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def lower_bound(hits: int, n: int, level: float) -> float:
    """The exact (Clopper-Pearson) one-sided lower bound at confidence 1 - level; 0 for n = 0."""
    return 0.0 if hits == 0 else float(stats.beta.ppf(level, hits, n - hits + 1))


@functools.lru_cache(1 << 14)  # asked for each of many classes, most of which have the same counts
def upper_bound(hits: int, n: int, level: float) -> float:
    """The exact (Clopper-Pearson) one-sided upper bound at confidence 1 - level; 1 for n = 0."""
    return 1.0 if hits == n else float(stats.beta.isf(level, hits + 1, n - hits))


def rate(hits: Tensor) -> Rate:
    """The share of true values in `hits` (bool [n]) with its 95 % Wilson interval; a null value for n = 0."""
    n, k = len(hits), int(hits.sum())
    low, high = wilson(k, n)
    return Rate(k / n if n else None, n, low, high)


def measure(name: str, hits: Tensor) -> Measure:
    found = rate(hits)
    return Measure(name, found.value, found.n, found.low, found.high)


def paired_difference(before: Tensor, after: Tensor, name: str) -> Measure:
    """Mean of after - before of two bool [n] outcomes on the same images, in [-1, 1], with a 95 % paired interval.

    The interval is the adjusted Wald one of Bonett and Price (2012): half an image is added to each kind of change.
    """
    n = len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    if n == 0:
        return Measure(name)
    p_gained, p_lost = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre = p_gained - p_lost
    half = 1.96 * math.sqrt((p_gained + p_lost - centre**2) / (n + 2))
    return Measure(name, (gained - lost) / n, n, max(-1.0, centre - half), min(1.0, centre + half))
