"""Nothing is lost: `cleanse` killed with SIGKILL at random moments, again and again, for every recipe.

`python -m bdclean.bench faults --kills 200` cleanses a small model with few images. A third of the kills come at a
random time, the others at a random operation on the state, the output, the record or another file of the run (it is
opened, renamed or deleted; twice as often of the output and the record) or up to 2 ms after it, so that many fall into
the writing of each; the state is saved after every step.
After each: is the input untouched, is the output whole (the bytes of an unbroken run) or absent; does the run, told to
go on, end in the same bytes and the same measures; what lies about afterwards. Prints a Markdown table; exits 1 if
anything was lost.

torch is imported once: every run is a fork of this process, which has one thread and has computed nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).resolve().parents[3] / "sample_models"
SHARED = (
    "--limit 24 --trigger badnets:size=3 --preprocess half --precision fp32 --device cpu --quiet --format json"
).split()
UNLABELED = ["--data", "images/unlabeled", "--test", "images/labeled"]
LABELED = ["--labeled", "images/labeled"]
HASTY: dict[str, Any] = {
    "epochs": 1.0, "least_steps": 1, "inversion_steps": 3, "batch_size": 8, "adversary_steps": 1,
}  # fmt: skip
RECIPES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "bcu": (UNLABELED, {"epochs": 2.0, "batch_size": 8}),
    "ft": (LABELED, {"epochs": 3.0, "batch_size": 8}),
    "sft": (LABELED, {"epochs": 3.0, "first_epochs": 2.0, "batch_size": 8}),
    "inoculate": (UNLABELED, HASTY),
    "auto": (UNLABELED, {}),  # has no settings: what it runs is made hasty
}
PHASES = (
    "before training", "training", "writing the state", "writing the output", "writing the record", "after",
)  # fmt: skip
SAME = ("curve", "triggers", "measures", "findings", "verdict", "before", "after")


@dataclass
class Unbroken:
    """A run that nobody killed: what it ended in, how long it took, how many operations on files it made."""

    code: int
    digest: str
    record: dict[str, Any]
    seconds: float
    operations: dict[str, list[int]]
    """By what they were done to, their numbers in the order of the run, from 1."""


@dataclass
class Tally:
    """What the kills of one recipe did."""

    kills: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    same: int = 0
    lost: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdclean.bench faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="of all recipes together")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="an empty folder; by default a temporary one")
    options = parser.parse_args(arguments)
    names = options.recipes.split(",")
    with contextlib.ExitStack() as stack:
        work = options.work or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="bdclean-faults-"))
        )
        work.mkdir(parents=True, exist_ok=True)
        shutil.copy(SAMPLES / "signs-badnets.safetensors", work / "model.safetensors")
        _warm_up()
        tallies = {}
        for number, name in enumerate(names):
            kills = options.kills * (number + 1) // len(names) - options.kills * number // len(names)
            tallies[name] = _try(name, kills, random.Random(f"{options.seed}/{name}"), work)
    print(table(tallies))
    for name, tally in tallies.items():
        for sentence in tally.lost:
            print(f"{name}: {sentence}", file=sys.stderr)
    return 1 if any(tally.lost for tally in tallies.values()) else 0


def _warm_up() -> None:
    """Imports what every run needs; starts no thread, so that the process can be forked."""
    import torch
    from PIL import Image

    from bdclean import registry
    from bdclean.cli.main import run
    from bdclean.training import resume

    for module in ("torch._dynamo", "bdclean.runs.cleanse", "bdclean.triggers.badnets"):
        importlib.import_module(module)
    Image.init()
    with contextlib.redirect_stdout(io.StringIO()):
        run(["ls", "recipes"])  # imports what parsing needs
    torch.set_num_threads(1)
    resume.SAVE_EVERY_SECONDS = -1.0
    for name in RECIPES:
        registry.load(registry.RECIPES, name)
    inoculate = registry.RECIPES["inoculate"]
    registry.RECIPES["hasty"] = registry.Entry(f"{__name__}:hasty", inoculate.line, inoculate.families)


def hasty() -> Any:
    """`inoculate` with so few steps that it takes a second."""
    from bdclean.recipes.inoculate import Inoculate

    return Inoculate(**HASTY)


def _try(name: str, kills: int, drawn: random.Random, work: Path) -> Tally:
    unbroken, tally = _unbroken(name, work), Tally()
    before = _digest(work / "model.safetensors")
    while tally.kills < kills:
        folder = work / f"{name}-{tally.kills}"
        folder.mkdir()
        if drawn.random() < 1 / 3:
            killed = _run(name, folder, seconds=drawn.random() * unbroken.seconds)
        else:
            delay = drawn.choice((None, drawn.random() * 0.002))
            kind = drawn.choice([*sorted(unbroken.operations), "o", "r"])
            killed = _run(name, folder, operation=drawn.choice(unbroken.operations[kind]), delay=delay)
        if killed.code == -signal.SIGKILL:
            tally.kills += 1
            sentence = _judge(name, folder, unbroken, tally)
            if _digest(work / "model.safetensors") != before:
                sentence = "the input was changed"
            if sentence:
                tally.lost.append(f"kill {tally.kills}: {sentence}")
            print(
                f"{name}: {tally.kills} of {kills} kills, {len(tally.lost)} losses",
                file=sys.stderr,
                flush=True,
            )
        shutil.rmtree(folder)
    return tally


def _judge(name: str, folder: Path, unbroken: Unbroken, tally: Tally) -> str | None:
    """What the kill broke, as a sentence, or None; counts what was lying about and in which phase it came."""
    out = folder / "out.safetensors"
    files = sorted(path.name for path in folder.iterdir() if path.name != "log")
    tally.phases[_phase(files)] += 1
    tally.left.update({_kind(name) for name in files})
    if out.exists() and _digest(out) != unbroken.digest:
        return "the output was there and not whole"
    again = _run(name, folder, resume=True)
    if again.code != unbroken.code or not out.exists():
        return f"told to go on it exits {again.code}: {(folder / 'log').read_text()[-300:]}"
    if _digest(out) != unbroken.digest:
        return "told to go on it ends in other bytes"
    record = json.loads((folder / "out.json").read_text())
    if any(record[key] != unbroken.record[key] for key in SAME):
        return "told to go on it measures something else"
    rest = {path.name for path in folder.iterdir()} - {"log", "out.safetensors", "out.json"}
    if rest:
        return f"{', '.join(sorted(rest))} is left when all is done"
    tally.same += 1
    return None


def _phase(files: Sequence[str]) -> str:
    """Where a run was when it was killed, by what is in its folder."""
    parts = [name for name in files if name.endswith(".part")]
    if any(".resume." in name for name in parts):
        return "writing the state"
    if any(name.startswith(".out.safetensors") for name in parts):
        return "writing the output"
    if any(name.startswith(".out.json") for name in parts):
        return "writing the record"
    if "out.safetensors" in files:
        return "after"
    return "training" if "out.safetensors.resume.safetensors" in files else "before training"


def _kind(name: str) -> str:
    if name.endswith((".part", ".lock")):
        return "partial file" if name.endswith(".part") else "lock"
    return "resume state" if ".resume." in name else "output or record"


@dataclass
class _Ended:
    code: int
    seconds: float


def _run(
    name: str,
    folder: Path,
    *,
    resume: bool = False,
    seconds: float | None = None,
    operation: int | None = None,
    delay: float | None = None,
    counter: int | None = None,
) -> _Ended:
    """Forks a `cleanse` into `folder` and waits for it; it is killed after `seconds`, or at its n-th `operation`.

    With `delay`, that many seconds after that operation; by itself, where `delay` is None. `counter`: where the child
    writes a letter for each operation.
    """
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_killed(folder, operation, delay, writing, counter)
        os._exit(_cleanse(name, folder, resume))
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    elif delay is not None and os.read(reading, 1):
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return _Ended(code, time.monotonic() - start)


def _cleanse(name: str, folder: Path, resume: bool) -> int:
    from bdclean import registry
    from bdclean.cli.main import run

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(log, 2)
    images, settings = RECIPES[name]
    if name == "auto":
        registry.RECIPES["inoculate"] = registry.RECIPES["hasty"]
    places = [str(SAMPLES / word) if word.startswith("images/") else word for word in images]
    chosen = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    line = ["cleanse", str(folder.parent / "model.safetensors"), "--recipe", name, *places, *SHARED, *chosen]
    return run([*line, "--out", str(folder / "out.safetensors"), *(["--resume"] if resume else [])])


def _be_killed(
    folder: Path, operation: int | None, delay: float | None, told: int, counter: int | None
) -> None:
    """Watches this process's operations on files in `folder`, and kills it at one of them, or asks to be killed."""
    if operation is None and counter is None:
        return
    seen = 0

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove") or not str(values[0]).startswith(str(folder)):
            return
        if str(values[0]).endswith("log"):
            return
        seen += 1
        if counter is not None:
            os.write(counter, _letter(str(values[0])).encode())
        if seen == operation:
            if delay is None:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(told, b".")

    sys.addaudithook(hook)


