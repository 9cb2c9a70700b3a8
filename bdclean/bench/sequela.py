"""What a cleansing leaves behind: whom a network tells on before and after, and how near its backdoor still is.

`python -m bdclean.bench sequela --data cifar10.tar.gz --work DIR --recipes inoculate,ft,sft`. Shadow networks are
trained on random halves of a pool of images. For each seed a network is trained with a backdoor on a half of its own,
beside a twin without one, and cleansed from images of the other half by the command line, which also scans each output.
Every network and every record is a file in DIR; what exists is not made again. One folder is for one set of images and
one way of training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bdclean import registry
from bdclean.bench import cifar10
from bdclean.bench.attacks import PREPROCESS, QUICKEST, UNTOLD
from bdclean.bench.cifar10 import (
    NETWORKS,
    Victim,
    bdclean,
    cell,
    finished,
    in_batches,
    linked,
    recipe_flags,
    save,
    unpack,
)
from bdclean.bench.encoders import attacks_of, flat, folders, heads, read_record
from bdclean.bench.sequela_rows import (
    LEFT,
    MEMBERS,
    NETWORK,
    SUSPECT_NAME,
    left_lines,
    member_lines,
    network_lines,
)
from bdclean.data.imageset import ImageSet
from bdclean.data.loading import load_images
from bdclean.errors import Refused
from bdclean.measuring.sequela import lira, membership
from bdclean.measuring.trial import make_predictor
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.progress import quiet
from bdclean.record.rates import Rate
from bdclean.record.run import RAN, RunRecord
from bdclean.training.run import seed_for
from bdclean.training.supervised import Supervised

SHADOWS, POOL, CLEANSING, TESTED = 16, 12_000, 1_000, 2_000
"""Of the pool 6,000 images are trained on and 1,000 cleanse: 5,000 are left, which the lowest rate needs."""
DRAWN = 0
"""The seed of what all seeds share: the pool, and the shadow networks."""
PARTS = "reactivation,retuning,reinjection"


@dataclass(frozen=True)
class People:
    """Indices into the pool: trained on as they are, used to cleanse, and neither, which has no poisoned one."""

    training: Tensor
    cleansing: Tensor
    others: Tensor


@dataclass(frozen=True)
class Bench:
    """What all cells have in common, and how each of them is made."""

    work: Path
    data: Path
    network: str
    method: Supervised
    attack: Any
    shadows: int
    images: int
    cleansing: int
    tested: int
    device: str

    @cached_property
    def pool(self) -> ImageSet:
        found = load_images(self._pool, (32, 32), labeled=True, tell=quiet)
        if len(found) < self.images:
            raise Refused(f"a pool of {self.images:,} images was asked for: there are {len(found):,}.")
        return found

    @property
    def _pool(self) -> Path:
        return folders(self.data, self.work, "train", self.images, DRAWN)

    def file(self, name: str, seed: int = DRAWN) -> Path:
        return self.work / f"{self.network}{f'-seed{seed}' if seed else ''}-{cell(name)}.safetensors"

    # --- networks ---------------------------------------------------------------------------------------------

    def trained(self, name: str, attack: Any | None, chosen: Tensor, seed: int) -> Path:
        """The network called `name`, trained on the `chosen` images of the pool, unless it is there."""
        out = self.file(name, seed)
        if not out.exists():
            build = partial(NETWORKS[self.network], len(self.pool.classes or ()))
            cifar10.train(
                Victim(name, attack), self.pool.select(chosen), build, self.method, seed, self.device, out
            )
        return out

    def drawn(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices into the pool: the half that a target network is trained on, images that cleanse, and the rest."""
        generator = torch.Generator().manual_seed(seed_for(seed, "half"))
        order = torch.randperm(self.images, generator=generator)
        half = self.images // 2
        return order[:half], order[half : half + self.cleansing], order[half + self.cleansing :]

    def people(self, seed: int) -> People:
        """Who is a member of what; the images that the attack stamped or relabeled are left out."""
        half, cleansing, others = self.drawn(seed)
        before = self.pool.select(half)
        after = self.attack(before)
        kept = (before.images == after.images).flatten(1).all(1) & (before.labels == after.labels)
        return People(half[kept], cleansing, others)

    def target(self, seed: int) -> Path:
        return self.trained(self.attack.name, self.attack, self.drawn(seed)[0], seed)

    def twin(self, seed: int) -> Path:
        return self.trained("twin", None, self.drawn(seed)[0], seed)

    def cleansed(self, seed: int, recipe: str) -> tuple[Path, RunRecord]:
        """What `recipe`, NAME[:KEY=VALUE[/KEY=VALUE...]], wrote, and the record of that run."""
        suspect = self.target(seed)
        out = suspect.with_name(f"{suspect.stem}-{cell(recipe)}.safetensors")
        if not finished(out.with_suffix(".json")):
            method = recipe.partition(":")[0]
            labeled = registry.load(registry.RECIPES, method).needs_labels
            given = self._given(seed)
            bdclean(
                "cleanse", str(suspect), "--data", str(given if labeled else flat(given)), "--test", str(self._test),
                *self._common(seed), *recipe_flags(recipe), *(() if method in UNTOLD else self._trigger),
                "--out", str(out), "--resume",
            )  # fmt: skip
        return out, read_record(out.with_suffix(".json"))

    def scanned(self, seed: int, output: Path, part: str) -> RunRecord:
        """The record of a scan of `output` that says what is left of the backdoor by one `part` of `--sequela`."""
        record = output.with_name(f"{output.stem}-{part}.json")
        if not finished(record):
            bdclean(
                "scan", str(output), "--data", str(self._test), *self._common(seed), *self._trigger,
                "--target", str(self.attack.target), "--detector", QUICKEST, "--reference", str(self.twin(seed)),
                "--sequela", part, "--record", str(record),
            )  # fmt: skip
        return read_record(record)

    def _given(self, seed: int) -> Path:
        """Links to the images that cleanse, one folder a class."""
        names = [self.pool.paths[k] for k in self.drawn(seed)[1].tolist()]
        return linked(
            self.work / f"cleansing-seed{seed}", lambda: {name: self._pool / name for name in names}
        )

    @property
    def _test(self) -> Path:
        return folders(self.data, self.work, "test", self.tested, DRAWN)

    @property
    def _trigger(self) -> tuple[str, str]:
        return "--trigger", self.attack.trigger.spec()

    def _common(self, seed: int) -> tuple[str, ...]:
        return "--limit", "0", "--seed", str(seed), "--device", self.device, "--no-pictures"

    # --- membership -------------------------------------------------------------------------------------------

    def margins(self, file: Path) -> Tensor:
        """How surely a network gives each image of the pool its class, float64 [n]; kept beside its file."""
        kept = file.with_name(f"{file.stem}.margins")
        if not kept.exists():
            network = NETWORKS[self.network](len(self.pool.classes or ()))
            network.load_state_dict(load_file(file))
            model = Classifier(network, parse_preprocess(PREPROCESS)).to(self.device).eval()
            ask = make_predictor(model, torch.device(self.device), None, self.pool.images)
            save(
                {"margins": membership.margins(ask.outputs(self.pool.images), self.pool.labels)},
                PREPROCESS,
                kept,
            )
        return load_file(kept)["margins"]

    @cached_property
    def shadow_margins(self) -> tuple[Tensor, Tensor]:
        """The margins of the shadow networks, and which of them were trained on which images: [shadows, pool]."""
        trained_on = lira.halves(self.shadows, self.images, DRAWN)
        made = []
        for k, chosen in enumerate(trained_on):
            made.append(self.margins(self.trained(f"shadow-{k}", None, chosen.nonzero().squeeze(1), DRAWN)))
        return torch.stack(made), trained_on

    def told(self, seed: int, file: Path) -> dict[str, list[Rate]]:
        """By group and way to tell it: AUC, and true-positive rates at RATES of `membership`."""
        asked, people = self.margins(file), self.people(seed)
        ways = {"loss": asked, "LiRA": lira.likelihood_ratios(asked, *self.shadow_margins)}
        return {
            f"{group} {way}": rates(scores[members], scores[people.others])
            for group, members in (("training", people.training), ("cleansing", people.cleansing))
            for way, scores in ways.items()
        }


