"""Which of the processes that torchrun started this one is. Read from the environment: no torch.

All of them run the same program on the same files, and share out the passes of networks (`training.parallel`). The
first, rank 0, alone prints and writes; the others are silent, write nothing, and leave signals to it.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from bdclean.errors import ENDING

GRACE = 10.0
"""Seconds: so long another process that fails waits for the first one to fail as well, and then to tell of it."""


@dataclass(frozen=True)
class Rank:
    """`number` of `count` processes, the `local` one on its machine."""

    number: int = 0
    count: int = 1
    local: int = 0


def own() -> Rank:
    """Alone, unless all is there that processes need to find each other."""
    said = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")]
    if not all(text.isdigit() for text in said) or not os.environ.get("MASTER_ADDR"):
        return Rank()
    number, count, local, _ = map(int, said)
    return Rank(number, count, local) if count > 1 else Rank()


def first() -> bool:
    """Whether this process is the one that prints and writes."""
    return own().number == 0


def hush() -> None:
    """Silences another process than the first, at every level; signals wait until `linger`: the first one heeds them.

    Were they to act here, one process would leave while the others wait for it, and the first could not say why.
    """
    if first():
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def linger(code: int) -> int:
    """`code`, after GRACE seconds in another process than the first where it is not 0.

    torchrun ends all others as soon as one ends with another code than 0: the first, which most likely has the same to
    say, is given the time to say it. When it has ended, torchrun ends this one, too.
    """
    if code and not first():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        time.sleep(GRACE)
    return code
