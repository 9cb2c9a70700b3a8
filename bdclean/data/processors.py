"""How many processors this process may use: those that it is bound to, and no more than its container's quota."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

GROUPS = Path("/sys/fs/cgroup")


def usable(groups: Path = GROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """At least 1. A quota is a share of time: threads beyond it wait for one another in turns.

    `groups`, `own`: where the system says what control groups are given, and which this process is in.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = min(_quotas(groups, own))
    return bound if given >= bound else max(1, math.ceil(given))


def use_usable() -> None:
    """Lets torch compute on no more threads than there are usable processors; OMP_NUM_THREADS is obeyed."""
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(min(torch.get_num_threads(), usable()))


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """Processors that the group of this process is given, and each group around it; none where nothing is said."""
    yield math.inf
    names = [line.split(":", 2)[2] for line in _text(own).splitlines() if line.startswith("0::")]
    inside = Path(names[0].lstrip("/") if names else "")
    for part in (inside, *inside.parents):
        quota, _, period = _text(groups / part / "cpu.max").partition(" ")
        yield _share(quota, period)
    older = groups / "cpu"
    yield _share(_text(older / "cpu.cfs_quota_us"), _text(older / "cpu.cfs_period_us"))


def _share(quota: str, period: str) -> float:
    """Microseconds in each period as processors; infinite where one is no positive number (`max`, -1)."""
    quota, period = quota.strip(), period.strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
