"""Where records go, and whether a place can be written to, before any work."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bdclean.cli.console import warn
from bdclean.cli.defects import leave
from bdclean.errors import Refused, UsageError
from bdclean.files import strictjson, writing
from bdclean.files.text import read_text
from bdclean.record.parsing import parse_records, read_records
from bdclean.record.run import FAILED, RAN, RunRecord, record_path
from bdclean.runs.places import model_stem

CARDS = (".md", ".markdown")
"""What names of model cards end in."""


@dataclass(frozen=True)
class Records:
    """Where the records of a command go: one file, a folder that keeps every run, or nowhere.

    `spent`: files that nobody needs any more once a run has ended and its record is written.
    """

    file: Path | None = None
    folder: Path | None = None
    spent: tuple[Path, ...] = ()

    @staticmethod
    def at(place: Path | None, models: Sequence[Path], spent: tuple[Path, ...] = ()) -> Records:
        """Returns the place named by `--record`, checked before any work; several models need a folder.

        The folder itself may be missing: it is made for the first record.
        """
        if place is None:
            return Records()
        there = os.path.exists(place)  # first: another run may make the folder at any moment
        if os.path.isdir(place) or (
            not there and (not place.suffix or (len(models) > 1 and place.suffix != ".json"))
        ):
            try:
                check_place(place / "record.json" if os.path.isdir(place) else place, models)
            except Refused:
                if not os.path.isdir(place):
                    raise
                check_place(place / "record.json", models)
            return Records(folder=place, spent=spent)
        if len(models) > 1:
            raise UsageError(
                f"--record {place} is a file, and there are {len(models)} models: name a folder."
            )
        check_record(place, models)
        return Records(file=place, spent=spent)

    def write(self, record: RunRecord, model: str) -> None:
        """Writes one run's record; raises Refused where it cannot be written."""
        if self.folder is not None:
            place = record_path(self.folder, model_stem(Path(model)), record.checkpoint.sha256)
            writing.sweep(place)
            record.add(place)
        elif self.file is not None:
            _write_to_file(record, self.file)
        elif record.outcome == FAILED:
            leave(record)
        if record.outcome == RAN:
            for path in self.spent:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


def _write_to_file(record: RunRecord, place: Path) -> None:
    """Writes the record to `place`; that of a run that ended, and is not this one repeated, is kept beside it.

    A run that did not end goes beside one that did, and takes the place of any other.
    """
    earlier = [] if writing.is_special(place) else records_in(place) or []
    if not any(other.outcome == RAN for other in earlier):
        record.write(place)
    elif record.outcome != RAN:
        warn(f"{place} is of a run that ended and stays: the record of this one is {record.add(place)}.")
    else:
        if not all(_repeats(record, other) for other in earlier):
            text = read_text(str(place)).encode("utf-8", errors="backslashreplace")
            kept = writing.create(place, lambda stream: stream.write(text))
            warn(f"{place} was the record of another run, which is {kept} now.")
        record.write(place)


def _repeats(one: RunRecord, other: RunRecord) -> bool:
    """Whether two records are of the same command line, but for where bdclean lies, on the same bytes and images."""
    return _asked(one) == _asked(other)


def _asked(record: RunRecord) -> tuple[str, list[str], str | None, str | None]:
    """What a run was asked, and of which bytes: its command, arguments, model and images."""
    images = None if record.data is None else record.data.digest
    return record.command, record.argv[1:], record.checkpoint.sha256, images


# --- records to show again -----------------------------------------------------------------------------------


def gather(places: Sequence[str]) -> tuple[list[RunRecord], list[Refused], list[Path]]:
    """Returns the records at `places` (files, folders, `-`), why others cannot be read, and the files looked at.

    Of a folder those are its files that end in .json or .jsonl; JSON of something else is passed over there.
    """
    records: list[RunRecord] = []
    torn: list[Refused] = []
    files: list[Path] = []
    for place in places:
        for path in _files_of(place) if os.path.isdir(place) else [place]:
            try:
                some, others = read_records(read_text(path), path)
            except Refused as error:
                some, others = [], [error]
            if path != place and not some and _of_something_else(path):
                continue
            records += some
            torn += others
            files += [] if path == "-" else [Path(path)]
    return records, torn, files


