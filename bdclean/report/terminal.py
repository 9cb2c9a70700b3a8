"""Pages as tables for a terminal, or as the same text without colours for a file or pipe."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from bdclean.files import text
from bdclean.record.run import BACKDOORED, NO_EVIDENCE
from bdclean.report.document import Page, Table

WIDE = 1000  # columns of what is not a terminal: no line of ours needs to be wrapped there
LONGEST_LEAD = 48  # columns of a grid's first cell: a longer SPEC is broken
SENTENCES = ("reason", "why not")
"""Columns that hold sentences, which are broken to any width,"""
LEAST_SENTENCE = 48  # from this on
WIDEST_ROW = (
    100  # columns to the outcome of a row on two lines: farther away it would not be read as the row's
)


def render(
    pages: Sequence[Page], *, width: int | None = None, colours: bool = False, everything: bool = False
) -> str:
    """Returns the pages as text of at most `width` columns; with `colours` it holds ANSI codes."""
    file = io.StringIO()
    console = Console(
        file=file,
        width=width or WIDE,
        force_terminal=colours,
        color_system="standard" if colours else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    for number, page in enumerate(pages):
        if number:
            console.print()
        _show(console, page, everything)
    lines = file.getvalue().split("\n")
    return "\n".join(line if colours else line.rstrip() for line in lines)


def _show(console: Console, page: Page, everything: bool) -> None:
    _say(console, page.title, "bold")
    if page.verdict:
        _say_verdict(console, page.verdict, page.sentence)
    facts = page.facts if everything else page.summary
    if facts:
        console.print()
        longest = max(len(text.plain(name)) for name, _ in facts)
        for name, value in facts:
            lines = wrapped(text.plain(value), console.width - longest - 2)
            for place, line in enumerate(lines):
                head = text.plain(name) if not place else ""
                console.print(Text.assemble((head.ljust(longest + 2), "dim"), line), soft_wrap=True)
    for table in page.tables:
        if everything or not table.whole_calm:
            _show_table(console, table, everything)
    for title, items in page.lists:
        console.print()
        _say(console, title, "bold")
        for item in items:
            _say(console, item, indent=2)
    console.print()
    for line in page.closing:
        _say(console, line)
    if page.ending:
        console.print()
        _say_verdict(console, page.verdict, page.ending)
    if page.command:
        console.print(Text(_shell_lines(f"next: {page.command}", console.width)), soft_wrap=True)


def _say(console: Console, words: str, style: str = "", indent: int = 0) -> None:
    """Prints a stranger's or our own words on as many lines as they need."""
    for line in wrapped(text.plain(words), console.width - indent):
        console.print(Text(" " * indent + line, style=style), soft_wrap=True)


def _say_verdict(console: Console, verdict: str, sentence: str) -> None:
    style = {BACKDOORED: "bold red", NO_EVIDENCE: "bold"}.get(verdict, "bold yellow")
    words = Text("\n".join(wrapped(text.plain(f"{verdict}: {sentence}"), console.width)))
    words.stylize(style, 0, len(text.plain(verdict)))
    console.print(words, soft_wrap=True)


def wrapped(words: str, width: int) -> list[str]:
    """Returns `words` on lines of at most `width` columns, broken at spaces, and behind the commas of a SPEC."""
    lines, line = [], ""
    width = max(width, 1)  # a terminal may be narrower than an indent
    for part in re.split(r"(?<=,)(?=[^\s\d])|(?<= )(?=[^\s%])", words):
        if line and cell_len(line) + cell_len(part.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += part
        while cell_len(line.rstrip()) > width:  # a path without any place to break
            fitting = _fitting(line, width)
            lines.append(line[:fitting])
            line = line[fitting:]
    return [*lines, line.rstrip()]


def _fitting(line: str, width: int) -> int:
    """How many characters of `line` have room in `width` columns, one at least."""
    return next((k for k in range(len(line), 1, -1) if cell_len(line[:k]) <= width), 1)


def _shell_lines(command: str, width: int) -> str:
    """Returns a command on lines that a shell joins again."""
    if len(command) <= width:
        return command
    parts = re.split(r" (?=--)", command)
    return " \\\n    ".join(parts)


def _show_table(console: Console, table: Table, everything: bool) -> None:
    kept = [k for k in range(len(table.rows)) if everything or not table.calm or not table.calm[k]]
    left_out = len(table.rows) - len(kept)
    console.print()
    _say(console, table.title, "bold")
    passing = table.lead == "trigger"
    if not kept:
        all_calm = (
            f"all {left_out} pass (-v lists them)"
            if passing
            else f"none stands out (-v lists all {left_out})"
        )
        _say(console, all_calm, "dim")
        return
    brief = [table.brief[k] for k in kept] if table.brief else []
    shown = replace(table, rows=[table.rows[k] for k in kept], brief=brief)
    if table.lead and _room(shown) > console.width:
        _stack(console, shown, everything)
    else:
        _grid(console, shown)
    if left_out:
        calm = "pass" if passing else "do not stand out"
        _say(console, f"and {left_out} that {calm} (-v lists them)", "dim")
    if table.note:
        _say(console, table.note, "dim")


def _room(table: Table) -> int:
    """How many columns of a terminal a grid takes, if the sentences in it are broken to LEAST_SENTENCE."""
    lines = [table.columns, *table.rows]
    widths = [max(cell_len(text.plain(line[k])) for line in lines) for k in range(len(table.columns))]
    most = {
        0: LONGEST_LEAD,
        **{k: LEAST_SENTENCE for k, name in enumerate(table.columns) if name in SENTENCES},
    }
    return sum(min(width, most.get(k, width)) + 3 for k, width in enumerate(widths))


def _grid(console: Console, table: Table) -> None:
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for column in table.columns:
        grid.add_column(Text(text.plain(column)), overflow="fold")
    for row in table.rows:
        lead = "\n".join(wrapped(text.plain(row[0]), LONGEST_LEAD))
        cells = [Text(lead), *(Text(text.plain(cell)) for cell in row[1:])]
        if row[-1].endswith("fails"):
            cells[-1].stylize("red")
        grid.add_row(*cells)
    console.print(grid)


def _stack(console: Console, table: Table, everything: bool) -> None:
    """Prints each row on two lines: its first cell with the outcome, and its brief line; then its sentences.

    With `everything` all cells stand in place of the brief line.
    """
    span = min(console.width, WIDEST_ROW)
    for row, brief in zip(table.rows, table.brief, strict=True):
        cells = dict(zip(table.columns, map(text.plain, row), strict=True))
        end = cells.get(table.outcome, "")
        first = wrapped(cells[table.lead], span - cell_len(end) - 2)
        gap = " " * (span - cell_len(first[-1]) - cell_len(end))
        line = Text("\n".join(first) + gap + end)
        if end.endswith("fails"):
            line.stylize("red", len(line) - len(end))
        console.print(line, soft_wrap=True)
        shown = (table.lead, table.outcome, *SENTENCES)
        others = [
            f"{name} {cell}" for name, cell in cells.items() if name not in shown and cell not in ("", "-")
        ]
        _say(console, ", ".join(others) if everything else brief, "dim", indent=4)
        for name in SENTENCES:
            if cells.get(name):
                _say(console, cells[name], indent=4)