def rates(members: Tensor, others: Tensor) -> list[Rate]:
    low = membership.low_rates(members, others)
    return [membership.area(members, others), *(each.true_positive_rate for each in low)]


def tables(bench: Bench, recipes: Sequence[str], parts: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    """Makes what is not there yet, and gives the lines of the three tables, the membership of all seeds at once."""
    made = {recipe: [bench.cleansed(seed, recipe) for seed in seeds] for recipe in recipes}
    records = {recipe: [record for _, record in of] for recipe, of in made.items()}
    refused = [(recipe, record) for recipe, of in records.items() for record in of if record.outcome != RAN]
    for recipe, record in refused:
        said = record.problem.message if record.problem is not None else record.verdict
        raise Refused(f"{recipe} made no output: {said}")
    files = {SUSPECT_NAME: [bench.target(seed) for seed in seeds]}
    files |= {recipe: [out for out, _ in of] for recipe, of in made.items()}
    told = {
        name: [bench.told(seed, file) for seed, file in zip(seeds, of, strict=True)]
        for name, of in files.items()
    }
    yield from [*heads(NETWORK), *network_lines(records, bench.attack.trigger.spec()), ""]
    yield from [*heads(MEMBERS), *member_lines(told, len(bench.drawn(seeds[0])[2])), ""]
    yield from heads(LEFT)
    for part in parts:
        for recipe, of in made.items():
            scans = [bench.scanned(seed, out, part) for seed, (out, _) in zip(seeds, of, strict=True)]
            yield from left_lines(recipe, scans, seeds)


def checked(attack: Any, shadows: int, images: int, cleansing: int, recipes: Sequence[str]) -> None:
    """Raises Refused where nothing could be measured."""
    if attack.kind != "poisoning" or getattr(attack, "victims", "all") != "all":
        raise Refused(
            f"{attack.name} as it was typed does not send stamped images of all classes to one: name badnets or blend."
        )
    if shadows < SHADOWS or shadows % 2:
        raise Refused(f"LiRA takes an even number of shadow networks, {SHADOWS} or more: not {shadows}.")
    if cleansing >= images - images // 2:
        raise Refused(
            f"{cleansing:,} images to cleanse with are all of the half of {images:,} that is not trained on: none is "
            "left to be a non-member."
        )
    if not recipes:
        raise Refused("name the --recipes whose outputs are measured.")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdclean.bench sequela", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="cifar10.tar.gz or gtsrb.tar.gz, or the folder it unpacks to"
    )
    parser.add_argument("--work", type=Path, required=True, help="where networks and records are kept")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet8")
    parser.add_argument("--no-mirroring", action="store_true", help="of training images: for road signs")
    parser.add_argument(
        "--no-augmentation",
        action="store_true",
        help="nor crops: what is seen as it is is learnt by heart sooner",
    )
    parser.add_argument("--epochs", type=float, default=8, help="of training every network")
    parser.add_argument(
        "--batch-size", type=int, default=128, help="of that: small ones make many steps of few images"
    )
    parser.add_argument(
        "--attack", default="badnets:size=4/pattern=white", help="one that poisons labels, with settings"
    )
    parser.add_argument("--shadows", type=int, default=SHADOWS, help=f"an even number, {SHADOWS} or more")
    parser.add_argument("--pool", type=int, default=POOL, help="images that halves are drawn from")
    parser.add_argument("--images", type=int, default=CLEANSING, help="how many images the recipes get")
    parser.add_argument("--test", type=int, default=TESTED, help="how many test images are measured on")
    parser.add_argument(
        "--recipes", default="inoculate,ft,sft", help="names, with settings if wanted: ft:epochs=5"
    )
    parser.add_argument(
        "--parts",
        default=PARTS,
        help="of --sequela that outputs are scanned with; re-injection takes longest",
    )
    parser.add_argument(
        "--seeds", default="0,1,2", help="each trains, cleanses and scans networks of its own"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    (attack,) = attacks_of(options.attack).values()
    recipes = list(filter(None, options.recipes.split(",")))
    checked(attack, options.shadows, options.pool, options.images, recipes)
    padding, mirrored = (0, False) if options.no_augmentation else (4, not options.no_mirroring)
    method = in_batches(options.batch_size, epochs=options.epochs, padding=padding, mirrored=mirrored)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        options.work, unpack(options.data, options.work), options.network, method, attack, options.shadows,
        options.pool, options.images, options.test, options.device,
    )  # fmt: skip
    parts = list(filter(None, options.parts.split(",")))
    print("\n".join(tables(bench, recipes, parts, [int(seed) for seed in options.seeds.split(",")])))
    return 0
