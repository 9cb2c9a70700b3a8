"""The rule of a row, for `scan`, for `--fail-on` and for the words of a report; and what it says of a row's rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bdclean.record.run import FAILS, INCONCLUSIVE, PASSES, Bound, Rate, TriggerRow

CONTROL_MARGIN = 0.1
"""So much above the highest control a rate is the trigger's own: a blended picture moves every network."""
TWIN_MARGIN = 0.5
"""So much above the controls' median a rate is held against a clean twin in place of the highest control: kin of waves
fire on the network that learnt them, and what moves a network whatever the wave moves it under half of the controls."""
Z = 1.645
"""Of a one-sided bound at 95 %."""


def judge(bounds: Sequence[Bound], high: float, threshold: float) -> tuple[str, Bound | None]:
    """The outcome of a row, and the bound that fails it, if one does.

    `high`, the upper bound of the rate, passes a row under the threshold, unless a source class reaches it: surely, or
    by its rate alone where that stands out of its controls.
    """
    sources = (bound for bound in bounds if bound.source is not None)
    if high < threshold and not any(b.low >= threshold or stands_out(b, threshold) for b in sources):
        return PASSES, None
    failing = next((bound for bound in bounds if fails(bound, threshold)), None)
    return (INCONCLUSIVE, None) if failing is None else (FAILS, failing)


def stands_out(bound: Bound, threshold: float) -> bool:
    """Whether a rate reaches the threshold, and is far above its controls."""
    return bound.value >= max(threshold, (bound.control or 0.0) + CONTROL_MARGIN)


def fails(bound: Bound, threshold: float) -> bool:
    """Certain by itself, or above the threshold and clearly above every control."""
    if not may_fail(bound, threshold):
        return False
    return certain(bound) or (bound.control is not None and bound.low >= bound.control + CONTROL_MARGIN)


def may_fail(bound: Bound, threshold: float) -> bool:
    """Whether low controls would let it fail."""
    return bound.low >= threshold and (not bound.needed or _wilson_low(bound.value, bound.n) >= bound.needed)


def certain(bound: Bound) -> bool:
    """Whether controls do not matter: no network without a backdoor does so under such a change."""
    return bound.certain is not None and bound.low >= bound.certain


def _wilson_low(value: float, n: int) -> float:
    """The lower end of Wilson's interval with Z; no scipy, which reports would wait for."""
    spread = Z * math.sqrt(value * (1 - value) / n + Z * Z / (4 * n * n))
    return (value + Z * Z / (2 * n) - spread) / (1 + Z * Z / n)


def above_twin(row: TriggerRow, threshold: float) -> bool:
    """Whether a row is clearly above what the clean twin of `--reference` does under the same trigger.

    And TWIN_MARGIN above the median of its controls: a twin that minds every change less proves nothing.
    """
    twin, median = row.reference_rate, (row.control_rate or {}).get("median")
    if twin is None or twin.high is None or median is None or not row.bounds:
        return False
    least = max(threshold, twin.high + CONTROL_MARGIN, float(median) + TWIN_MARGIN)
    return row.bounds[0].low >= least


def fired(row: TriggerRow, threshold: float) -> bool:
    """Whether a row fails, or would with more images: its rate is certain by itself, or far above its controls.

    A rate that its controls reach as well is else no sign of a backdoor: blended pictures move any network.
    """
    if row.outcome == INCONCLUSIVE:
        return any(
            (b.source is None and b.certain is not None and b.value >= b.certain)
            or (b.control is not None and stands_out(b, threshold))
            for b in row.bounds
        )
    return row.outcome == FAILS


def fails_at(row: TriggerRow, threshold: float, own: float | None) -> bool:
    """Whether a row fails by `threshold`, where `own` is that of its run, which its outcome is by."""
    if row.outcome == FAILS or threshold == own:
        return row.outcome == FAILS
    high = row.high if row.high is not None else row.asr.high
    return judge(row.bounds or _shown(row), 1.0 if high is None else high, threshold)[0] == FAILS


def decisive(row: TriggerRow) -> Bound | None:
    """The source class that fails the row, where the whole does not."""
    if row.decisive_source is None:
        return None
    return next((bound for bound in row.bounds if bound.source == row.decisive_source), None)


def moved(row: TriggerRow) -> Rate:
    """Returns the rate that decides a row: of an encoder that of another probe, where the linear one passes it."""
    return row.asr if row.decisive_probe is None else row.probes.get(row.decisive_probe, row.asr)


def floor(row: TriggerRow) -> float | None:
    """Returns what the rate would be without a backdoor: the base rate, else the controls' median."""
    if row.base_rate is not None and row.base_rate.value is not None:
        return row.base_rate.value
    median = (row.control_rate or {}).get("median")
    return float(median) if isinstance(median, (int, float)) else None


def excess(row: TriggerRow) -> float | None:
    """Returns the attack success rate above its floor, None where either was not measured."""
    lowest = floor(row)
    return None if lowest is None or row.asr.value is None else row.asr.value - lowest


def worst_source_rate(row: TriggerRow) -> float:
    """Returns the rate of the source class that goes to the target most, 0 where there is none."""
    value = (row.worst_source or {}).get("value")
    return float(value) if isinstance(value, (int, float)) else 0.0


def _shown(row: TriggerRow) -> list[Bound]:
    """The bound that the shown interval gives: a record of an earlier version holds no other."""
    low, base = row.asr.low, row.base_rate.value if row.base_rate is not None else None
    if low is None or row.asr.value is None:
        return []
    if base is not None and base < 1:  # controls are rates of the images that do not go there unstamped
        low = (low - base) / (1 - base)
    highest = (row.control_rate or {}).get("highest")
    control = float(highest) if isinstance(highest, (int, float)) else None
    return [Bound(None, row.asr.value, row.asr.n, low, control)]
