"""Asks detectors of networks whose truth is known; ships what they say of the clean ones; counts alarms and misses.

    python -m bdclean.bench calibrate --work DIR [--detectors mm-bd,stripes,neural-cleanse] [--ship] \\
        [--network FILE TARGET IMAGES [ARCH]] ...

DIR is what `small-networks` made: `networks.json`, which says what each network is, the files, and beside each
`<stem>-images`, the test images of its classes.

They are read with the size and normalisation that they were trained with, a stranger's as `scan` reads it, with at most
`--limit` images without labels. Each statistic is a file in `DIR/scores`; those that exist are not made again. `--ship`
writes the clean networks' into the package, where numbers of other detectors stay; the counts are of what the package
has: each clean network is held against the others (leave-one-out). `--network` adds a stranger's network to the second
table, and only there; a TARGET of `-` is one without a backdoor.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bdclean import registry
from bdclean.bench.opened import Opened
from bdclean.detectors import calibration
from bdclean.detectors.calibration import Clean
from bdclean.errors import Refused
from bdclean.files.writing import write_text
from bdclean.measuring.intervals import wilson
from bdclean.runs.detecting import LEVEL, LEVEL_UNASKED, precision_for, rank
from bdclean.training.run import Run
from bdclean.training.students import frozen

DETECTORS = "mm-bd,stripes,neural-cleanse"


@dataclass(frozen=True)
class Known:
    """A network with its truth. `target`: of its backdoor, None where it has none."""

    name: str
    file: Path
    images: Path
    family: str
    target: int | None
    arch: str | None = None
    preprocess: str = "auto"


@dataclass(frozen=True)
class Score:
    """What a detector said: its statistic, whether that passes its published threshold, and the reason in words."""

    classes: int
    side: int
    statistic: float | None
    outlier: bool
    reason: str
    seconds: float


def asked(known: Known, detectors: Sequence[str], folder: Path, limit: int) -> dict[str, Score]:
    """The word of each detector on a network, from its file in `folder` where there is one."""
    opened: Opened | None = None
    scores = {}
    for detector in detectors:
        cell = folder / f"{known.name}.{detector}.json"
        if not cell.exists():
            opened = opened or Opened.of(
                known.file, known.images, known.arch, "classifier", limit, known.preprocess
            )
            said = score(opened, detector)
            print(f"{known.name} {detector}: {said.statistic}, {said.seconds} s", file=sys.stderr, flush=True)
            write_text(cell, json.dumps(asdict(said)) + "\n")
        scores[detector] = Score(**json.loads(cell.read_text(encoding="utf-8")))
    return scores


def score(opened: Opened, detector: str) -> Score:
    """The detector's word on an opened network, run as `scan` runs it."""
    precision = precision_for((detector,), opened.classifier, opened.images, opened.device)
    run, started = Run(opened.device, precision, 0), time.process_time()
    made = registry.load(registry.DETECTORS, detector)()
    statistic, outlier = None, False
    try:
        found = made(frozen(opened.classifier, run), opened.arch, opened.images, run)
        finding: dict[str, Any] = next(
            (f for f in found.findings if f["verdict"] == "outlier"), found.findings[0]
        )
        statistic, outlier, reason = found.statistic, finding["verdict"] == "outlier", finding["reason"]
    except Refused as error:
        reason = str(error)
    spent = round(time.process_time() - started, 1)
    return Score(opened.arch.classes, max(opened.images.shape[2:]), statistic, outlier, reason, spent)


def shipped(known: Sequence[Known], scores: dict[str, dict[str, Score]]) -> str:
    """The text of the package's file: one clean network a line, so that a change shows as one.

    What it has of detectors that were not asked now stays, and so do networks that were not.
    """
    before = {clean.network: dict(clean.scores) for clean in calibration.table()}
    rows = [asdict(clean) for clean in calibration.table() if clean.network not in scores]
    for each in known:
        of = scores[each.name]
        first = next(iter(of.values()))
        values = before.get(each.name, {}) | {
            name: None if found.statistic is None else round(found.statistic, 4) for name, found in of.items()
        }
        rows.append(asdict(Clean(each.name, each.family, first.classes, first.side, values)))
    return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n"


def corrected(name: str, found: dict[str, Score]) -> dict[str, float | None]:
    """The corrected p-value of each detector, the network itself left out of the clean ones."""
    first = next(iter(found.values()))
    statistics = {detector: score.statistic for detector, score in found.items()}
    ranked = rank(statistics, (first.classes, first.side), without=name)
    return {detector: ranked[detector].corrected if detector in ranked else None for detector in found}


