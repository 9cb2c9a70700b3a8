"""Records of strangers, read with care."""

from __future__ import annotations

from bdclean.errors import Refused
from bdclean.files import strictjson
from bdclean.record.run import REPORT_SCHEMA, RunRecord
from bdclean.record.typed import kind_of

MOST_VALUES = 4_000_000  # in one document: a table of confusions has a million


def parse_records(text: str, source: str) -> list[RunRecord]:
    """Returns the records in `text`: one `run/1`, one `report/1`, or JSON lines of either.

    Raises Refused with `source`, where the text is from, and what does not fit.
    """
    if not text.strip():
        raise Refused(f"{source} is empty: expected a record.")
    try:
        documents = [strictjson.parse(text, MOST_VALUES, halves=True)]
    except strictjson.NotJson as whole:
        documents = []
        lines = text.split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                documents.append(strictjson.parse(line, MOST_VALUES, halves=True))
            except strictjson.NotJson as error:
                # Of a document over many lines, the first line alone says nothing.
                why = error if documents else whole
                raise Refused(f"{source} is not a record of bdclean's (line {number}): {why}.") from None
    records: list[RunRecord] = []
    for document in documents:
        runs = [document]
        if isinstance(document, dict) and document.get("schema") == REPORT_SCHEMA:
            runs = document.get("runs") or []
            if not isinstance(runs, list):
                raise Refused(f"{source}: runs is {kind_of(runs)}, expected a list.")
        try:
            records.extend(RunRecord.from_json(run) for run in runs)
        except Refused as error:
            raise Refused(f"{source}: {error}") from None
    return records
