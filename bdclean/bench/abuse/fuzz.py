"""A long fuzz of everything that reads a stranger's file or text: no crash, no hang, no memory beyond the file's.

`python -m bdclean.bench fuzz [--cases N] [--seed S] [--jobs J] [--work FOLDER]` prints a Markdown table. Every case is
drawn from (seed, number) alone, so that it can be made again; `--work` keeps what is done, and a run that was stopped
goes on. Inputs that break something are saved there, each with a command that repeats it.

Cases run in child processes with little memory to take; one that stands still is killed, and counts as a hang.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import shlex
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

from bdclean.bench.abuse.parsers import Laxer, Parser, library_reads, parsers
from bdclean.errors import BdcleanError
from bdclean.files.tensorfile import LARGEST_HEADER

try:
    import resource
except ImportError:  # no POSIX system: `python -m bdclean.bench` says that this does not run there
    resource = None  # type: ignore[assignment]

CHUNK = 2000  # cases of one child process
SLOW = 10.0  # seconds of processor time after which a case is a hang
PATIENCE = 12  # times as long on the clock, where a machine does other work as well
ADDRESS_SPACE = 2 << 30  # bytes that a child may take beyond what it was born with
LARGE = 100_000  # bytes from which on an input's memory is measured
ENDS = ("accepted", "refused", "stricter", "crash", "hang", "laxer")


class Hang(BaseException):
    """A case that takes too long; no reader's `except Exception` may catch it."""


def main(arguments: list[str]) -> int:
    """Runs the fuzz, or one case of it, and returns 0 where nothing broke, else 1."""
    ask = argparse.ArgumentParser(prog="python -m bdclean.bench fuzz", description=__doc__.splitlines()[0])
    ask.add_argument("--cases", type=int, default=1_000_000)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--jobs", type=int, default=1)
    ask.add_argument(
        "--minutes", type=float, default=0.0, help="stop after so many; 0: when all cases are done"
    )
    ask.add_argument(
        "--work", type=Path, default=None, help="keeps finished parts and what broke; default: none kept"
    )
    ask.add_argument("--case", type=int, default=None, help="run this one case again, and let it break")
    options = ask.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    known = parsers()
    if options.case is not None:
        return _repeat(known, options.seed, options.case)
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bdclean-fuzz-")))
        work.mkdir(parents=True, exist_ok=True)
        done = _run(known, work, options.seed, options.cases, options.jobs, options.minutes)
        print(table(done))
        broken = [line for part in done for line in part["broken"]]
        for line in broken[:20]:
            print(f"\n{line['name']}: {line['end']}, {line['why']}")
            print(f"    python -m bdclean.bench fuzz --seed {options.seed} --case {line['case']}")
            if options.work:
                print(f"    its input: {shlex.quote(line['file'])}")
    return 1 if broken else 0


def drawn(known: dict[str, Parser], seed: int, case: int) -> tuple[str, bytes]:
    """The parser's name and the input of one case: the same on any machine."""
    draw = random.Random(f"{seed}/{case}")
    at = draw.randrange(1000)
    for name, parser in known.items():
        at -= parser.share
        if at < 0:
            return name, parser.make(draw)
    raise AssertionError("the shares do not add up to 1,000")


