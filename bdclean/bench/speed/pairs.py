"""Two things timed in turn, so that a busy machine hurts both alike; and what a cell of the speed table holds."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Cell:
    """One figure: the median over `n` repetitions with its lowest and highest, and what it should reach."""

    name: str
    what: str
    value: float
    low: float
    high: float
    n: int
    goal: str = ""
    """Such as `>= 0.9`; empty where there is none."""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        name: str, what: str, values: Sequence[float], goal: str = "", note: str = "", **details: Any
    ) -> Cell:
        return Cell(
            name, what, statistics.median(values), min(values), max(values), len(values), goal, note, details
        )

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the goal; None without one."""
        if not self.goal:
            return None
        sign, number = self.goal.split()
        return self.value >= float(number) if sign == ">=" else self.value <= float(number)


def interleaved(
    ours: Callable[[], Any], theirs: Callable[[], Any], repetitions: int
) -> tuple[list[Any], list[Any]]:
    """Figures of `ours` and `theirs`, called in turn; which goes first alternates. Both are called once before."""
    ours()
    theirs()
    mine: list[Any] = []
    others: list[Any] = []
    for turn in range(repetitions):
        for ours_now in (turn % 2 == 0, turn % 2 == 1):
            (mine if ours_now else others).append((ours if ours_now else theirs)())
    return mine, others


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Pair by pair, so that each compares moments that lie next to each other."""
    return [a / b for a, b in zip(over, under, strict=True)]


def settled(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Worker:
    """A contender in a process of its own: what one sets (allocator, threads, caches) does not reach the other.

    `make(*arguments)` is called there and returns the function that each call of the worker runs.
    """

    def __init__(self, make: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()

    def __call__(self) -> Any:
        self.pipe.send(None)
        failed, answer = self.pipe.recv()
        if failed:
            raise RuntimeError(answer)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.pipe.close()  # it then finds nobody to answer and ends
        self.process.join()


def _serve(pipe: Connection, make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    function = None
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        try:
            function = function or make(*arguments)
            pipe.send((False, function()))
        except Exception:
            pipe.send((True, traceback.format_exc()))


@dataclass(frozen=True)
class Ended:
    """What the operating system says of a whole process: seconds by the clock and of processors, peak memory."""

    wall: float
    cpu: float
    peak_mib: float


def process(command: Sequence[str]) -> Ended:
    """Run `command`, its output thrown away; raises RuntimeError where it exits with more than a verdict's 1."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} exited {child.returncode}")
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return Ended(wall, usage.ru_utime + usage.ru_stime, peak)
