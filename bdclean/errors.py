"""What bdclean raises on purpose: each kind is one sentence for the user and one exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bdclean.record import RunRecord


class BdcleanError(Exception):
    """A sentence that says what was found and what to do next; `cli` turns it into `exit_code`.

    `record` may carry what was known when it was raised, so that a refused run leaves its record, too.
    """

    exit_code = 3

    def __init__(self, message: str, *, record: RunRecord | None = None) -> None:
        super().__init__(message)
        self.record = record


class UsageError(BdcleanError):
    """The command line, a setting or a SPEC is wrong."""

    exit_code = 2


class Refused(BdcleanError):
    """The input cannot or must not be worked on: unreadable, unsafe, unrecognised, too few images, ..."""

    exit_code = 3


class Interrupted(BdcleanError):
    """The run was told to stop; what `--resume` needs is on disk. 130 is Ctrl-C, 143 SIGTERM."""

    def __init__(
        self, message: str = "interrupted.", exit_code: int = 130, *, record: RunRecord | None = None
    ) -> None:
        super().__init__(message, record=record)
        self.exit_code = exit_code
