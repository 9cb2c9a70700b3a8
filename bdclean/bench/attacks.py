"""Classifiers under the attacks of the field: train victims, measure with their own triggers, cleanse, measure again.

`python -m bdclean.bench attacks --data cifar10.tar.gz --work DIR --recipes inoculate,ft`. Every victim and every record
is a file in DIR; what exists is not made again. Measured by the command line. One folder is for one set of images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file

from bdclean.bench.cifar10 import NETWORKS, bdclean, cell, finished, in_batches, recipe_flags, save, unpack
from bdclean.bench.encoders import (
    Images,
    accuracy_of,
    attacks_of,
    flat,
    folders,
    heads,
    number,
    placed,
    read_record,
    scores,
    telling,
)
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.record.run import RAN, Rate, RunRecord, TriggerRow
from bdclean.training.run import Precision, Run, seed_for
from bdclean.training.supervised import Supervised

DEFAULT_ATTACKS = "badnets,blend,sig,lc,lf,wanet,bpp,trojan,ssba,inputaware,adaptive-blend"
TESTED, UNLABELED = 2_000, 2_500
LABELED = ("ft", "sft")
"""Recipes whose images are labeled."""
UNTOLD = ("auto",)
"""Recipes that are not shown the attack's trigger, which they might unlearn."""
PREPROCESS = "cifar10"
QUICKEST = "stripes"
"""The detector that scans run here, which are for the trigger alone: without a name all quick ones would."""


@dataclass(frozen=True)
class Bench:
    """What all cells have in common, and how each of them is made."""

    work: Path
    images: Images
    network: str
    mirrored: bool
    epochs: float
    batch_size: int
    training: int
    unlabeled: int
    seed: int
    device: torch.device

    def file(self, name: str) -> Path:
        seed = f"-seed{self.seed}" if self.seed else ""
        return self.work / f"{self.network}{seed}-{cell(name)}.safetensors"

    def fresh(self, name: str) -> Classifier:
        """A network with random weights that depend on the seed and on `name`."""
        classes = len(list((self.images.folder / "train").iterdir()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.seed, name))
            return Classifier(NETWORKS[self.network](classes), parse_preprocess(PREPROCESS))

    def make(self, name: str, attack: Any | None) -> None:
        """The victim called `name`, unless it is there: clean without `attack`."""
        if self.file(name).exists():
            return
        training = self.images.draw("train", self.training, "pre-training")
        run = Run(self.device, Precision(bf16=True, channels_last=True), self.seed, telling(name))
        model, method = self.fresh(name), self.method
        if attack is not None and attack.kind == "training":
            attack(model, training, run, method, f"train {name}")
        else:
            poisoned = training if attack is None else self.poisoned(name, attack, training, run)
            method(model, poisoned, run, f"train {name}")
        save(model.network.state_dict(), PREPROCESS, self.file(name))

    @property
    def method(self) -> Supervised:
        """How victims are trained."""
        return in_batches(self.batch_size, epochs=self.epochs, mirrored=self.mirrored)

    def poisoned(self, name: str, attack: Any, training: ImageSet, run: Run) -> ImageSet:
        if attack.kind == "surrogate":
            self.make("clean", None)
            surrogate = self.fresh("clean")
            surrogate.network.load_state_dict(load_file(self.file("clean")))
            return cast("ImageSet", attack(surrogate, training, run, f"poison {name}"))
        if attack.kind not in ("poisoning", "clean-label"):
            raise Refused(f"{attack.name} is no attack on a classifier: use bench encoders.")
        if hasattr(attack, "learn"):
            attack.learn(training, run, f"learn {name}")
        return cast("ImageSet", attack(training))

    def scanned(self, file: Path, attack: Any) -> RunRecord:
        """The record of a scan of `file` with the attack's trigger and target."""
        record = self.work / f"{file.stem}-by-{cell(attack.name)}.json"
        if not finished(record):
            bdclean(
                "scan", str(file), *self._common(), *_trigger(attack), "--target", _target(attack),
                "--data", str(self._test), "--detector", QUICKEST, "--record", str(record),
            )  # fmt: skip
        return read_record(record)

    def cleansed(self, name: str, attack: Any, recipe: str) -> tuple[Path, RunRecord]:
        """What `recipe`, NAME[:KEY=VALUE[/KEY=VALUE...]], wrote, and the record of that run."""
        share = "" if self.unlabeled == UNLABELED else f"-{self.unlabeled}"
        out = self.work / f"{self.file(name).stem}-{cell(recipe)}{share}.safetensors"
        if not finished(out.with_suffix(".json")):
            method = recipe.partition(":")[0]
            given = folders(self.images.folder, self.work, "train", self.unlabeled, self.seed)
            bdclean(
                "cleanse", str(self.file(name)), *self._common(), "--data",
                str(given if method in LABELED else flat(given)), "--test", str(self._test),
                *recipe_flags(recipe),
                *(() if method in UNTOLD else _trigger(attack)), "--out", str(out), "--resume",
            )  # fmt: skip
        return out, read_record(out.with_suffix(".json"))

    def lines(self, name: str, attack: Any, recipes: Sequence[str]) -> Iterator[str]:
        """Rows of the table: a network as it is, then cleansed by each recipe."""
        before = self.scanned(self.file(name), attack)
        yield line(name, attack, "none", before)
        for recipe in recipes:
            out, made = self.cleansed(name, attack, recipe)
            after = self.scanned(out, attack) if made.outcome == RAN else made
            yield line(name, attack, recipe, after, before, made.seconds)

    @property
    def _test(self) -> Path:
        return folders(self.images.folder, self.work, "test", TESTED, self.seed)

    def _common(self) -> tuple[str, ...]:
        return "--limit", "0", "--seed", str(self.seed), "--device", str(self.device), "--no-pictures"