def alarms(found: dict[str, Score], values: dict[str, float | None], level: float) -> set[str]:
    """The detectors that call the network suspicious at `level`: `scan`'s rule."""
    return {
        name for name, value in values.items() if value is not None and value <= level and found[name].outlier
    }


def table(known: Sequence[Known], scores: dict[str, dict[str, Score]], detectors: Sequence[str]) -> str:
    """Markdown: by detector, kind and truth, how many networks are flagged as published and by rank."""
    quick = [name for name in detectors if registry.DETECTORS[name].quick]
    ways: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in detectors]
    if len(quick) > 1:
        ways.append(("unasked: " + " and ".join(quick), tuple(quick)))
    if len(detectors) > 1:
        ways.append(("all of them", tuple(detectors)))
    lines = [
        f"| asked | kind | backdoor | networks | published threshold | corrected p <= {LEVEL} (95 %) "
        f"| <= {LEVEL_UNASKED} | not calibrated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kinds = dict.fromkeys(
        calibration.kind_said(s.classes, s.side) for of in scores.values() for s in of.values()
    )
    for said, names in ways:
        for kind in kinds:
            for backdoor in (False, True):
                rows = {
                    each.name: {name: scores[each.name][name] for name in names}
                    for each in known
                    if (each.target is not None) == backdoor and _kind(scores[each.name]) == kind
                }
                if rows:
                    cells = [said, kind, "yes" if backdoor else "no", *counted(rows)]
                    lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def counted(rows: Mapping[str, dict[str, Score]]) -> list[str]:
    """How many of the networks are flagged in each way, as cells."""
    values = {name: corrected(name, row) for name, row in rows.items()}
    published = sum(any(score.outlier for score in row.values()) for row in rows.values())
    at, rarely = (
        sum(bool(alarms(row, values[name], level)) for name, row in rows.items())
        for level in (LEVEL, LEVEL_UNASKED)
    )
    silent = sum(all(value is None for value in of.values()) for of in values.values())
    low, high = wilson(at, len(rows))
    spread = f"{100 * (low or 0):.0f} to {100 * (high or 0):.0f} %"
    return [str(len(rows)), str(published), f"{at} ({spread})", str(rarely), str(silent)]


def _kind(found: dict[str, Score]) -> str:
    first = next(iter(found.values()))
    return calibration.kind_said(first.classes, first.side)


def single(known: Known, found: dict[str, Score]) -> str:
    """A line of Markdown on one network: statistic and p-value alone, by detector."""
    cells = []
    for name, each in found.items():
        value = corrected(known.name, {name: each})[name]
        shown = "" if each.statistic is None else f"{each.statistic:.2f}"
        cells.append(f"{shown}{'*' if each.outlier else ''}" + ("" if value is None else f" (p {value:.3f})"))
    return f"| {known.name} | {'-' if known.target is None else known.target} | " + " | ".join(cells) + " |"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bdclean.bench calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, help="where `small-networks` put them")
    parser.add_argument("--scores", type=Path, help="where statistics are kept; default DIR/scores")
    parser.add_argument("--detectors", default=DETECTORS)
    parser.add_argument("--limit", type=int, default=128, help="images of each at most")
    parser.add_argument(
        "--ship", action="store_true", help="write the clean networks' numbers into the package"
    )
    parser.add_argument(
        "--network", nargs="+", action="append", default=[], metavar="WORD", help="FILE TARGET IMAGES [ARCH]"
    )
    options = parser.parse_args(arguments)
    detectors = options.detectors.split(",")
    folder = options.scores or options.work / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    known = [
        Known(
            row["name"], options.work / row["file"], options.work / f"{row['name']}-images", row["family"],
            row["target"], preprocess=f"{row['preprocess']},size=32/32",
        )
        for row in json.loads((options.work / "networks.json").read_text(encoding="utf-8"))
    ]  # fmt: skip
    others = [
        Known(Path(w[0]).stem, Path(w[0]), Path(w[2]), "", None if w[1] == "-" else int(w[1]), *w[3:4])
        for w in options.network
    ]
    scores = {}
    for each in [*known, *others]:
        scores[each.name] = asked(each, detectors, folder, options.limit)
    if options.ship:
        clean = [each for each in known if each.target is None]
        write_text(calibration.FILE, shipped(clean, scores))
        calibration.table.cache_clear()
    print(table(known, scores, detectors))
    told = [each for each in known if each.target is not None] + others
    print("\n| network | target | " + " | ".join(detectors) + " |\n" + "|---" * (2 + len(detectors)) + "|")
    for each in told:
        print(single(each, scores[each.name]))
    return 0
