"""Reports: RunRecords -> table, Markdown, HTML page, JSON, JSON lines or SARIF. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bdclean.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from bdclean.record.run import RunRecord

FORMATS = ("table", "json", "jsonl", "md", "html", "sarif")
SUFFIXES = {
    ".html": "html", ".htm": "html", ".md": "md", ".json": "json", ".jsonl": "jsonl", ".sarif": "sarif",
    ".sarif.json": "sarif", ".txt": "table", "": "table",
}  # fmt: skip


def choose_format(name: str | None, out: Path | None = None) -> str:
    """Returns the format called `name`, else the one that `out` ends in, else table; raises UsageError on others."""
    if name is None:
        ending = _ending(out) if out is not None else ""
        if ending not in SUFFIXES:
            known = ", ".join(suffix for suffix in SUFFIXES if suffix)
            raise UsageError(
                f"--out {out}: nothing is written as {ending}: end it in {known}, or give --format."
            )
        return SUFFIXES[ending]
    if name not in FORMATS:
        from bdclean.files.text import closest

        raise UsageError(f"there is no --format {name!r}: {closest(name, FORMATS)}")
    return name


def _ending(path: Path) -> str:
    """The ending of a file's name, which is two where they are a format's own."""
    both = "".join(path.suffixes[-2:]).lower()
    return both if both in SUFFIXES else path.suffix.lower()


def render(
    records: Sequence[RunRecord],
    form: str,
    *,
    width: int | None = None,
    colours: bool = False,
    everything: bool = False,
) -> str:
    """Returns the report of one or several runs, ending in a newline; several, worst first, start with a comparison.

    `everything` also lists the many passing rows that a table leaves out. `colours` allows ANSI codes in tables.
    """
    if form == "json":
        from bdclean.record.run import report_document

        return json.dumps(report_document(list(records)), allow_nan=False, indent=1) + "\n"
    if form == "jsonl":
        return "".join(record.dump() + "\n" for record in records)
    if form == "sarif":
        from bdclean.report import sarif

        return sarif.render(records)
    # Imported here: a JSON report needs none of the layout, and only a page needs a template engine and plots.
    from bdclean.report.ranking import by_severity

    records = by_severity(records)
    if form == "html":
        from bdclean.report.page import html

        return html.render(records)
    from bdclean.report import document

    pages = [document.page(record) for record in records]
    if len(records) > 1:
        pages.insert(0, document.comparison(records))
    if form == "md":
        from bdclean.report import markdown

        return markdown.render(pages).rstrip("\n") + "\n"
    from bdclean.report import terminal

    laid_out = terminal.render(pages, width=width, colours=colours, everything=everything)
    return laid_out.rstrip("\n") + "\n"