def _files_of(folder: str) -> list[str]:
    """Returns the paths of a folder's records; raises Refused where it has none or may not be read."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith((".json", ".jsonl")))
    except OSError as error:
        raise Refused(f"{folder} cannot be read: {writing.reason(error)}.") from None
    paths = [os.path.join(folder, name) for name in names]
    if not any(os.path.isfile(path) for path in paths):
        raise Refused(f"{folder} holds no records: no file in it ends in .json or .jsonl.")
    return [path for path in paths if os.path.isfile(path)]


def _of_something_else(path: str) -> bool:
    """Whether a file is whole JSON without a schema of bdclean's: a model's config, a resume state."""
    try:
        document = strictjson.parse(read_text(path), halves=True)
    except (strictjson.NotJson, Refused):
        return False
    schema = document.get("schema") if isinstance(document, dict) else None
    return not (isinstance(schema, str) and schema.startswith("bdclean."))


# --- places to write to --------------------------------------------------------------------------------------


def report_place(out: Path | None) -> Path | None:
    """Returns where a report goes: None for standard output, which `-` names as well."""
    return None if out == Path("-") else out


def record_place(place: Path | None) -> Path | None:
    """Returns where `--record` says that records go; raises UsageError on `-`."""
    if place == Path("-"):
        raise UsageError("--record - is no file or folder: --format json prints the record.")
    return place


def check_place(path: Path, inputs: Sequence[Path]) -> None:
    """Refuses a place to write to before any work: an input of the run, a folder, or not to be written.

    Deletes what killed runs left of it half-written.
    """
    for other in inputs:
        if os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            raise Refused(f"{path} is an input of this run: name another file to write.")
    writing.check(path)
    writing.sweep(path)


def check_card(path: Path, out: Path | None, inputs: Sequence[Path]) -> None:
    """Refuses what `check_place` does, and whatever no model card is: to write into it would spoil it."""
    if path.suffix.lower() not in CARDS:
        raise UsageError(
            f"--card {path}: a model card is Markdown: name a file that ends in {' or '.join(CARDS)}."
        )
    if out is not None and os.path.realpath(out) == os.path.realpath(path):
        raise UsageError(f"--card and --out are the same file, {path}: name two.")
    check_place(path, inputs)
    if writing.is_special(path):
        raise Refused(f"{path} is no regular file: name a model card.")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise Refused(f"{path} cannot be written: it is protected from writing.")


def update_card(path: Path, records: Sequence[RunRecord]) -> None:
    """Makes the audit section of a model card anew; one that is up to date is not touched, a missing one is made."""
    from bdclean.report.card import updated

    try:
        card = path.read_bytes() if os.path.exists(path) else b""
    except OSError as error:
        raise Refused(f"{path} cannot be read: {writing.reason(error)}.") from None
    text = updated(card, records, str(path))

    def write(stream: IO[bytes]) -> None:
        if os.path.exists(path):
            shutil.copymode(path, stream.name)
        stream.write(text)

    if text != card:
        writing.replace(path, write)


def check_record(path: Path, inputs: Sequence[Path]) -> None:
    """Refuses what `check_place` does, and to replace a file that is no record of bdclean's."""
    check_place(path, inputs)
    if os.path.exists(path) and not is_record(path):
        raise Refused(f"{path} exists and is no record of bdclean's: name another file with --record.")


def is_record(path: Path) -> bool:
    """Whether a file at `path` is a record, which a newer one may replace."""
    return records_in(path) is not None


def records_in(path: Path) -> list[RunRecord] | None:
    try:
        return parse_records(read_text(str(path)), str(path))
    except Refused:
        return None