def _trigger(attack: Any) -> tuple[str, str]:
    return "--trigger", attack.trigger.spec()


def _target(attack: Any) -> str:
    return "next" if _victims(attack) == "next" else str(attack.target)


def _victims(attack: Any) -> str:
    return str(getattr(attack, "victims", "all"))


COLUMNS = (
    "victim", "recipe", "verdict", "clean accuracy", "attack success", "base rate", "robust accuracy", "DER",
    "balanced score", "seconds", "n",
)  # fmt: skip


def line(
    name: str, attack: Any, recipe: str, record: RunRecord, before: RunRecord | None = None,
    seconds: float | None = None,
) -> str:  # fmt: skip
    """A row of the table: shares in percent. `before`: the scan of what was cleansed."""
    if record.outcome != RAN or not record.triggers:
        said = record.problem.message if record.problem is not None else record.verdict
        return f"| {name} | {recipe} | {said} |" + " |" * (len(COLUMNS) - 3)
    row = record.triggers[0]
    shares = [accuracy_of(record), success(row, attack), _value(row.base_rate), _value(row.robust_accuracy)]
    cells = [
        *(number(share if share is None else 100 * share, 1) for share in shares),
        *scores(before, record),
    ]
    return (
        f"| {name} | {recipe} | {record.verdict} | {' | '.join(cells)} | {number(seconds, 0)} | {row.asr.n} |"
    )


def success(row: TriggerRow, attack: Any) -> float | None:
    """Attack success as a share: of all other classes, or of the one class that the attack is on."""
    victims, worst = _victims(attack), row.worst_source
    if victims.isdigit() and worst is not None and worst["class"] == int(victims):
        return worst["value"]
    return row.asr.value


def _value(of: Rate | None) -> float | None:
    return of.value if of is not None else None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdclean.bench attacks", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="cifar10.tar.gz or gtsrb.tar.gz, or the folder it unpacks to"
    )
    parser.add_argument("--work", type=Path, required=True, help="where cells are kept")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet20")
    parser.add_argument("--no-mirroring", action="store_true", help="of training images: for road signs")
    parser.add_argument("--epochs", type=float, default=14, help="of training a victim")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=128,
        help="of training a victim: small ones make many steps of few images",
    )
    parser.add_argument("--images", type=int, default=50_000, help="how many images victims are trained on")
    parser.add_argument(
        "--attacks", default=DEFAULT_ATTACKS, help="names, with settings if wanted: wanet:target=2/strength=1"
    )
    parser.add_argument(
        "--recipes", default="", help="names, with settings if wanted: inoculate:leave_out=patch"
    )
    parser.add_argument("--unlabeled", type=int, default=UNLABELED, help="how many images the recipes get")
    parser.add_argument("--clean", action="store_true", help="measure and cleanse a clean network, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    attacks = attacks_of(options.attacks)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        options.work, Images(unpack(options.data, options.work), options.seed), options.network,
        not options.no_mirroring, options.epochs, options.batch_size, options.images, options.unlabeled, options.seed,
        torch.device(options.device),
    )  # fmt: skip
    recipes = list(filter(None, options.recipes.split(",")))
    cells = [(name, placed(attack, bench.file(name))) for name, attack in attacks.items()]
    lines = heads(COLUMNS)
    for name, attack in cells:
        bench.make(name, attack)
        lines += bench.lines(name, attack, recipes)
    if options.clean:
        bench.make("clean", None)
        lines += bench.lines("clean", cells[0][1], recipes)
    print("\n".join(lines))
    return 0
