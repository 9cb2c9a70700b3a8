"""Accuracy against attack success, one small drawing a model: runs of one model stand in one drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bdclean.record.run import Measure, Rate, RunRecord
from bdclean.report import wording
from bdclean.report.page import numbers, words
from bdclean.report.ranking import of_source, speaking_source, worst_pair, worst_row

SIDE, MARGIN = 180, 14  # of a drawing, in its units


@dataclass
class Point:
    """A network in a drawing, with the ends of its 95 % intervals, in its units."""

    x: float
    y: float
    xs: tuple[float, float]
    ys: tuple[float, float]
    begun: bool  # the suspect of a cleansing
    title: str


@dataclass
class Panel:
    """One model: of a scan a point, of a cleansing two with a line between."""

    name: str
    points: list[Point]
    moves: list[tuple[Point, Point]]


def panels(records: Sequence[RunRecord]) -> list[Panel]:
    """Returns a drawing for each model of which both rates are known, in the order of the runs."""
    found: dict[str, Panel] = {}
    for number, record in enumerate(records, 1):
        points = _points(record, number)
        if not points:
            continue
        entry = record.checkpoint
        key = entry.sha256 or entry.path if entry is not None else f"run {number}"
        panel = found.setdefault(str(key), Panel(words.name(record), [], []))
        panel.points += points
        panel.moves += [(points[0], points[1])] if len(points) > 1 else []
    return list(found.values())


def _points(record: RunRecord, number: int) -> list[Point]:
    """The network that was read, and that which was written; empty where one of them lacks a rate."""
    first, now = worst_pair(record)
    accuracy = record.measure("clean_accuracy")
    if record.before is None:
        now = worst_row(record.rows())
        sides = [(now, accuracy, "")]
    else:
        sides = [(first, numbers.of_suspect(record, "clean_accuracy"), "before"), (now, accuracy, "after")]
    source = speaking_source(now, first) if now is not None else None
    points = [
        _point(of_source(row, source), right, f"run {number}{f', {side}' if side else ''}", side == "before")
        for row, right, side in sides
        if row is not None
    ]
    known = [point for point in points if point is not None]
    return known if len(known) == len(sides) else []


def _point(asr: Rate | None, accuracy: Measure | None, said: str, begun: bool) -> Point | None:
    if asr is None or asr.value is None or accuracy is None or accuracy.value is None:
        return None
    title = (
        f"{said}: attack success {wording.percent(asr.value)} %, accuracy {wording.percent(accuracy.value)} %"
    )
    left, right = (_across(asr.value if end is None else end) for end in (asr.low, asr.high))
    below, above = (_up(accuracy.value if end is None else end) for end in (accuracy.low, accuracy.high))
    return Point(_across(asr.value), _up(accuracy.value), (left, right), (below, above), begun, title)


def _across(share: float) -> float:
    return round(MARGIN + (SIDE - 2 * MARGIN) * min(1.0, max(0.0, share)), 1)


def _up(share: float) -> float:
    return round(SIDE - _across(share), 1)
