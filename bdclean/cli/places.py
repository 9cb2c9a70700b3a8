"""Where records go, and whether a place can be written to, before any work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bdclean.cli.defects import leave
from bdclean.errors import Refused, UsageError
from bdclean.files import writing
from bdclean.files.text import read_text
from bdclean.record.parsing import parse_records
from bdclean.record.run import FAILED, RAN, RunRecord, record_path


@dataclass
class Records:
    """Where the records of a command go: one file, a folder, or nowhere."""

    file: Path | None = None
    folder: Path | None = None
    keep: bool = False  # leave the record of a run that ended where a new one has not
    spent: tuple[
        Path, ...
    ] = ()  # files that nobody needs any more once a run has ended and its record is written
    taken: set[Path] = field(default_factory=set)

    @staticmethod
    def at(
        place: Path | None, models: Sequence[Path], keep: bool = False, spent: tuple[Path, ...] = ()
    ) -> Records:
        """Returns the place named by `--record`, checked before any work; several models need a folder.

        The folder itself may be missing: it is made for the first record.
        """
        if place is None:
            return Records()
        if os.path.isdir(place) or (
            not os.path.exists(place) and (not place.suffix or (len(models) > 1 and place.suffix != ".json"))
        ):
            check_place(place / "record.json" if os.path.isdir(place) else place, models)
            return Records(folder=place, spent=spent)
        if len(models) > 1:
            raise UsageError(
                f"--record {place} is a file, and there are {len(models)} models: name a folder."
            )
        check_record(place, models)
        return Records(file=place, keep=keep, spent=spent)

    def write(self, record: RunRecord, model: str) -> None:
        """Writes one run's record; raises Refused where it cannot be written."""
        place = self.file
        if self.folder is not None:
            stem = Path(model).name.removesuffix(".safetensors")
            place = first = record_path(self.folder, stem, record.checkpoint.sha256)
            while place in self.taken:  # two models of the same name and content
                place = first.with_stem(f"{first.stem}-{len(self.taken) + 1}")
            self.taken.add(place)
            writing.sweep(place)
        if place is not None and (record.outcome == RAN or not self.keep or not has_run(place)):
            record.write(place)
        elif record.outcome == FAILED:
            leave(record)
        if record.outcome == RAN:
            for path in self.spent:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


# --- places to write to --------------------------------------------------------------------------------------


def check_place(path: Path, inputs: Sequence[Path]) -> None:
    """Refuses a place to write to before any work: an input of the run, a folder, or not to be written.

    Deletes what killed runs left of it half-written.
    """
    for other in inputs:
        if os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            raise Refused(f"{path} is an input of this run: name another file to write.")
    writing.check(path)
    writing.sweep(path)


def check_record(path: Path, inputs: Sequence[Path]) -> None:
    """Refuses what `check_place` does, and to replace a file that is no record of bdclean's."""
    check_place(path, inputs)
    if os.path.exists(path) and not is_record(path):
        raise Refused(f"{path} exists and is no record of bdclean's: name another file with --record.")


def is_record(path: Path) -> bool:
    """Whether a file at `path` is a record, which a newer one may replace."""
    return records_in(path) is not None


def has_run(path: Path) -> bool:
    return any(record.outcome == RAN for record in records_in(path) or ())


def records_in(path: Path) -> list[RunRecord] | None:
    try:
        return parse_records(read_text(str(path)), str(path))
    except Refused:
        return None
