"""How long work tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Tell(Protocol):
    """Receives progress: `done` of `total` units of `stage`, with measures to show beside them."""

    def __call__(self, stage: str, done: int, total: int, **measures: float) -> None: ...


def quiet(stage: str, done: int, total: int, **measures: float) -> None:
    """A `Tell` that shows nothing."""
