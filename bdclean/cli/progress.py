"""Progress on standard error: live bars on a terminal, an occasional plain line elsewhere, nothing under -q."""

from __future__ import annotations

import contextlib
import sys
import time
from functools import partial
from types import TracebackType
from typing import Any, TextIO

from bdclean.cli.console import WIDEST
from bdclean.files import text
from bdclean.report import wording

EVERY = 10.0  # seconds between plain lines: enough to see life in a CI log, too few to drown it
MEASURES = 2  # that are shown beside a stage, at most
LARGE = 100.0  # from here on a measure has no room for digits behind its point
STAGE, NAMED, BAR, COUNTER = 20, 36, 14, 13  # columns of a live line, the same in every stage; 80 hold all


class Progress:
    """What use cases call as `tell(stage, done, total, **measures)`; shows rate and time left.

    One counts all `models` of a command, of which each `begin`s: shown are which it is and the time left over all. It
    may be entered again for each of them, so that what is printed between two finds no bars in its way.
    """

    def __init__(self, quiet: bool = False, file: TextIO | None = None, models: int = 1) -> None:
        self.file = file if file is not None else sys.stderr
        self.quiet = quiet or self.file is None
        self.title = ""
        self.models, self.number = models, 0
        self._worked, self._spent = (
            0,
            0.0,
        )  # so many models before this one were worked on, for so many seconds
        self._this = time.monotonic() if models > 1 else 0.0  # when the present one began
        self._started: dict[str, tuple[float, int]] = {}
        self._bars: dict[str, Any] = {}
        self._live: Any = None
        self._overall: Any = None
        self._spoke = time.monotonic()

    def __enter__(self) -> Progress:
        if not self.quiet and self.file.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Live
            from rich.table import Column

            cell = partial(Column, no_wrap=True, overflow="ellipsis")
            columns = [
                TextColumn("{task.description}", markup=False, table_column=cell()),
                BarColumn(BAR, table_column=cell(width=BAR)),
                TextColumn("{task.fields[counter]}", table_column=cell(width=COUNTER)),
                TextColumn("{task.fields[more]}", markup=False, table_column=cell(ratio=1)),
            ]
            console = Console(file=self.file, highlight=False, markup=False, emoji=False)
            if console.width > WIDEST:
                console.width = WIDEST
            self._live = Live(*columns, console=console, transient=True, expand=True)
            with contextlib.suppress(OSError):
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the bars away, so that what is printed next starts on a line of its own."""
        if self._live is not None:
            with contextlib.suppress(
                OSError
            ):  # the terminal may be gone; the run's record is still to be written
                self._live.stop()
            self._live = self._overall = None
        self._bars.clear()

    def begin(self, title: str) -> None:
        """Starts a new model: its stages are counted afresh."""
        self.title = text.plain(title)
        if self.models > 1:
            self._count()
        self._started.clear()
        if self._live is not None:
            for bar in self._bars.values():
                self._live.remove_task(bar)
        self._bars.clear()

    def _count(self) -> None:
        """Goes on to the next of several models."""
        now = time.monotonic()
        if self._started:  # one that was refused at once says nothing about the others
            self._worked, self._spent = self._worked + 1, self._spent + now - self._this
        self.number, self._this = self.number + 1, now
        if self._live is not None and self._overall is None:
            self._overall = self._live.add_task(
                "model".ljust(NAMED), total=self.models, counter="".rjust(COUNTER), more=""
            )
        self._show_overall(self._this)

    def left_over_all(self, now: float) -> str:
        """How long the models that are left take at the pace of those before; empty where none was worked on."""
        if not self._worked:
            return ""
        each = self._spent / self._worked
        left = each * (self.models - self.number) + max(0.0, each - (now - self._this))
        return f"{wording.duration(round(left))} left over all"

    def _show_overall(self, now: float) -> None:
        if self._overall is None:
            return
        counter = f"{self.number}/{self.models}".rjust(COUNTER)
        self._live.update(
            self._overall, completed=self.number - 1, total=self.models, counter=counter,
            more=self.left_over_all(now),
        )  # fmt: skip

    def __call__(self, stage: str, done: int, total: int, **measures: Any) -> None:
        now = time.monotonic()
        if done <= self._started.get(stage, (now, -1))[1]:
            self._started.pop(stage, None)  # the stage starts again, as for the second of two models
        started, first = self._started.setdefault(stage, (now, done))
        if self.quiet:
            return
        more = details(done - first, total - done, now - started, measures)
        try:
            if self._live is not None:
                if stage not in self._bars:
                    named = self._named(text.plain(stage))
                    self._bars[stage] = self._live.add_task(named, total=total, counter="", more="")
                counter = f"{done}/{total}".rjust(COUNTER)
                self._live.update(self._bars[stage], completed=done, total=total, counter=counter, more=more)
                self._show_overall(now)
            elif now - self._spoke >= EVERY:
                self._spoke = now
                line = f"{self._start(now)}{text.plain(stage)} {done}/{total}  {more}".rstrip()
                print(line, file=self.file, flush=True)
        except OSError:
            self.quiet = True  # nobody reads it any more; the run goes on

    def _start(self, now: float) -> str:
        """What a plain line begins with: which model of how many, and the time left over all."""
        start = f"{self.title}: " if self.title else ""
        if self.models < 2:
            return start
        left = self.left_over_all(now)
        return f"model {self.number}/{self.models}{f' ({left})' if left else ''} {start}"

    def _named(self, stage: str) -> str:
        """The stage in STAGE columns; of several models with the end of the model's name before it, in NAMED."""
        if not self.title:
            return stage[:STAGE].ljust(STAGE)
        room = NAMED - len(stage) - 2
        name = self.title if len(self.title) <= room else f"\u2026{self.title[1 - room :]}"
        return f"{name}: {stage}".ljust(NAMED)


def details(done: int, left: int, seconds: float, measures: dict[str, Any]) -> str:
    """Returns time left, the first MEASURES of measures, and rate of a stage in which `done` steps took `seconds`.

    What comes last is cut off where there is no room.
    """
    rate = done / seconds if seconds > 0 else 0.0
    parts = [f"{wording.duration(round(left / rate))} left"] if rate > 0 and left > 0 else []
    named = [name for name in measures if name != "images_per_second"][:MEASURES]
    parts += [f"{_name(name)} {_value(measures[name])}" for name in named]
    if "images_per_second" in measures:
        parts.append(f"{measures['images_per_second']:,.0f} images/s")
    elif rate > 0:
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s")
    return "  ".join(parts)


def _name(name: str) -> str:
    return text.plain(name).replace("_", " ")


def _value(value: Any) -> str:
    if not isinstance(value, float):
        return text.plain(value)
    return f"{value:.3f}" if abs(value) < LARGE else f"{value:.3g}"
