"""Every recipe on networks that are there: each cleansed from the same images, and measured on the same others.

`python -m bdclean.bench recipes --work DIR --network FILE TRIGGER IMAGES`. IMAGES are labeled; a third of them is
measured on, and every recipe gets the others, with labels where it needs them: its own, or with `--pseudo-labels` the
network's answers. Every output and every record is a file in DIR; what exists is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdclean import registry
from bdclean.bench.cifar10 import bdclean, cell, finished, recipe_flags
from bdclean.bench.encoders import heads, number, read_record
from bdclean.errors import Refused
from bdclean.record.run import RAN, Rate, RunRecord
from bdclean.report.ranking import same

DEFAULT_RECIPES = ",".join(name for name, entry in registry.RECIPES.items() if entry.path)
COLUMNS = (
    "network", "recipe", "labels", "clean accuracy before", "after", "attack success before", "after", "base rate",
    "robust accuracy", "DER", "balanced score", "seconds", "n: accuracy", "attack",
)  # fmt: skip


@dataclass(frozen=True)
class Victim:
    """A network, its own trigger as a SPEC, the images that recipes are given, and its name in the table."""

    file: Path
    trigger: str
    images: Path

    @property
    def name(self) -> str:
        return self.file.stem


@dataclass(frozen=True)
class Bench:
    work: Path
    pseudo_labels: bool
    seed: int

    def lines(self, victim: Victim, recipes: Sequence[str]) -> Iterator[str]:
        """Rows of the table, one for each recipe and each kind of labels that it takes."""
        for recipe in recipes:
            if not registry.load(registry.RECIPES, recipe.partition(":")[0]).needs_labels:
                yield line(victim, recipe, "none", self.record(victim, recipe, False))
                continue
            yield line(victim, recipe, "true", self.record(victim, recipe, False))
            if self.pseudo_labels:
                yield line(victim, recipe, "its answers", self.record(victim, recipe, True))

    def record(self, victim: Victim, recipe: str, answers: bool) -> RunRecord:
        """The record of cleansing `victim` by `recipe`, NAME[:KEY=VALUE[/KEY=VALUE...]]."""
        of = f"{cell(recipe)}{'-answers' if answers else ''}{f'-seed{self.seed}' if self.seed else ''}"
        out = self.work / f"{victim.name}-{of}.safetensors"
        record = out.with_suffix(".json")
        if not finished(record):
            bdclean(
                "cleanse", str(victim.file), "--data", str(victim.images), "--trigger", victim.trigger,
                *recipe_flags(recipe), *(("--pseudo-labels",) if answers else ()), "--seed", str(self.seed),
                "--no-pictures", "--out", str(out), "--record", str(record), "--resume",
            )  # fmt: skip
        return read_record(record)


def line(victim: Victim, recipe: str, labels: str, record: RunRecord) -> str:
    """A row of the table: shares in percent."""
    if record.outcome != RAN or record.before is None or not record.triggers:
        said = record.problem.message if record.problem is not None else record.verdict
        return f"| {victim.name} | {recipe} | {labels} | {said} |" + " |" * (len(COLUMNS) - 4)
    now, was = record.triggers[0], same(record.before.triggers, record.triggers[0])
    values = {measure.name: measure.value for measure in record.measures}
    accuracy = record.measure("clean_accuracy")
    first = next((each.value for each in record.before.measures if each.name == "clean_accuracy"), None)
    shares = [
        first, values.get("clean_accuracy"), _value(was.asr if was is not None else None), _value(now.asr),
        _value(now.base_rate), _value(now.robust_accuracy),
    ]  # fmt: skip
    cells = [number(None if share is None else 100 * share, 1) for share in shares]
    scores = [number(values.get(name), 2) for name in ("defence_effectiveness_rating", "balanced_score")]
    counts = [str(accuracy.n) if accuracy is not None else "", str(now.asr.n)]
    row = [victim.name, recipe, labels, *cells, *scores, number(record.seconds, 0), *counts]
    return f"| {' | '.join(row)} |"


def _value(of: Rate | None) -> float | None:
    return of.value if of is not None else None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdclean.bench recipes", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where outputs and records are kept")
    parser.add_argument(
        "--network", nargs=3, action="append", required=True, metavar=("FILE", "TRIGGER", "IMAGES"),
        help="a network, the SPEC of its own trigger, and labeled images",
    )  # fmt: skip
    parser.add_argument(
        "--recipes", default=DEFAULT_RECIPES, help="names, with settings if wanted: sau:epochs=10"
    )
    parser.add_argument(
        "--pseudo-labels",
        action="store_true",
        help="recipes that need labels also by the network's own answers",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    victims = [Victim(Path(file), trigger, Path(images)) for file, trigger, images in options.network]
    for missing in (path for victim in victims for path in (victim.file, victim.images) if not path.exists()):
        raise Refused(f"there is no {missing}.")
    bench = Bench(options.work, options.pseudo_labels, options.seed)
    recipes = list(filter(None, options.recipes.split(",")))
    lines = heads(COLUMNS)
    for victim in victims:
        lines += bench.lines(victim, recipes)
    print("\n".join(lines))
    return 0
