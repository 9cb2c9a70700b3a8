"""Standard output carries the result and nothing else; warnings go to standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bdclean.errors import Refused
from bdclean.files.text import plain
from bdclean.files.writing import write_text

CLOSED = "standard output is closed: there is nowhere to write the result."

if TYPE_CHECKING:
    from bdclean.record.run import RunRecord

RULE = "\u2500"  # what tables draw under their heads
COMMANDS = ("scan", "cleanse", "report", "ls", "doctor")
WIDEST = 10_000  # columns of a terminal: COLUMNS may say any number, and rules are drawn over all of them
LONGEST_LINE = 1200  # characters on standard error: a sentence about a stranger's path or name, not all of it


@dataclass(frozen=True)
class Shown:
    """How results are shown: the format, where to, and how much."""

    form: str
    out: Path | None
    verbose: bool

    def check(self) -> None:
        """Refuses, before any work, to show results on a standard output that is closed."""
        if self.out is None and sys.stdout is None:
            raise Refused(CLOSED)

    def show(self, records: Sequence[RunRecord]) -> None:
        """Prints the report, or writes it to `out` by atomic rename."""
        from bdclean.report.formats import render

        if self.out is not None:
            write_text(self.out, render(records, self.form, everything=self.verbose))
            return
        terminal = sys.stdout is not None and sys.stdout.isatty()
        colours = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        text = render(records, self.form, width=columns(terminal), colours=colours, everything=self.verbose)
        emit(text if _takes(RULE) else text.replace(RULE, "-"))


def columns(terminal: bool) -> int | None:
    """Returns how wide lines may be: COLUMNS where it is set, else as wide as a terminal; None in a file or pipe.

    No shell hands its own COLUMNS on: where it is set, somebody asked for it, as in a log that is read side by side.
    """
    import shutil

    said = os.environ.get("COLUMNS", "")
    if not terminal and not (said.isdecimal() and int(said)):
        return None
    return min(shutil.get_terminal_size().columns, WIDEST)


def _takes(text: str) -> bool:
    """Whether standard output's encoding has these characters; a closed one says nothing against them."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def emit(text: str) -> None:
    """Writes to standard output. A reader that has gone away changes neither the run nor its exit code."""
    if sys.stdout is None:
        raise Refused(CLOSED)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _discard_output()
        raise Refused(f"standard output cannot be written: {error.strerror}.") from None


@contextlib.contextmanager
def kept_for_the_result() -> Iterator[None]:
    """Sends what is printed meanwhile to standard error, by code of others at any level: Python, C or a child process.

    A user's network may print when it is imported, built or run, and scripts read the result from standard output.
    """
    with contextlib.ExitStack() as stack:
        aside = sys.stderr or stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        if sys.stdout is not None:
            sys.stdout.flush()
        output = os.dup(1)
        stack.callback(os.close, output)
        os.dup2(2, 1)
        stack.callback(os.dup2, output, 1)
        stack.callback(_flush_c)
        stack.enter_context(contextlib.redirect_stdout(aside))
        yield


def _flush_c() -> None:
    """Empties the buffers of C's own streams, which into a pipe would be written when the process ends."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).fflush(None)


def warn(line: str) -> None:
    """Writes one line to standard error, if anybody still reads it; what strangers put into it is escaped and cut."""
    if sys.stderr is None:
        return
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    with contextlib.suppress(OSError):
        print(f"bdclean: {plain(line)}", file=sys.stderr, flush=True)


def where_to_look(argv: Sequence[str]) -> str:
    """Returns the end of a sentence about wrong usage: the help of the command that `argv` begins with."""
    command = next((f" {word}" for word in argv[:1] if word in COMMANDS), "")
    return f"Try 'bdclean{command} --help'."


def _discard_output() -> None:
    # Python flushes again when it exits, and would exit 120; there must be something left to flush into.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
