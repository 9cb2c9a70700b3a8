"""Pages as Markdown, for a README, a merge request or a wiki."""

from __future__ import annotations

from collections.abc import Sequence

from bdclean.report.document import Page, Table
from bdclean.report.wording import markdown as escaped


def render(pages: Sequence[Page], level: int = 2) -> str:
    """Returns the pages one after another, each under a heading of `level`; every string of the record is escaped."""
    return "\n".join(line for page in pages for line in _lines(page, "#" * level))


def _lines(page: Page, marks: str) -> list[str]:
    lines = [f"{marks} {escaped(page.title)}", ""]
    if page.verdict:
        lines += [f"**{escaped(page.verdict)}**: {escaped(page.sentence)}", ""]
    lines += [f"- {escaped(name)}: {escaped(value)}" for name, value in page.facts]
    for table in page.tables:
        lines += _table(table, marks)
    for title, items in page.lists:
        lines += ["", f"{marks}# {escaped(title)}", "", *(f"- {escaped(item)}" for item in items)]
    return [*lines, "", *(f"{escaped(line)}" for line in page.closing), ""]


def _table(table: Table, marks: str) -> list[str]:
    lines = ["", f"{marks}# {escaped(table.title)}", "", _row(table.columns), _rule(len(table.columns))]
    lines += [_row(row) for row in table.rows]
    return [*lines, "", escaped(table.note)] if table.note else lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escaped(cell) for cell in cells)} |"


def _rule(columns: int) -> str:
    return f"|{'---|' * columns}"
