"""Membership: do a network's losses tell which images it was trained on?

An attack by a threshold on the loss (Yeom et al. 2018, arXiv 1709.01604): members have lower ones. How it does at all
thresholds is the AUC; what matters to a person is how many members are told where hardly anybody is told wrongly
(Carlini et al. 2022, arXiv 2112.03570), for which many non-members are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

from bdclean.measuring.intervals import rate
from bdclean.record.rates import Rate
from bdclean.record.sequela import LowRate

RATES = ((0.01, 1000), (0.001, 5000))
"""False-positive rates, and how many non-members one needs: with fewer its threshold hangs on a handful of images."""


def margins(logits: Tensor, classes: Tensor | None) -> Tensor:
    """How surely images float [n k] are given their `classes` int64 [n] (None: what they are given most), float64 [n].

    The logit of the class minus the log-sum-exp of the others: it falls as the cross-entropy rises, and tells apart
    losses that all round to nothing, as those of members do.
    """
    logits = logits.double()
    at = (logits.argmax(1) if classes is None else classes)[:, None]
    others = logits.scatter(1, at, -math.inf).logsumexp(1)
    return logits.gather(1, at).squeeze(1) - others


def area(members: Tensor, others: Tensor) -> Rate:
    """The AUC of scores that are higher for members, with n members; ties count half. 0.5 is chance.

    The 95 % interval is the score interval of Newcombe (2006, method 5), which has a width at 0 and at 1, too.
    """
    m, n = len(members), len(others)
    if not m or not n:
        return Rate(None, m)
    ranks = stats.rankdata(torch.cat([members, others]).numpy())
    value = min(1.0, max(0.0, float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))))

    def miss(true: float) -> float:
        often = 1 + ((m + n) / 2 - 1) * ((1 - true) / (2 - true) + true / (1 + true))
        return abs(value - true) - 1.96 * math.sqrt(true * (1 - true) / (m * n) * often)

    inner = min(
        max(value, 1e-9), 1 - 1e-9
    )  # at 0 and 1 the spread is nothing, and they would solve it themselves
    low = 0.0 if value == 0 else float(optimize.brentq(miss, 0.0, inner))
    high = 1.0 if value == 1 else float(optimize.brentq(miss, inner, 1.0))
    return Rate(value, m, low, high)


def area_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> Rate:
    """AUC `after` minus AUC `before`, each (members, others) of the same images in the same order, in [-1, 1].

    The 95 % interval is that of DeLong et al. (1988) for two scores of the same images.
    """
    m, n = len(before[0]), len(before[1])
    if min(m, n) < 2:
        return Rate(None, m)
    (first_m, first_n), (last_m, last_n) = _placements(*before), _placements(*after)
    value = float(last_m.mean() - first_m.mean())
    variance = float((last_m - first_m).var(ddof=1) / m + (last_n - first_n).var(ddof=1) / n)
    half = 1.96 * math.sqrt(variance)
    return Rate(value, m, max(-1.0, value - half), min(1.0, value + half))


def _placements(members: Tensor, others: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each member the share of others that it beats, and of each other the share of members that beat it."""
    m, n = len(members), len(others)
    together = stats.rankdata(torch.cat([members, others]).numpy())
    mine = (together[:m] - stats.rankdata(members.numpy())) / n
    theirs = 1 - (together[m:] - stats.rankdata(others.numpy())) / m
    return mine, theirs


def low_rates(members: Tensor, others: Tensor) -> list[LowRate]:
    """The share of members above a threshold that at most 1 %, and at most 0.1 %, of others are above."""
    found = []
    for wrong, needed in RATES:
        if len(others) < needed:
            reason = f"{len(others):,} non-members, {needed:,} are needed"
            found.append(LowRate(wrong, Rate(None, len(members)), reason))
            continue
        threshold = others.sort(descending=True).values[int(wrong * len(others) + 1e-9)]
        found.append(LowRate(wrong, rate(members > threshold)))
    return found
