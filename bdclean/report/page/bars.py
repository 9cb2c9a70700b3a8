"""Trigger rows as bars: shares in percent of a track, for base rate, controls, interval and threshold, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bdclean.record.run import NOT_MEASURED, PASSES, Measure, Rate, RunRecord, TriggerRow
from bdclean.report import wording
from bdclean.report.ranking import knowledge, of_source, paired_rank, same, speaking_source
from bdclean.report.rows import apart

SHOWN = 12
"""Rows that pass (before and after) beyond so many of a group are folded away, whatever their number."""
NOTES = (
    "",
    "It trained on counterfeits of these families, never on these triggers.",
    "They fired on the suspect in this run, and the recipe trained on them: that they are gone says nothing of others.",
)
"""On the rows of each `knowledge`."""


@dataclass
class Track:
    """One bar of a row. Places are in percent of the track, None where that was not measured."""

    name: str  # before, after, or nothing for a scan
    outcome: str
    value: float | None
    low: float | None
    high: float | None
    base: float | None
    median: float | None
    highest: float | None
    number: str
    interval: str
    beside: str  # base rate and controls in words
    spoken: str


@dataclass
class Bar:
    """One trigger row, of a cleansing both models."""

    trigger: str
    target: int | str | None
    outcome: str
    tracks: list[Track]
    change: str = ""
    change_interval: str = ""
    reason: str = ""
    source: str = ""


@dataclass
class Group:
    """Rows under one heading, the worst first; `folded` all pass."""

    title: str
    note: str
    bars: list[Bar]
    folded: list[Bar] = field(default_factory=list)


def groups(record: RunRecord) -> list[Group]:
    """Returns the rows of the model that the verdict is about; those that a recipe knew more of come apart."""
    found = []
    for title, chosen in apart(record):
        if not chosen:
            continue
        note = NOTES[knowledge(chosen[0])]
        before = record.before.triggers if record.before is not None else []
        ranked = sorted(chosen, key=lambda row: paired_rank(row, same(before, row)))
        bars = [_bar(record, row) for row in ranked]
        first: list[Bar] = []
        folded: list[Bar] = []
        for bar in bars:
            passing = all(track.outcome == PASSES for track in bar.tracks)
            (folded if passing and len(first) >= _room(bars) else first).append(bar)
        found.append(Group(title, note, first, folded))
    return found


def signed(found: Rate | Measure | None) -> tuple[str, str]:
    """Returns a difference in points with its sign, and its interval; nothing where it was not measured."""
    if found is None or found.value is None:
        return "", ""
    if found.low is None or found.high is None:
        return _sign(found.value), ""
    return _sign(found.value), f"{_sign(found.low)} to {_sign(found.high)}"


def interval(found: Rate | Measure | None) -> str:
    """Returns the interval and n of a share, such as `95.1\u201398.6, n 500`."""
    if found is None or found.value is None:
        return ""
    if found.low is None or found.high is None:
        return f"n\u00a0{found.n:,}"
    return f"{wording.percent(found.low)}\u2013{wording.percent(found.high)}, n\u00a0{found.n:,}"


def _room(bars: Sequence[Bar]) -> int:
    """How many rows are shown: all that do not pass, and some that do where there are few others."""
    striking = sum(any(track.outcome != PASSES for track in bar.tracks) for bar in bars)
    return max(striking, min(SHOWN, striking + 3))


def _bar(record: RunRecord, row: TriggerRow) -> Bar:
    old = same(record.before.triggers, row) if record.before else None
    cleansed = record.before is not None
    speaks = speaking_source(row, old)
    names = record.class_names()
    tracks = [_track("before", old, speaks, names)] if cleansed and old is not None else []
    tracks.append(_track("after" if cleansed else "", row, speaks, names))
    change, change_interval = signed(row.change if speaks is None else None)
    worst = row.worst_source or {}
    source = ""
    if row.outcome != PASSES and isinstance(worst.get("value"), (int, float)):
        rate = Rate(
            worst["value"], _count(worst.get("n")), _share(worst.get("low")), _share(worst.get("high"))
        )
        source = f"{wording.label(worst.get('class'), names)}: {wording.percent(rate.value)}\u00a0% ({interval(rate)})"
    return Bar(row.trigger, row.target, row.outcome, tracks, change, change_interval, row.reason, source)


def _track(name: str, row: TriggerRow, source: int | None, names: Sequence[str] | None) -> Track:
    """The bar of `row`: of one `source` class where that speaks for it, whose base rate and controls are not known."""
    rate = of_source(row, source) or Rate(None, 0)
    controls = (row.control_rate or {}) if source is None else {}
    median, highest = _share(controls.get("median")), _share(controls.get("highest"))
    base = row.base_rate.value if row.base_rate is not None and source is None else None
    beside = []
    if source is not None and row.asr.value is not None:
        beside = [f"of {wording.label(source, names)}", f"all images {wording.percent(row.asr.value)}"]
    if base is not None:
        beside.append(f"base {wording.percent(base)}")
    if highest is not None:
        beside.append(f"controls to {wording.percent(highest)}")
    measured = rate.value is not None
    number = f"{wording.percent(rate.value)}\u00a0%" if measured else "not measured"
    spoken = [f"{name} attack success rate {number}".strip(), interval(rate), *beside, row.outcome]
    return Track(
        name,
        row.outcome if measured else NOT_MEASURED,
        _percent(rate.value),
        _percent(rate.low),
        _percent(rate.high),
        _percent(base),
        _percent(median),
        _percent(highest),
        number,
        interval(rate),
        ", ".join(beside),
        ", ".join(part for part in spoken if part),
    )


def _share(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _percent(value: float | None) -> float | None:
    """A place on the track: a file's numbers may lie anywhere, a bar may not."""
    return None if value is None else round(100 * min(1.0, max(0.0, value)), 2)


def _sign(value: float) -> str:
    shown = f"{100 * value:+.1f}"
    return "0.0" if float(shown) == 0 else shown.replace("-", "\u2212")