def _repeat(known: dict[str, Parser], seed: int, case: int) -> int:
    name, content = drawn(known, seed, case)
    print(f"{name}, {len(content)} bytes: {content[:2000]!r}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            known[name].attempt(content, Path(folder))
        except BdcleanError as error:
            print(f"refused: {error}")
            return 0
    print("accepted")
    return 0


# --- the parent ---------------------------------------------------------------------------------------------


def _run(
    known: dict[str, Parser], work: Path, seed: int, cases: int, jobs: int, minutes: float
) -> list[dict]:
    """The results of all parts, those of an earlier run included."""
    log = work / f"fuzz-{seed}.jsonl"
    done = {part["start"]: part for part in _read(log) if part["start"] + part["cases"] <= cases}
    parts = [(start, min(CHUNK, cases - start)) for start in range(0, cases, CHUNK) if start not in done]
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    running: dict[int, Child] = {}
    said = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        while parts or running:
            while parts and len(running) < jobs and time.monotonic() < end:
                child = Child(known, work, seed, *parts.pop(0))
                running[child.pid] = child
            if not running:
                break
            time.sleep(0.05)
            for child in list(running.values()):
                part = child.ended()
                if part is None:
                    continue
                del running[child.pid]
                done[part["start"]] = part
                file.write(json.dumps(part) + "\n")
                file.flush()
                if part["cases"] < child.count:  # killed in the middle: the rest is a part of its own
                    parts.insert(0, (child.start + part["cases"], child.count - part["cases"]))
            if time.monotonic() - said > 30:
                said = time.monotonic()
                count = sum(part["cases"] for part in done.values())
                print(f"{count:,} of {cases:,} cases", file=sys.stderr, flush=True)
    return [done[start] for start in sorted(done)]


def _read(log: Path) -> Iterator[dict]:
    if not log.exists():
        return
    for line in log.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # the last line of a run that was killed
            yield json.loads(line)


class Child:
    """A process that runs some cases one after another.

    Where it is, and how its cases ended, lies in memory that the parent sees, too, whatever becomes of the process.
    """

    def __init__(self, known: dict[str, Parser], work: Path, seed: int, start: int, count: int) -> None:
        self.work, self.seed, self.start, self.count, self.known = work, seed, start, count, known
        self.form = f"<qd{len(known) * len(ENDS)}q"  # number of the case, when it began, ends of each parser
        self.ends = [0] * (len(known) * len(ENDS))
        self.shared = mmap.mmap(-1, struct.calcsize(self.form))
        self._note(start)
        self.file = work / f".part-{seed}-{start}.json"
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._work()
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)

    def _note(self, case: int) -> None:
        self.shared[:] = struct.pack(self.form, case, time.monotonic(), *self.ends)

    def ended(self) -> dict | None:
        """What was found, once the process has ended; one that stands still, inside of C too, is killed."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        case, began, *self.ends = struct.unpack(self.form, self.shared[:])
        if not pid and time.monotonic() - began > PATIENCE * SLOW:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            pid, status = self.pid, signal.SIGKILL
        if not pid:
            return None
        try:
            part: dict = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            part = {"broken": [], "seconds": 0.0, "memory": {}, "large": {}}
        self.file.unlink(missing_ok=True)
        if status != 0:
            end = "hang" if status == signal.SIGKILL else "crash"
            name, content = drawn(self.known, self.seed, case)
            part["broken"].append(
                self._keep(name, content, case, end, f"the process ended with status {status}")
            )
            self._count(name, end)
            case += 1
        part |= {"start": self.start, "cases": case - self.start, "ends": {}}
        for number, name in enumerate(self.known):
            own = self.ends[number * len(ENDS) : (number + 1) * len(ENDS)]
            if any(own):
                part["ends"][name] = dict(zip(ENDS, own, strict=True))
        return part

    def _count(self, name: str, end: str) -> None:
        self.ends[list(self.known).index(name) * len(ENDS) + ENDS.index(end)] += 1

    def _keep(self, name: str, content: bytes, case: int, end: str, why: str) -> dict:
        file = self.work / f"{end}-{self.seed}-{case}.bin"
        file.write_bytes(content)
        return {"name": name, "case": case, "end": end, "why": why, "file": str(file)}

    def _work(self) -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, size + ADDRESS_SPACE))
        signal.signal(signal.SIGPROF, _alarm)
        broken: list[dict] = []
        memory: dict[str, list[float]] = {}
        began = time.process_time()
        room = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=room, prefix="bdclean-fuzz-") as folder:
            for case in range(self.start, self.start + self.count):
                self._note(case)
                name, content = drawn(self.known, self.seed, case)
                end, why, peak = attempt(self.known[name], content, Path(folder))
                self._count(name, end)
                if end in ("crash", "hang", "laxer"):
                    broken.append(self._keep(name, content, case, end, why))
                if peak is not None:
                    memory.setdefault(name, []).append(peak - 2 * len(content))
                if (case - self.start) % 200 == 199 or broken or case == self.start + self.count - 1:
                    part = {
                        "broken": broken,
                        "seconds": time.process_time() - began,
                        "memory": {name: max(found) for name, found in memory.items()},
                        "large": {name: len(found) for name, found in memory.items()},
                    }
                    self.file.write_text(json.dumps(part), encoding="utf-8")
            self._note(self.start + self.count)


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Hang


# --- one case -----------------------------------------------------------------------------------------------


def attempt(parser: Parser, content: bytes, folder: Path) -> tuple[str, str, int | None]:
    """How one input ended, why, and the bytes of memory that it took at its peak where it is a large one.

    `stricter`: refused, though the safetensors library reads it. `laxer`: the other way round, which is a defect.
    """
    signal.setitimer(signal.ITIMER_PROF, SLOW)
    before = _resident(reset=True) if len(content) >= LARGE else None
    try:
        parser.attempt(content, folder)
        end, why = "accepted", ""
    except BdcleanError as error:
        end, why = "refused", str(error)
        if not why.endswith((".", "?", "...")) or len(why) > 5000:
            end, why = "crash", f"not a sentence: {why[:200]!r}"
    except Laxer as error:
        end, why = "laxer", str(error)
    except Hang:
        return "hang", f"over {SLOW:g} seconds", None
    except BaseException as error:
        end, why = "crash", f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        for path in folder.iterdir():
            path.unlink()
    peak = None if before is None else _resident() - before
    if end == "refused" and parser.share > 500 and len(content) < LARGEST_HEADER:
        end = "stricter" if library_reads(content) is not None else end
    return end, why, peak


def _resident(reset: bool = False) -> int:
    """The most memory that this process held since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


