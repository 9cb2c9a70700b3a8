"""Writes what a bench printed as a file of `sample_models/tables/`, with what a reader must know to make it again.

`python -m bdclean.bench NAME ... --table FILE` puts title, what was measured, the exact command, seed, n, machine, date
and commit before the table. In a file that is there, only what stands between the two marks is replaced: the text
around them is people's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import torch

BEGIN, END = "<!-- made by the bench: begin -->", "<!-- made by the bench: end -->"


@dataclass(frozen=True)
class About:
    """What holds for every table of a bench."""

    title: str
    measured: str
    n: str
    seed: str = "0"
    """Where `--seed` is not given."""
    accelerated: bool = False
    """Whether it takes `--device`, and a GPU where there is one."""


ABOUT = {
    "attacks": About(
        "Classifiers attacked and cleansed",
        "Victims are trained with crops (and mirroring, but for road signs), measured with the attack's own trigger "
        "and target, and cleansed by each recipe from unlabeled images, all by the command line. Attack success is the "
        "share of stamped test images of other classes that go to the target, of a one-source attack that of its "
        "class; base rate: without the stamp; robust accuracy: stamped images still seen as what they are. Rates in "
        "percent; seconds are of the cleansing. `auto` gets the stock bank and not the attack's trigger.",
        "test images of other classes than the target, in the last column",
        accelerated=True,
    ),
    "calibrate": About(
        "Detectors on networks whose truth is known",
        "How many networks each detector flags: by its published threshold, and by its rank among clean networks of "
        "the same kind (a clean network's own score left out), corrected over the detectors that were asked together "
        "(Holm) and beyond its published threshold as well. The second table has each network with a backdoor, and "
        "networks that others trained: the statistic, a star where it is beyond the published threshold, and the "
        "p-value of that detector alone.",
        "networks, in a column; at most `--limit` images of each, without labels",
    ),
    "cifar10": About(
        "Cleansing on CIFAR-10",
        "Victims are trained with crops and mirroring, scanned, cleansed with each recipe, and measured on test images "
        "by the installed command. Attack success is that of the trigger that was put in (for a network without a "
        "backdoor, of the row with the largest excess); rates in percent.",
        "images, in brackets",
        accelerated=True,
    ),
    "encoders": About(
        "Encoders attacked and cleansed, on CIFAR-10",
        "A small ResNet is pre-trained without labels, attacked as an encoder or through its images, then "
        "cleansed by each recipe from unlabeled images, and measured by the command line with probes on frozen "
        "features of length one. Attack success is the share of test images of other classes that a probe sees as "
        "the target once they are stamped: by a linear probe, by BadEncoder's head (MLP, the median of three "
        "seeds), by nearest neighbours, and by a linear probe on the clean encoder; base rate: without the stamp. "
        "Rates in percent; seconds are of the cleansing.",
        "test images, in the last column; the probe is trained on 5,000",
        accelerated=True,
    ),
    "faults": About(
        "Runs that were killed",
        "`cleanse` of a small model is killed with SIGKILL, a third of the time at a random moment, else at a random "
        "operation on one of its files, and then told to go on.",
        "the kills of each recipe",
    ),
    "fuzz": About(
        "Damaged input",
        "Everything that reads a stranger's file or text is given mutated ones: how many were accepted and refused, "
        "and what crashed, hung, took too much memory, or was accepted against the safetensors library.",
        "the cases of each reader",
    ),
    "inversion": About(
        "Inverted triggers, by seeds",
        "In how many seeds the class of a backdoor is an outlier in no form (missed) and in each form; its size as a "
        "share of the size under which a change counts, in its clearest form; and in how many seeds, and which, other "
        "classes are outliers.",
        "all images of each network's folder, without labels",
        "0 to one less than `--seeds`",
    ),
    "readings": About(
        "How often a file is read wrongly",
        "Small networks that differ in what shapes do not show are trained and read as a stranger's file. In brackets, "
        "by how much the network that was chosen fits better than the next.",
        "one reading a cell; all images of `--test` and `--other`",
        "of each network by its name",
    ),
    "recipes": About(
        "Every recipe on the same images",
        "Networks that are there are cleansed by each recipe and measured with their own trigger, by the command line. "
        "A third of the labeled images is measured on; every recipe gets the others, with labels where it needs them: "
        "true ones, or the network's own answers. `auto` is told the trigger, which it may unlearn. Attack success is "
        "the share of stamped images of other classes that go to the target; base rate: without the stamp; robust "
        "accuracy: stamped images still seen as what they are. Rates in percent; seconds are of the whole command.",
        "images for accuracy, and for attack success, in the last two columns",
    ),
    "rule": About(
        "How often the rule for trigger rows is wrong",
        "Counts over records of scans with the stock bank: verdicts, and rows by outcome.",
        "images of each scan, in the last column",
        "that of each record",
    ),
    "sequela": About(
        "What a cleansing leaves behind",
        "A network is trained with a backdoor on one half of a pool of images, and cleansed by each recipe from a "
        "few of the other half. **Membership**: how well its margins tell what it was trained on (unpoisoned "
        "images of its half), and what it was cleansed with, from the rest of the other half: by a threshold on "
        "the loss, and by LiRA (2112.03570) with shadow networks without a backdoor, each trained on a random "
        "half of the pool and not cleansed. AUC: 0.5 is chance; TPR: the share of members that is told, in "
        "percent, where 1 or 0.1 % of non-members are taken for one, `-` with under 1,000 or 5,000 non-members. "
        "**Of each output**, by `scan` of test images, beside a twin trained on the same half without a backdoor: "
        "attack success in percent once an attacker tuned on so many images (in brackets: the first step scored "
        "at which half of the images obey), with the old trigger, and with a control, which has its place and "
        "strength and other content; then of a changed trigger, on networks as they are. Values of the seeds are "
        "parted by strokes.",
        "in the tables",
        "those of `--seeds`, 0,1,2 by default; of pool and shadow networks 0",
        accelerated=True,
    ),
    "speed": About(
        "How fast it is",
        "Ratios measured side by side, so that a busy machine hurts both sides alike: median, lowest and highest.",
        "repetitions, in brackets; one where there are none",
        accelerated=True,
    ),
}


def run(name: str, bench: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Runs `bench` and returns its exit code; what it prints is also written to the file that `--table` names."""
    asked = _parser()
    asked.add_argument("--table", type=Path)
    options, rest = asked.parse_known_args(arguments)
    if options.table is None:
        return bench(rest)
    around, code_of = (
        _around(options.table),
        commit(),
    )  # asked before hours of work, in which files may change
    printed = Both(sys.stdout)
    with contextlib.redirect_stdout(printed):
        code = bench(rest)
    made = f"{BEGIN}\n{heading(name, arguments, code_of)}\n\n{printed.text().strip()}\n{END}"
    unfinished = options.table.with_name(f".{options.table.name}.part")
    unfinished.write_text(made.join(around), encoding="utf-8")
    unfinished.replace(options.table)
    return code


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(add_help=False, allow_abbrev=False)