def _unbroken(name: str, work: Path) -> Unbroken:
    folder = work / name
    folder.mkdir()
    with tempfile.TemporaryFile() as counter:
        ended = _run(name, folder, counter=counter.fileno())
        counter.seek(0)
        letters = counter.read().decode()
    if not (folder / "out.json").exists() or not (folder / "out.safetensors").exists():
        raise SystemExit(f"{name} does not end: {(folder / 'log').read_text()[-500:]}")
    record = json.loads((folder / "out.json").read_text())
    digest = _digest(folder / "out.safetensors")
    shutil.rmtree(folder)
    operations = {kind: [n for n, letter in enumerate(letters, 1) if letter == kind] for kind in set(letters)}
    return Unbroken(ended.code, digest, record, ended.seconds, operations)


def _letter(path: str) -> str:
    """Which kind of file an operation is on: state, output, record or another."""
    name = Path(path).name
    if ".resume." in name:
        return "s"
    return "o" if name.startswith(".out.safetensors.") else "r" if name.startswith(".out.json.") else "a"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(tallies: dict[str, Tally]) -> str:
    """The figures as a Markdown table, with a line for all recipes together."""
    lines = [
        f"| recipe | kills | {' | '.join(PHASES)} | input untouched, output whole or absent "
        "| resumed to the same bytes | left by kills |",
        f"|---|---|{'---|' * len(PHASES)}---|---|---|",
    ]
    whole = Tally()
    for tally in tallies.values():
        whole.kills, whole.same = whole.kills + tally.kills, whole.same + tally.same
        whole.phases += tally.phases
        whole.left += tally.left
        whole.lost += tally.lost
    for name, tally in [*tallies.items(), ("all", whole)]:
        bad = sum("the input" in sentence or "not whole" in sentence for sentence in tally.lost)
        left = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.left.items())) or "nothing"
        phases = " | ".join(str(tally.phases[phase]) for phase in PHASES)
        kept = f"{tally.kills - bad} of {tally.kills} | {tally.same} of {tally.kills}"
        lines.append(f"| {name} | {tally.kills} | {phases} | {kept} | {left} |")
    return "\n".join(lines)
