"""Plots as inline SVG by matplotlib, imported when called. They hold numbers only: no text of a stranger's."""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

MOST_POINTS = 1000
MOST_SERIES = 6
LARGEST = 1e12  # of a value: matplotlib's ticks break down far beyond it

# Matplotlib knows no CSS variables: it draws in stand-in colours, which become the page's own, light or dark.
LINE, AXIS, GRID = "#010101", "#020202", "#030303"
COLOURS = {LINE: "var(--accent)", AXIS: "var(--muted)", GRID: "var(--rule)"}


def curves(rows: Sequence[Any], name: str = "run") -> list[tuple[str, Markup, float, float]]:
    """Returns (name, SVG, first value, last value) of each series of a training curve; ids start with `name`.

    A series is a key of the rows, which come from a file: what is not a finite number is left out.
    """
    rows = [row for row in rows if isinstance(row, dict)]
    names = dict.fromkeys(key for row in rows for key in row if isinstance(key, str))
    found: list[tuple[str, Markup, float, float]] = []
    for series in names:
        if series == "step" or len(found) == MOST_SERIES:
            continue
        points = [(_number(row.get("step")), _number(row.get(series))) for row in rows]
        ys = [y for _, y in points if y is not None]
        if len(ys) < 2:
            continue
        xs = [x for x, y in points if y is not None and x is not None]
        if len(xs) != len(ys) or any(b < a for a, b in zip(xs, xs[1:], strict=False)):
            xs = [float(k) for k in range(1, len(ys) + 1)]  # several stages, each counting its own steps
        every = math.ceil(len(ys) / MOST_POINTS)
        svg = _line(xs[::every], ys[::every], f"{name}-curve{len(found)}")
        found.append((series, svg, ys[0], ys[-1]))
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST:
        return float(value)
    return None


def _line(xs: Sequence[float], ys: Sequence[float], name: str) -> Markup:
    # It tells of its caches on standard error, which is no reader's business.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the reader's own matplotlibrc says: the same bytes everywhere
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bdclean", "font.size": 10})
        figure = Figure(figsize=(4.5, 2.1), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.plot(xs, ys, color=LINE, linewidth=1.6, solid_joinstyle="round")
        axes.plot(xs[-1:], ys[-1:], color=LINE, marker="o", markersize=4)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(colors=AXIS, length=0, labelsize=10)
        axes.margins(x=0.02)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(AXIS)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), name)


def _inline(svg: str, name: str) -> Markup:
    """Returns matplotlib's SVG for a page that holds others: no metadata, no ids but its own, the page's colours."""
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", svg))
    for parent in list(root.iter()):
        for child in list(parent):
            # its style sheet would rule the whole page
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            key = key.rpartition("}")[2]
            if key == "id":
                if value not in used:
                    continue
                value = f"{name}-{value}"
            value = re.sub(r"url\(#", f"url(#{name}-", value)
            if key == "href":
                value = f"#{name}-{value.removeprefix('#')}"
            for stand_in, colour in COLOURS.items():
                value = value.replace(stand_in, colour)
            value = re.sub(r"font: ([\d.]+px) [^;]+", r"font-size: \1; font-family: var(--sans)", value)
            value = re.sub(r"font-family: '[^;]+", "font-family: var(--sans)", value)
            if not re.fullmatch(r"rotate\(-?0 .*", value):
                element.attrib[key] = value
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"class": "plot", "aria-hidden": "true"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))