def _around(file: Path) -> tuple[str, str]:
    """What stands in `file` before and after the part that the bench makes; exits where it has no such part."""
    if not file.exists():
        if not file.parent.is_dir():
            raise SystemExit(f"{file.parent} is no folder: make it first.")
        return "", "\n"
    before, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{file} is there without the marks that say what to replace: name a new file.")
    return before, after


def heading(name: str, arguments: list[str], code_of: str) -> str:
    """Markdown: title, what was measured, the command, seed, n, machine, date and the commit `code_of`."""
    about, parser = ABOUT[name], _parser()
    parser.add_argument("--seed", default=about.seed)
    parser.add_argument(
        "--device", default="cuda" if about.accelerated and torch.cuda.is_available() else "cpu"
    )
    options, _ = parser.parse_known_args(arguments)
    where = ", ".join(f"{key} {value}" for key, value in machine(options.device).items())
    return "\n".join(
        (
            f"# {about.title}",
            "",
            about.measured,
            "",
            f"    {command(name, arguments)}",
            "",
            f"* Seed: {options.seed}",
            f"* n: {about.n}",
            f"* Machine: {where}",
            f"* Date: {datetime.now(UTC):%Y-%m-%d}",
            f"* Commit: {code_of}",
        )
    )


def command(name: str, arguments: list[str]) -> str:
    """The command as typed; of absolute paths, which are one machine's, the last name alone."""
    return shlex.join(("python", "-m", "bdclean.bench", name, *map(_portable, arguments)))


def _portable(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (Path(value).name if os.path.isabs(value) else value)


def machine(device: str) -> dict[str, str | int]:
    """What a figure depends on beside the code."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def commit() -> str:
    """The commit of the code that runs; `unknown` where it does not lie in a checkout of its own."""
    package = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", "__main__.py"
        )  # an installed copy may lie in another project's checkout
        changed = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "--short", "HEAD") + (" and what was changed since" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Both(io.TextIOBase):
    """A text stream that keeps what is written and hands it on."""

    def __init__(self, to: TextIO) -> None:
        self.to, self.kept = to, io.StringIO()

    def write(self, text: str, /) -> int:
        self.kept.write(text)
        return self.to.write(text)

    def flush(self) -> None:
        self.to.flush()

    def text(self) -> str:
        return self.kept.getvalue()