# --- the table ----------------------------------------------------------------------------------------------


def table(parts: list[dict]) -> str:
    """A Markdown table of all parts, a row for each parser and one for all."""
    names = list(dict.fromkeys(name for part in parts for name in part["ends"]))
    rows = [
        "| input | cases | accepted | refused | of them read by the safetensors library | crashes | hangs "
        "| accepted against the library | most memory beyond twice an input of 100 kB or more | cases per CPU second |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    total: Counter[str] = Counter()
    peaks = []
    for name in names:
        ends: Counter[str] = Counter()
        for part in parts:
            ends.update(part["ends"].get(name, {}))
        total.update(ends)
        found = [part["memory"][name] for part in parts if name in part["memory"]]
        large = sum(part.get("large", {}).get(name, 0) for part in parts)
        peaks += found
        memory = f"{_megabytes(found)} ({large:,} inputs)" if found else "-"
        rows.append(_row(name, ends, memory, ""))
    seconds = sum(part["seconds"] for part in parts)
    rate = f"{sum(total.values()) / seconds:,.0f}" if seconds else "-"
    rows.append(_row("all", total, _megabytes(peaks) if peaks else "-", rate))
    return "\n".join(rows)


def _megabytes(found: list[float]) -> str:
    return f"{max(0.0, *found) / 1e6:.0f} MB"


def _row(name: str, ends: Counter[str], memory: str, rate: str) -> str:
    stricter = ends["stricter"]
    cells = [sum(ends[end] for end in ENDS), ends["accepted"], ends["refused"] + stricter, stricter]
    cells += [ends["crash"], ends["hang"], ends["laxer"]]
    return f"| `{name}` | {' | '.join(f'{cell:,}' for cell in cells)} | {memory} | {rate} |"
