"""What is raised -> the outcome of a run. Needs nothing but the record, so that it works when much else does not."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from bdclean.errors import BdcleanError, Interrupted, out_of_memory
from bdclean.files.text import plain
from bdclean.record.run import FAILED, INTERRUPTED, REFUSED, Problem, RunRecord

DEFECT = 70
NO_TEMPORARY = "No usable temporary directory"  # Python's words, when torch is imported at the latest


def problem_of(error: BaseException) -> tuple[str, Problem]:
    """Returns the outcome and the problem that an exception stands for; what nobody foresaw is a defect of ours."""
    kind = type(error).__name__
    if isinstance(error, Interrupted):
        return INTERRUPTED, Problem(str(error), error.exit_code, kind)
    if isinstance(error, BdcleanError):
        return REFUSED, Problem(str(error), error.exit_code, kind)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, Problem("interrupted.", 130, kind)
    if out_of_memory(error):
        message = "out of memory: give a smaller --batch-size or --limit, or another --device."
        return REFUSED, Problem(message, 3, kind)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return REFUSED, Problem("the disk is full: make room and run again.", 3, kind)
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"{error.filename} cannot be used" if error.filename else "a file cannot be used"
        return REFUSED, Problem(f"{what}: {(error.strerror or kind).lower()}.", 3, kind)
    if isinstance(error, FileNotFoundError) and NO_TEMPORARY in str(error):
        return REFUSED, Problem("there is no temporary folder to write to: set TMPDIR to one.", 3, kind)
    digest = digest_of(error)
    message = f"this is a defect in bdclean: {kind}: {_first_line(error)} (traceback {digest})."
    return FAILED, Problem(message, DEFECT, kind, digest)


def digest_of(error: BaseException) -> str:
    """Returns 16 hex digits that are the same for the same defect on any machine: files, functions, lines, kind."""
    places = [
        f"{Path(frame.filename).name}:{frame.name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    return hashlib.sha256("\n".join([*places, type(error).__name__]).encode()).hexdigest()[:16]


def trace(error: BaseException) -> None:
    """Writes the traceback to standard error, if anybody still reads it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            # Messages of exceptions hold strangers' names.
            lines = "".join(traceback.format_exception(error)).rstrip().split("\n")
            print("\n".join(map(plain, lines)), file=sys.stderr)


def leave_record(argv: Sequence[str], error: BaseException) -> None:
    """Writes the record of a run that could not start, where `--record` says, else in the current folder."""
    digest = digest_of(error)
    message = f"bdclean cannot be started: {type(error).__name__}: {_first_line(error)} (traceback {digest})."
    command = argv[1] if len(argv) > 1 else ""
    problem = Problem(message, DEFECT, type(error).__name__, digest)
    record = RunRecord(command, outcome=FAILED, argv=list(argv), problem=problem)
    place = Path(_value(argv, "--record") or ".")
    folder = place.is_dir() or not place.suffix
    leave(record, place / f"bdclean-defect-{digest}.json" if folder else place)


def leave(record: RunRecord, place: Path | None = None) -> None:
    """Writes the record of a defect, by default into the current folder, and says where.

    It takes the place of no file but one that is named after the same defect.
    """
    digest = record.problem.digest if record.problem else None
    own = f"bdclean-defect-{digest}.json"
    place = place or Path(own)
    if place.name == own:
        record.write(place)
    else:
        place = record.add(place)
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"bdclean: the record of this defect is {plain(place)}", file=sys.stderr)


def _value(argv: Sequence[str], option: str) -> str | None:
    for number, word in enumerate(argv):
        if word == option and number + 1 < len(argv):
            return argv[number + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
