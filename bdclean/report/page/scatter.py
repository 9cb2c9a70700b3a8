"""The map of an encoder's features as a drawing: dots for images as given, crosses for the same images stamped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bdclean.record.run import FeatureMap, MappedFeatures, RunRecord
from bdclean.report import wording

SIDE, MARGIN = 320, 10  # of a drawing, in its units
MOST_POINTS = 500
FARTHEST = 1e6  # of a place: features of length one lie within 2
MOST_COLOURS = 12
"""With more classes the colours cannot be told apart: then only the target's images have one."""


@dataclass
class Mark:
    """An image on the map. `hue` is in degrees of the colour circle, None for muted."""

    x: float
    y: float
    hue: int | None
    ringed: bool  # of the target class
    title: str


@dataclass
class Panel:
    """One encoder's map: where images lie as given and where the same ones lie stamped."""

    title: str
    caption: str
    given: list[Mark]
    stamped: list[Mark]


@dataclass
class Scatter:
    """The map of a run: of a scan one panel, of a cleansing two, drawn to one scale."""

    trigger: str
    target: str
    grouping: str  # labels, answers or clusters
    panels: list[Panel]
    legend: list[tuple[str, int]]  # name and hue of each class that is there


def scatter(record: RunRecord) -> Scatter | None:
    """Returns the drawing of a record's map; None where there is none, or what a file calls one is none."""
    found = record.feature_map
    if found is None or not 0 < len(found.groups) <= MOST_POINTS:
        return None
    models = [model for model in found.models[:2] if _whole(model, len(found.groups))]
    if not models:
        return None
    names = record.class_names() if found.grouping != "clusters" else None
    called = [
        f"cluster {group}" if found.grouping == "clusters" else wording.label(group, names)
        for group in found.groups
    ]
    present = sorted(set(found.groups))
    coloured = present if len(present) <= MOST_COLOURS else [g for g in present if g == found.target]
    hues = {group: 360 * place // max(len(present), 1) for place, group in enumerate(present)}
    legend = {called[found.groups.index(group)]: hues[group] for group in coloured}
    shown = {group: hues[group] for group in coloured}
    extent = max(_extent(model) for model in models)
    target = wording.label(found.target, names) if found.grouping != "clusters" else f"cluster {found.target}"
    return Scatter(
        found.trigger,
        target,
        found.grouping,
        [_panel(model, found, called, shown, extent, len(models) > 1) for model in models],
        list(legend.items()),
    )


def _whole(model: MappedFeatures, count: int) -> bool:
    """Whether a file's model has a place for each image, as given and stamped."""
    points = [*model.clean, *model.stamped]
    return len(model.clean) == len(model.stamped) == count and all(
        len(point) == 2 and all(abs(value) < FARTHEST for value in point) for point in points
    )


def _extent(model: MappedFeatures) -> float:
    """The longer side of what holds all points of a panel."""
    sides = zip(*model.clean, *model.stamped, strict=True)
    return max(max(values) - min(values) for values in sides)


def _panel(
    model: MappedFeatures, found: FeatureMap, called: Sequence[str], hues: dict[int, int], extent: float, paired: bool
) -> Panel:  # fmt: skip
    middle = [(max(values) + min(values)) / 2 for values in zip(*model.clean, *model.stamped, strict=True)]
    scale = (SIDE - 2 * MARGIN) / extent if extent > 0 else 0.0

    def marks(points: Sequence[Sequence[float]], how: str) -> list[Mark]:
        return [
            Mark(
                round(SIDE / 2 + scale * (x - middle[0]), 1),
                round(SIDE / 2 - scale * (y - middle[1]), 1),
                hues.get(group),
                group == found.target,
                f"{name}, {how}",
            )
            for (x, y), group, name in zip(points, found.groups, called, strict=True)
        ]

    side = {"suspect": "Before", "cleansed": "After"}.get(model.model, "")
    explained = wording.percent(min(1.0, max(0.0, model.explained)), 0)
    caption = f"two axes of clean features, {explained} % of their variance"
    given, stamped = spread(model.clean), spread(model.stamped)
    if given > 0:
        caption = f"stamped images lie {stamped / given:.2f} times as far apart as clean ones; {caption}"
    return Panel(
        side if paired else "", caption, marks(model.clean, "as given"), marks(model.stamped, "stamped")
    )


def spread(points: Sequence[Sequence[float]]) -> float:
    """Returns the root mean square distance of `points` from their mean."""
    means = [sum(values) / len(points) for values in zip(*points, strict=True)]
    return math.sqrt(sum((x - means[0]) ** 2 + (y - means[1]) ** 2 for x, y in points) / len(points))
