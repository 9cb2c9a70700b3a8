"""Pages as tables for a terminal, or as the same text without colours for a file or pipe."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from bdclean.files import text
from bdclean.record.run import BACKDOORED, NO_EVIDENCE
from bdclean.report.document import Page, Table

WIDE = 1000  # columns of what is not a terminal: no line of ours needs to be wrapped there
NARROW = 130  # under this width, columns of detail are left out


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
    console.print(Text(text.plain(page.title), style="bold"))
    if page.verdict:
        style = (
            "bold red"
            if page.verdict == BACKDOORED
            else "bold"
            if page.verdict == NO_EVIDENCE
            else "bold yellow"
        )
        console.print(Text.assemble((text.plain(page.verdict), style), ": ", text.plain(page.sentence)))
    facts = page.facts if everything else page.summary
    if facts:
        console.print()
        grid = Grid.grid(padding=(0, 2))
        for name, value in facts:
            grid.add_row(Text(text.plain(name), style="dim"), Text(text.plain(value), overflow="fold"))
        console.print(grid)
    for table in page.tables:
        if everything or not table.whole_calm:
            _show_table(console, table, everything)
    for title, items in page.lists:
        console.print()
        console.print(Text(text.plain(title), style="bold"))
        for item in items:
            console.print(Padding(Text(text.plain(item), overflow="fold"), (0, 0, 0, 2), expand=False))
    console.print()
    for line in page.closing:
        console.print(Text(text.plain(line)))


def _show_table(console: Console, table: Table, everything: bool) -> None:
    if console.width < NARROW and not everything:
        table = _without_details(table)
    rows = table.rows
    if not everything and table.calm:
        rows = [row for row, calm in zip(table.rows, table.calm, strict=True) if not calm]
    left_out = len(table.rows) - len(rows)
    console.print()
    console.print(Text(text.plain(table.title), style="bold"))
    if not rows:
        console.print(Text(f"none stands out; -v lists all {left_out}", style="dim"))
        return
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for column in table.columns:
        grid.add_column(Text(text.plain(column)), overflow="fold")
    for row in rows:
        cells = [Text(text.plain(cell)) for cell in row]
        if row[-1].endswith("fails"):
            cells[-1].stylize("red")
        grid.add_row(*cells)
    console.print(grid)
    if left_out:
        console.print(Text(f"and {left_out} that do not stand out (-v lists them)", style="dim"))
    if table.note:
        console.print(Text(text.plain(table.note), style="dim"))


def _without_details(table: Table) -> Table:
    keep = [i for i, column in enumerate(table.columns) if column not in table.details]
    rows = [[row[i] for i in keep] for row in table.rows]
    return replace(table, columns=[table.columns[i] for i in keep], rows=rows)
