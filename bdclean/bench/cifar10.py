"""The whole chain on CIFAR-10: train victims, scan them, cleanse them with every recipe, scan again.

`python -m bdclean.bench cifar10 --data cifar10.tar.gz --work DIR`. Every cell is one file in DIR; cells that exist are
not made again. Scanning and cleansing run through the installed command line, so a figure is what a user gets.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bdclean.attacks.badnets import BadNets
from bdclean.attacks.blend import Blend
from bdclean.data.imageset import ImageSet
from bdclean.data.loading import load_images
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.preact import PreActNetwork
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.progress import quiet
from bdclean.record.run import RAN, Measure, Rate, RunRecord, TriggerRow
from bdclean.training.run import Precision, Run, seed_for
from bdclean.training.supervised import Supervised

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": partial(ResidualNetwork, (1, 1, 1), (8, 16, 32), 8),
    "resnet20": partial(ResidualNetwork, (3, 3, 3), (16, 32, 64), 16),
    "resnet18": partial(ResidualNetwork, (2, 2, 2, 2), (64, 128, 256, 512), 64),
    "wideresnet16": partial(PreActNetwork, (2, 2, 2), (16, 32, 64), 16),
}
"""By the number of classes."""


@dataclass(frozen=True)
class Victim:
    name: str
    attack: BadNets | Blend | None


VICTIMS = (
    Victim("clean", None),
    Victim("badnets", BadNets(target=0, rate=0.1)),
    Victim("blend", Blend(target=0, rate=0.1, alpha=0.2)),
    Victim("white", BadNets(target=2, rate=0.1, size=4, pattern="white")),
    Victim("picture", Blend(target=4, rate=0.1, picture="picture", alpha=0.15)),
)
DEFAULT_VICTIMS = "clean,badnets,blend"
RECIPES = ("inoculate", "bcu", "ft", "sft")
UNLABELED = 2_500


def unpack(archive: Path, work: Path) -> Path:
    """The folder with `train/<class>/` and `test/<class>/`; an archive is unpacked into `work` once."""
    if archive.is_dir():
        return archive
    folder = work / "cifar10"
    if not (folder / "test").is_dir():
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    return folder


def in_batches(size: int, **settings: Any) -> Supervised:
    """How victims are trained: in smaller batches than the usual at a smaller rate, in proportion."""
    usual = Supervised()
    return Supervised(batch_size=size, peak=usual.peak * size / usual.batch_size, **settings)


def train(
    victim: Victim,
    training: ImageSet,
    build: Callable[[], nn.Module],
    method: Supervised,
    seed: int,
    device: str,
    out: Path,
) -> None:
    """Train one victim and write it as safetensors with its preprocessing in the metadata."""
    torch.manual_seed(seed_for(seed, victim.name))
    network = build()
    preprocess = parse_preprocess("cifar10")
    model = Classifier(network, preprocess)
    images = victim.attack(training) if victim.attack is not None else training
    started = time.monotonic()

    def tell(stage: str, done: int, total: int, **measures: float) -> None:
        if done % (total // 20 or 1) == 0:
            print(
                f"{victim.name}: {done}/{total} {measures} {time.monotonic() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    run = Run(torch.device(device), Precision(bf16=True, channels_last=True), seed, tell)
    method(model, images, run, stage=f"train {victim.name}")
    save(network.state_dict(), "cifar10", out)


def save(tensors: Mapping[str, Tensor], preprocess: str, out: Path) -> None:
    """Write a network as safetensors with its normalisation in the metadata; it is there whole or not at all."""
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    unfinished = out.with_suffix(".part")
    save_file(kept, unfinished, {"bdclean.preprocess": preprocess})
    unfinished.replace(out)


def bdclean(*arguments: str) -> int:
    """Run the command line; its report is thrown away, its record is kept. Returns the exit code."""
    print("$ bdclean " + " ".join(arguments), file=sys.stderr, flush=True)
    return subprocess.run(
        [sys.executable, "-m", "bdclean", *arguments, "--format", "json"],
        stdout=subprocess.DEVNULL,
        check=False,
    ).returncode


def recipe_flags(recipe: str) -> tuple[str, ...]:
    """The flags of cleanse for a recipe as it is typed for a bench: NAME[:KEY=VALUE[/KEY=VALUE...]]."""
    name, _, settings = recipe.partition(":")
    pairs = filter(None, settings.split("/"))
    return "--recipe", name, *(part for pair in pairs for part in ("--set", pair))


def drawn(source: Path, count: int, seed: int, last: bool = False) -> list[Path]:
    """A seeded draw of `count` files of the class folders of `source`.

    `last`: those at the end of the same order, so that two draws have no file in common.
    """
    files = sorted(source.glob("*/*"))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    return [files[index] for index in (order[-count:] if last else order[:count])]


def linked(folder: Path, links: Callable[[], Mapping[str, Path]]) -> Path:
    """A folder of `links`, relative name -> file; it is there whole or not at all, and not made twice."""
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.part")
        for name, file in links().items():
            place = unfinished / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.is_symlink():  # of a run that was killed
                place.symlink_to(file.resolve())
        unfinished.replace(folder)
    return folder


def share(source: Path, folder: Path, count: int, seed: int) -> Path:
    """A flat folder of links to a seeded draw of `count` images of `source`: unlabeled, nothing in the names."""
    return linked(
        folder, lambda: {f"{n:05d}{file.suffix}": file for n, file in enumerate(drawn(source, count, seed))}
    )


def labeled_share(source: Path, folder: Path, count: int, seed: int) -> Path:
    """The same draw as `share`, in one folder a class, for recipes that need labels."""

    def links() -> dict[str, Path]:
        files = drawn(source, count, seed)
        return {f"{file.parent.name}/{n:05d}{file.suffix}": file for n, file in enumerate(files)}

    return linked(folder, links)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdclean.bench cifar10", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="cifar10.tar.gz, or the folder it unpacks to"
    )
    parser.add_argument("--work", type=Path, required=True, help="where cells are kept")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet20")
    parser.add_argument("--epochs", type=float, default=14)
    parser.add_argument("--images", type=int, default=UNLABELED, help="how many images the recipes get")
    parser.add_argument("--victims", default=DEFAULT_VICTIMS, help=",".join(v.name for v in VICTIMS))
    parser.add_argument(
        "--recipes",
        default=",".join(RECIPES),
        help="names, each with settings if wanted: inoculate:leave_out=patch/noise",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--train-only", action="store_true")
    options = parser.parse_args(arguments)
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    data = unpack(options.data, work)
    build = partial(NETWORKS[options.network], 10)
    training = None
    wanted = [victim for victim in VICTIMS if victim.name in options.victims.split(",")]
    for victim in wanted:
        file = work / f"{options.network}-{victim.name}.safetensors"
        if not file.exists():
            training = training or load_images(data / "train", (32, 32), labeled=True, tell=quiet)
            method = Supervised(options.epochs)
            train(victim, training, build, method, options.seed, options.device, file)
    if options.train_only:
        return 0
    unlabeled = share(data / "train", work / "unlabeled", options.images, options.seed)
    labeled = labeled_share(data / "train", work / "labeled", options.images, options.seed)
    common = ("--seed", str(options.seed), "--device", options.device)
    test = str(data / "test")
    for victim in wanted:
        name = f"{options.network}-{victim.name}"
        file, record = work / f"{name}.safetensors", work / f"{name}-scan.json"
        if not finished(record):
            bdclean("scan", str(file), "--data", test, *common, "--record", str(record))
        for recipe in options.recipes.split(","):
            out = work / f"{name}-{cell(recipe)}.safetensors"
            if not finished(out.with_suffix(".json")):
                recipe_name, _, setting = recipe.partition(":")
                images = labeled if recipe_name in ("ft", "sft") else unlabeled
                # the default is shown against the whole bank, the others against the victim's own trigger
                own = victim.attack is not None and recipe != "inoculate"
                triggers = (
                    ("--trigger", victim.attack.trigger.spec()) if victim.attack is not None and own else ()
                )
                bdclean(
                    "cleanse", str(file), "--data", str(images), "--test", test, *common, "--recipe", recipe_name,
                    *(("--set", setting) if setting else ()), *triggers, "--out", str(out), "--resume",
                )  # fmt: skip
    print(table([victim.name for victim in wanted], options.recipes.split(","), work, options.network))
    return 0


def cell(recipe: str) -> str:
    """A recipe with its settings as a part of a file's name."""
    return re.sub(r"[^a-z0-9_.]+", "-", recipe)


