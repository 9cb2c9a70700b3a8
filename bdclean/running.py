"""One run, kept from crashing: whatever is raised becomes the record's problem, a sentence and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from bdclean import gate, writing
from bdclean.arguments import read_text
from bdclean.catalogue import versions
from bdclean.defects import leave, problem_of, trace
from bdclean.errors import Refused, UsageError
from bdclean.gate import Gate
from bdclean.output import Shown, warn
from bdclean.record import (
    FAILED,
    NOT_ASSESSED,
    RAN,
    RunRecord,
    parse_records,
    record_path,
)
from bdclean.report.progress import Progress


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
        if place is not None and (record.outcome == RAN or not self.keep or not _ended(place)):
            record.write(place)
        elif record.outcome == FAILED:
            leave(record)
        if record.outcome == RAN:
            for path in self.spent:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


def run_all(
    command: str,
    models: Sequence[str],
    work: Callable[[str, Progress], RunRecord],
    judge: Gate,
    shown: Shown,
    records: Records,
    quiet: bool,
) -> int:
    """Runs every model, one after another, and returns the exit code of all; one that fails stops no other."""
    found: list[RunRecord] = []
    codes: list[int] = []
    at_once = shown.form == "jsonl" and shown.out is None
    for number, model in enumerate(models, 1):
        several = len(models) > 1
        with Progress(quiet) as progress:
            progress.begin(f"{model} ({number} of {len(models)})" if several else "")
            record = guarded(command, model, partial(work, model, progress))
        found.append(record)
        code = judge.exit_code(record)
        codes.append(code)
        prefix = f"{model}: " if several else ""
        for line in [record.problem.message] if record.problem else sum(judge.check(record), []):
            warn(f"{prefix}{line}")
        try:
            records.write(record, model)
        except Refused as error:
            warn(str(error))
            codes.append(error.exit_code)
        if at_once:
            codes += _show(shown, [record])
        # Ctrl-C means all of them; wrong usage would be wrong for the next model, too.
        if code >= 128 or (code == 2 and number == 1):
            break
    lone = len(found) == 1 and found[0].problem is not None and shown.form in ("table", "md")
    if not at_once and (shown.out is not None or not lone):
        codes += _show(shown, found)
    return gate.exit_code(codes)


def _show(shown: Shown, records: Sequence[RunRecord]) -> list[int]:
    """Shows `records`; a place that cannot be written adds its exit code, and hides no verdict's."""
    try:
        shown.show(records)
    except Refused as error:
        warn(str(error))
        return [error.exit_code]
    return []


def guarded(command: str, model: str, work: Callable[[], RunRecord]) -> RunRecord:
    """Returns the record of `work`, also when it raises: refused, failed or interrupted, with what was known."""
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    try:
        record = work()
    except BaseException as error:  # a crash must never exit 1, which reads as a verdict
        known = getattr(error, "record", None)
        record = known if isinstance(known, RunRecord) else RunRecord(command)
        record.checkpoint.path = record.checkpoint.path or model
        record.verdict = NOT_ASSESSED
        record.outcome, record.problem = problem_of(error)
        if record.outcome == FAILED:
            trace(error)
    record.started = record.started or started
    record.seconds = record.seconds if record.seconds is not None else round(time.monotonic() - clock, 3)
    record.argv = record.argv or list(sys.argv)
    record.versions = {**versions(), **record.versions}
    return record


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
    return _records_in(path) is not None


def _ended(path: Path) -> bool:
    return any(record.outcome == RAN for record in _records_in(path) or ())


def _records_in(path: Path) -> list[RunRecord] | None:
    try:
        return parse_records(read_text(str(path)), str(path))
    except Refused:
        return None
