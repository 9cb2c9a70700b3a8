"""What the benches measured of a recipe, for `bdclean ls recipe NAME`: rows of the tables that they wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

MADE = re.compile(r"<!-- made by the bench: begin -->(.*?)<!-- made by the bench: end -->", re.DOTALL)
PACKAGE = Path(__file__).parents[1]
BEFORE = ("none", "(scan)")  # what tables call the network as it was
MOST_VICTIMS = 4  # of one table


def measured(recipe: str) -> list[tuple[str, list[list[str]]]]:
    """Returns the name of each table with rows of `recipe`, with its commit, its head, and rows of the first victims.

    A victim has its row as it was before, where the table has one. A wheel holds the tables beside the code, a checkout
    in sample_models. Rows of a recipe with settings are in the table alone.
    """
    folder = next(
        (f for f in (PACKAGE / "tables", PACKAGE.parent / "sample_models" / "tables") if f.is_dir()), None
    )
    found = []
    for file in sorted(folder.glob("*.md")) if folder is not None else ():
        for part in MADE.findall(file.read_text(encoding="utf-8")):
            commit = re.search(r"^\* Commit: (.*)$", part, re.MULTILINE)
            rows: list[list[str]] = [*_cells(part)]
            head = rows.pop(0) if rows else []
            if "recipe" not in head or not any(name.startswith("attack success") for name in head):
                continue
            place = head.index("recipe")
            rows = [row for row in rows if len(row) == len(head)]
            victims = [row[0] for row in rows if row[place] == recipe][:MOST_VICTIMS]
            own = [row for row in rows if row[0] in victims and row[place] in (recipe, *BEFORE)]
            if own:
                said = f"{file.name}, commit {commit[1]}" if commit else file.name
                found.append((said, [head, *own]))
    return found


def _cells(part: str) -> Iterator[list[str]]:
    """The rows of a Markdown table, the head first."""
    for line in part.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip().strip("|").split("|")]
