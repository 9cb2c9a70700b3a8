"""Standard output carries the result and nothing else; warnings go to standard error."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bdclean.errors import Refused
from bdclean.record import RunRecord, write_text
from bdclean.report import render
from bdclean.report.text import plain


@dataclass(frozen=True)
class Shown:
    """How results are shown: the format, where to, and how much."""

    form: str
    out: Path | None
    verbose: bool

    def show(self, records: Sequence[RunRecord]) -> None:
        """Prints the report, or writes it to `out` by atomic rename."""
        if self.out is not None:
            write_text(self.out, render(records, self.form, everything=self.verbose))
            return
        terminal = sys.stdout.isatty()
        colours = terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        width = shutil.get_terminal_size().columns if terminal else None
        emit(render(records, self.form, width=width, colours=colours, everything=self.verbose))


def emit(text: str) -> None:
    """Writes to standard output. A reader that has gone away changes neither the run nor its exit code."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again when it exits; there must be something left to flush into.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Refused(f"standard output cannot be written: {error.strerror}.") from None


def warn(line: str) -> None:
    """Writes a line to standard error."""
    print(f"bdclean: {plain(line)}", file=sys.stderr, flush=True)
