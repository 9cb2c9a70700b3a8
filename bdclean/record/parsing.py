"""Records of strangers, read with care."""

from __future__ import annotations

from typing import Any

from bdclean.errors import Refused
from bdclean.files import strictjson
from bdclean.record.run import REPORT_SCHEMA, RunRecord
from bdclean.record.typed import kind_of

MOST_VALUES = 4_000_000  # in one document: a table of confusions has a million


def parse_records(text: str, source: str) -> list[RunRecord]:
    """Returns the records in `text`: one `run/1`, one `report/1`, or JSON lines of either.

    Raises Refused with `source`, where the text is from, and what does not fit.
    """
    records, torn = read_records(text, source)
    if torn:
        raise torn[0]
    return records


def read_records(text: str, source: str) -> tuple[list[RunRecord], list[Refused]]:
    """Returns the records in `text` that can be read, and why the others cannot: what `parse_records` would raise."""
    if not text.strip():
        return [], [Refused(f"{source} is empty: expected a record.")]
    documents, torn = _documents(text, source)
    records: list[RunRecord] = []
    for document in documents:
        runs = [document]
        if isinstance(document, dict) and document.get("schema") == REPORT_SCHEMA:
            runs = document.get("runs") or []
            if not isinstance(runs, list):
                torn.append(Refused(f"{source}: runs is {kind_of(runs)}, expected a list."))
                continue
        for run in runs:
            try:
                records.append(RunRecord.from_json(run))
            except Refused as error:
                torn.append(Refused(f"{source}: {error}"))
    return records, torn


def _documents(text: str, source: str) -> tuple[list[Any], list[Refused]]:
    """Returns the text as one document, else one of each line that is one, and what the other lines are."""
    try:
        return [strictjson.parse(text, MOST_VALUES, halves=True)], []
    except strictjson.NotJson as error:
        whole = error
    documents: list[Any] = []
    torn: list[Refused] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            documents.append(strictjson.parse(line, MOST_VALUES, halves=True))
        except strictjson.NotJson as error:
            torn.append(Refused(f"{source} is not a record of bdclean's (line {number}): {error}."))
        if not documents:  # of a document over many lines, the lines say nothing
            return [], [Refused(f"{source} is not a record of bdclean's (line {number}): {whole}.")]
    return documents, torn
