"""Runs a command line and turns whatever ends it into an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any, TextIO

import typer

from bdclean import ranks
from bdclean.cli.commands import app
from bdclean.cli.console import warn, where_to_look
from bdclean.errors import ENDING, BdcleanError, Interrupted, Refused

SHARED = ("scan", "cleanse")
"""The commands whose work several processes of torchrun share out; the first alone does the others."""


# --- running and exiting ------------------------------------------------------------------------------------


def run(argv: list[str]) -> int:
    """Runs one command line and returns its exit code; nothing is raised."""
    if not ranks.first() and argv[:1] not in [[name] for name in SHARED]:
        return 0
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", encoding=_encoding(stream))
    # Ctrl-C is Python's own; what nohup and its like told this process to ignore stays ignored.
    others = [n for n in ENDING if n != signal.SIGINT and signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, _terminate) for number in others}
    try:
        job = app(args=argv, prog_name="bdclean", standalone_mode=False)
        return job() if callable(job) else 2 * bool(job)  # Typer's own endings: its 1 would read as a verdict
    except SystemExit:
        return 0  # Typer leaves this way when nobody reads its help any more
    except BdcleanError as error:
        warn(f"{error} {where_to_look(argv)}" if error.exit_code == 2 else str(error))
        return error.exit_code
    except BaseException as error:
        return _ended(error, argv)
    finally:
        for number, handler in previous.items():
            if (
                signal.getsignal(number) == _terminate
            ):  # one that came stays ignored until the process has ended
                signal.signal(number, handler)


def _encoding(stream: TextIO) -> str | None:
    """UTF-8 for what Windows redirects, None for what stays: its own encodings lack characters of pages and tables."""
    keeps = sys.platform != "win32" or stream.isatty() or "PYTHONIOENCODING" in os.environ
    return None if keeps else "utf-8"


def _ended(error: BaseException, argv: list[str]) -> int:
    if hasattr(error, "format_message"):  # Typer's own errors: each is wrong usage
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":  # no command at all: the help
            with contextlib.suppress(OSError, AttributeError):
                sys.stderr.write(f"{message}\n")
        else:
            message = message.rstrip(". ") or "give a command"
            warn(f"{message}{'' if message.endswith('?') else '.'} {where_to_look(argv)}")
        return 2
    if isinstance(error, typer.Abort):
        warn("interrupted.")
        return 130
    from bdclean.cli.defects import leave_record, problem_of, trace

    _, problem = problem_of(error)
    if problem.digest is not None:
        trace(error)
        with contextlib.suppress(Refused):
            leave_record(sys.argv, error)
    warn(problem.message)
    return problem.exit_code


def _terminate(number: int, frame: Any) -> None:
    # A terminal that closes hangs up twice, the kernel's and the shell's: the second must not cut the record short.
    signal.signal(number, signal.SIG_IGN)
    said = "terminated" if number == signal.SIGTERM else "hung up"
    if ranks.own().count > 1:
        said += ", as torchrun does where another of its processes has ended"
    raise Interrupted(f"{said}.", 128 + number)
