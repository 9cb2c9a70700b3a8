"""What bdclean raises on purpose: each kind is one sentence for the user and one exit code."""

from __future__ import annotations

import errno
import signal

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that ask a run to end."""


class BdcleanError(Exception):
    """A sentence that says what was found and what to do next; `cli` turns it into `exit_code`.

    `record` may carry what was known when it was raised (a RunRecord), so that a refused run leaves its record, too.
    """

    exit_code = 3

    def __init__(self, message: str, *, record: object | None = None) -> None:
        super().__init__(message)
        self.record = record


class UsageError(BdcleanError):
    """The command line, a setting or a SPEC is wrong."""

    exit_code = 2


class Refused(BdcleanError):
    """The input cannot or must not be worked on: unreadable, unsafe, unrecognised, too few images, ..."""

    exit_code = 3


class Unusable(Refused):
    """A network's answers or features are no numbers, or all the same: nothing can be said of it."""


class Interrupted(BaseException):
    """The run was told to stop; what `--resume` needs is on disk. 130 is Ctrl-C, 143 SIGTERM, 129 SIGHUP.

    It is raised from signal handlers, in the middle of anything: no `except Exception` may take it for a failure.
    """

    def __init__(self, message: str = "interrupted.", exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def attach(error: BaseException, record: object) -> None:
    """Lets `error` carry what was known when it was raised, whatever it is, unless it carries a record already."""
    if getattr(error, "record", None) is None:
        error.record = record  # type: ignore[attr-defined]


SHORT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "failed to map segment",
    "can't start new thread",
    "alloc_failed",
)
"""How torch, CUDA, the dynamic loader and Python say that memory, or room for a thread, is lacking."""


WITHOUT_A_REASON = ("could not create a primitive", "could not execute a primitive")
"""What oneDNN says where it gets no memory; of a layer that it cannot do it says more."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the memory of this machine or of a device was not enough."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    words = str(error).lower().strip()
    said = words in WITHOUT_A_REASON or any(said in words for said in SHORT_OF_MEMORY)
    return said and isinstance(error, (RuntimeError, ImportError))