def finished(record: Path) -> bool:
    """Whether a cell is there: a record of a run that was neither refused nor interrupted."""
    return record.exists() and RunRecord.from_json(json.loads(record.read_text())).outcome == RAN


def table(victims: Sequence[str], recipes: Sequence[str], work: Path, network: str) -> str:
    """Markdown: what scan said of each victim, and each recipe's clean accuracy and attack success, before and after.

    ASR and base rate are those of the trigger that the victim was poisoned with (for a clean one, of the row with the
    largest excess after cleansing), in percent.
    """
    lines = [
        "| victim | recipe | verdict | clean accuracy | change (95 %) "
        "| attack success | base rate | excess | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in victims:
        scan = work / f"{network}-{name}-scan.json"
        if scan.exists():
            record = RunRecord.from_json(json.loads(scan.read_text()))
            row = _row_of(record.triggers, name)
            accuracy = record.measure("clean_accuracy")
            lines.append(
                f"| {name} | (scan) | {record.verdict} | {_percent(accuracy)} | | {_percent(row.asr)} "
                f"| {_percent(row.base_rate)} | | {record.seconds:.0f} |"
            )
        for recipe in recipes:
            path = work / f"{network}-{name}-{cell(recipe)}.json"
            if not path.exists():
                continue
            record = RunRecord.from_json(json.loads(path.read_text()))
            if record.after is None:
                lines.append(f"| {name} | {recipe} | {record.outcome} | | | | | | |")
                continue
            row, change = _row_of(record.after.triggers, name), record.measure("clean_accuracy_change")
            excess = (
                ""
                if row.base_rate is None
                else f"{100 * ((row.asr.value or 0) - (row.base_rate.value or 0)):+.1f}"
            )
            spread = "" if change is None or change.value is None or change.low is None or change.high is None else (
                f"{100 * change.value:+.2f} ({100 * change.low:+.2f} to {100 * change.high:+.2f})"
            )  # fmt: skip
            lines.append(
                f"| {name} | {recipe} | {record.verdict} | {_percent(record.measure('clean_accuracy'))} | {spread} "
                f"| {_percent(row.asr)} | {_percent(row.base_rate)} | {excess} | {record.seconds:.0f} |"
            )
    return "\n".join(lines)


def _row_of(rows: Sequence[TriggerRow], victim: str) -> TriggerRow:
    """The row of the trigger that `victim` was poisoned with, else that of the largest excess over its base rate."""
    attack = next(v.attack for v in VICTIMS if v.name == victim)
    own = [row for row in rows if attack is not None and row.trigger == attack.trigger.spec()]
    return (
        own[0]
        if own
        else max(
            rows, key=lambda row: (row.asr.value or 0) - (row.base_rate.value or 0 if row.base_rate else 0)
        )
    )


def _percent(rate: Rate | Measure | None) -> str:
    return "" if rate is None or rate.value is None else f"{100 * rate.value:.2f} (n {rate.n})"
