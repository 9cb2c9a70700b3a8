"""Encoders on CIFAR-10: pre-train a clean one, attack it or its images, scan each, and cleanse it by each recipe.

`python -m bdclean.bench encoders --data cifar10.tar.gz --work DIR --recipes auto`. Every encoder and every record is a
file in DIR; what exists is not made again. ResNets are written under BadEncoder's own names, projector and all, and
measured by the command line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bdclean import registry
from bdclean.bench.cifar10 import bdclean, cell, drawn, finished, linked, recipe_flags, save, unpack
from bdclean.data.imageset import ImageSet
from bdclean.data.loading import load_images
from bdclean.errors import Refused
from bdclean.measuring import metrics
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.preact import PreActNetwork
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.progress import Tell, quiet
from bdclean.record.run import RAN, RunRecord
from bdclean.training.pretraining.byol import BYOL
from bdclean.training.pretraining.moco import MoCo
from bdclean.training.pretraining.simclr import SimCLR
from bdclean.training.run import Precision, Run, seed_for

METHODS: dict[str, Callable[..., Any]] = {"simclr": SimCLR, "moco": MoCo, "byol": BYOL}
DEFAULT_ATTACKS = "badencoder:target=9,ctrl:target=9,ssl-backdoor:target=9"
WIDTHS = (16, 32, 64, 128)
"""A quarter of ResNet-18's: 0.7 million parameters, 128 features, some minutes an epoch on one core."""
NETWORKS = {
    "resnet10": (ResidualNetwork, (1, 1, 1, 1)),
    "resnet18": (ResidualNetwork, (2, 2, 2, 2)),
    "resnet34": (ResidualNetwork, (3, 4, 6, 3)),
    "preact18": (PreActNetwork, (2, 2, 2, 2)),
}
"""The family, and the blocks of each stage."""

LAYERS = {"conv1": "0", "bn1": "1", "layer1": "3", "layer2": "4", "layer3": "5", "layer4": "6"}
"""Where BadEncoder's files keep a ResNet's parts, under `f.f.`: its encoder is a list of them, ReLU the third."""
BACKBONE = "backbone."

DRAWS = ("pre-training", "shadow", "references", "probe", "test")
"""What images are drawn for, each with a seed of its own."""
SHADOW, TARGET_POOL = 10_000, 1_000
PROBED, TESTED, UNLABELED = 5_000, 2_000, 2_500
ADAPTING = ("ft", "sft")
"""Recipes that put a head on the encoder, and whose images are labeled."""


@dataclass(frozen=True)
class Images:
    """CIFAR-10, from which every share is a seeded draw of its own."""

    folder: Path
    seed: int

    @cached_property
    def train(self) -> ImageSet:
        return load_images(self.folder / "train", (32, 32), labeled=True, tell=quiet)

    @cached_property
    def test(self) -> ImageSet:
        return load_images(self.folder / "test", (32, 32), labeled=True, tell=quiet)

    def draw(self, split: str, count: int, purpose: str) -> ImageSet:
        """`count` images of a split, or all there are, for one of DRAWS."""
        images = self.train if split == "train" else self.test
        generator = torch.Generator().manual_seed(self.seed * len(DRAWS) + DRAWS.index(purpose))
        return images.select(torch.randperm(len(images), generator=generator)[:count])


def small_encoder(seed: int, network: str = "resnet18") -> Classifier:
    """The encoder, with random weights, that the clean one and all others start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "clean"))
        family, blocks = NETWORKS[network]
        made = family(blocks, WIDTHS, WIDTHS[0], 10)
    made.fc = nn.Identity()
    return Classifier(made, parse_preprocess("cifar10"))


def write(encoder: Classifier, projector: Mapping[str, Tensor], out: Path) -> None:
    """Write an encoder and its projector (`g.`) as safetensors: a ResNet under BadEncoder's names, `f.f.<i>.`.

    One of another family, which those have no names for, is under its own behind `backbone.`.
    """
    tensors = {f"g.{name}": tensor for name, tensor in projector.items()}
    listed = isinstance(encoder.network, ResidualNetwork)
    for name, tensor in encoder.network.state_dict().items():
        part, _, rest = name.partition(".")
        tensors[f"f.f.{LAYERS[part]}.{rest}" if listed else f"{BACKBONE}{name}"] = tensor
    save(tensors, "cifar10", out)


def read(file: Path, network: str = "resnet18") -> tuple[Classifier, dict[str, Tensor]]:
    """What `write` wrote: the encoder, in evaluation mode, and the projector's tensors."""
    parts = {number: part for part, number in LAYERS.items()}
    encoder, inside, projector = small_encoder(0, network), {}, {}
    for name, tensor in load_file(file).items():
        if name.startswith("g."):
            projector[name.removeprefix("g.")] = tensor
        elif name.startswith(BACKBONE):
            inside[name.removeprefix(BACKBONE)] = tensor
        else:
            number, _, rest = name.removeprefix("f.f.").partition(".")
            inside[f"{parts[number]}.{rest}"] = tensor
    encoder.network.load_state_dict(inside)
    return encoder.eval(), projector


def telling(name: str) -> Tell:
    """Says on standard error how far a cell is, twenty times."""
    started = time.monotonic()

    def tell(stage: str, done: int, total: int, **measures: float) -> None:
        if done % (total // 20 or 1) == 0:
            figures = ", ".join(f"{key} {value:.4g}" for key, value in measures.items())
            seconds = time.monotonic() - started
            print(f"{name}: {done}/{total} {figures}, {seconds:.0f} s", file=sys.stderr, flush=True)

    return tell


def folders(source: Path, work: Path, split: str, count: int, seed: int, last: bool = False) -> Path:
    """A folder of links to a seeded draw of `count` images of a split, one folder a class; `last`: see `drawn`."""

    def links() -> dict[str, Path]:
        return {f"{file.parent.name}/{file.name}": file for file in drawn(source / split, count, seed, last)}

    return linked(work / f"{split}-{count}{'-last' if last else ''}-seed{seed}", links)


def flat(source: Path) -> Path:
    """Links to the images of class folders side by side: unlabeled, nothing in the names."""

    def links() -> dict[str, Path]:
        # By the files' own names, which say nothing of a class: by folders the order would.
        files = sorted(source.glob("*/*"), key=lambda path: path.name)
        return {f"{number:05d}{file.suffix}": file for number, file in enumerate(files)}

    return linked(source.with_name(f"{source.name}-unlabeled"), links)


@dataclass(frozen=True)
class Bench:
    """What all cells have in common, and how each of them is made. One folder is for one pre-training."""

    work: Path
    images: Images
    method: str
    network: str
    epochs: float
    pretraining: int
    unlabeled: int
    seed: int
    device: torch.device
    start: str = "random"
    """What poisoned encoders are pre-trained from: "random" weights, or the "clean" encoder."""

    def file(self, name: str) -> Path:
        network = "" if self.network == "resnet18" else f"-{self.network}"
        seed = f"-seed{self.seed}" if self.seed else ""
        return self.work / f"{self.method}{network}{seed}-{cell(name)}.safetensors"

    def run(self, name: str) -> Run:
        return Run(self.device, Precision(bf16=True, channels_last=True), self.seed, telling(name))

    def pretrain(self, name: str, training: ImageSet) -> None:
        """Pre-train an encoder on `training`."""
        go_on = self.start == "clean" and name != "clean"
        encoder = (
            read(self.file("clean"), self.network)[0] if go_on else small_encoder(self.seed, self.network)
        )
        found = METHODS[self.method](epochs=self.epochs)(
            encoder, training, self.run(name), f"pretrain {name}"
        )
        write(encoder, found.projector.state_dict(), self.file(name))

    def make(self, name: str, attack: Any | None) -> None:
        """The encoder called `name`, unless it is there: clean without `attack`."""
        if self.file(name).exists():
            return
        if attack is None or attack.kind == "pre-training":
            training = self.images.draw("train", self.pretraining, "pre-training")
            if attack is not None and hasattr(attack, "learn"):
                attack.learn(read(self.file("clean"), self.network)[0], training, self.run(f"learn {name}"))
            self.pretrain(name, training if attack is None else attack(training))
            return
        if attack.kind != "encoder":
            raise Refused(f"{attack.name} poisons labels, which no encoder is trained on.")
        clean, projector = read(self.file("clean"), self.network)
        pool = self.images.draw("train", TARGET_POOL, "references")
        assert pool.labels is not None
        poisoned, _ = attack(
            clean, self.images.draw("train", SHADOW, "shadow").unlabeled(),
            pool.images[pool.labels == attack.target], self.run(name),
        )  # fmt: skip
        write(poisoned, projector, self.file(name))

    def scanned(self, file: Path, attack: Any, encoder: bool = True) -> RunRecord:
        """The record of a scan of `file` with the attack's trigger and target, an encoder's beside the clean one."""
        trigger = attack.trigger.spec().replace(f"{self.work}/", "")
        record = self.work / f"{file.stem}-by-{cell(trigger)}.json"
        if not finished(record):
            beside = (*self._probing, "--reference", str(self.file("clean"))) if encoder else ()
            bdclean(
                "scan", str(file), *self._common(attack), "--data", str(self._test), "--target", str(attack.target),
                *beside, "--record", str(record),
            )  # fmt: skip
        return read_record(record)

    def cleansed(self, name: str, attack: Any, recipe: str) -> tuple[Path, RunRecord]:
        """What `recipe`, NAME[:KEY=VALUE[/KEY=VALUE...]], wrote, and the record of that run."""
        share = "" if self.unlabeled == UNLABELED else f"-{self.unlabeled}"
        out = self.work / f"{self.file(name).stem}-{cell(recipe)}{share}.safetensors"
        if not finished(out.with_suffix(".json")):
            method = recipe.partition(":")[0]
            given = folders(self.images.folder, self.work, "train", self.unlabeled, self.seed)
            data = given if method in ADAPTING else flat(given)
            bdclean(
                "cleanse", str(self.file(name)), *self._common(attack), *self._probing,
                "--data", str(data), "--test", str(self._test), *recipe_flags(recipe),
                *(("--head", "new") if method in ADAPTING else ()), "--out", str(out), "--resume",
            )  # fmt: skip
        return out, read_record(out.with_suffix(".json"))

    def lines(self, name: str, attack: Any, recipes: Sequence[str]) -> Iterator[str]:
        """Rows of the table: an encoder as it is, then cleansed by each recipe."""
        before = self.scanned(self.file(name), attack)
        yield line(name, "none", before)
        for recipe in recipes:
            out, made = self.cleansed(name, attack, recipe)
            adapted = recipe.partition(":")[0] in ADAPTING
            after = self.scanned(out, attack, not adapted) if made.outcome == RAN else made
            yield line(name, recipe, after, before, made.seconds)

    @property
    def _test(self) -> Path:
        return folders(self.images.folder, self.work, "test", TESTED, self.seed)

    @property
    def _probing(self) -> tuple[str, str]:
        """What an encoder's probes are trained on; a classifier has none."""
        return "--labeled", str(folders(self.images.folder, self.work, "train", PROBED, self.seed, last=True))

    def _common(self, attack: Any) -> tuple[str, ...]:
        return (
            "--limit", "0", "--trigger", attack.trigger.spec(), "--seed", str(self.seed),
            "--device", str(self.device), "--no-pictures",
        )  # fmt: skip


def read_record(record: Path) -> RunRecord:
    """What the command wrote; raises Refused where it wrote nothing."""
    if not record.exists():
        raise Refused(f"the command wrote no {record}: what it said is above.")
    return RunRecord.from_json(json.loads(record.read_text()))


COLUMNS = (
    "encoder", "recipe", "probe accuracy", "attack success: linear probe", "MLP", "kNN", "linear probe, clean encoder",
    "base rate", "DER", "balanced score", "seconds", "n",
)  # fmt: skip


def line(
    name: str, recipe: str, record: RunRecord, before: RunRecord | None = None, seconds: float | None = None
) -> str:
    """A row of the table: shares in percent, of the MLP's seeds the median. `before`: the scan of what was cleansed."""
    if record.outcome != RAN or not record.triggers:
        said = record.problem.message if record.problem is not None else record.verdict
        return f"| {name} | {recipe} | {said} |" + " |" * (len(COLUMNS) - 3)
    row = record.triggers[0]
    heads = [rate.value or 0.0 for probe, rate in row.probes.items() if probe.startswith("mlp/")]
    middle = statistics.median(heads) if heads else None
    shares = [accuracy_of(record), row.asr.value, middle]
    shares += [
        of.value if of is not None else None
        for of in (row.probes.get("knn"), row.reference_rate, row.base_rate)
    ]
    cells = [*(number(share and 100 * share, 1) for share in shares), *scores(before, record)]
    return f"| {name} | {recipe} | {' | '.join(cells)} | {number(seconds, 0)} | {row.asr.n} |"


def scores(before: RunRecord | None, after: RunRecord) -> tuple[str, str]:
    """DER and balanced score by the linear probe; empty where there was no backdoor before."""
    if before is None or not before.triggers:
        return "", ""
    old, new = before.triggers[0], after.triggers[0]
    accuracies = (accuracy_of(before) or 0.0, accuracy_of(after) or 0.0)
    excess = [
        (row.asr.value or 0.0) - (row.base_rate.value or 0.0 if row.base_rate else 0.0) for row in (old, new)
    ]
    balanced = metrics.balanced_score(*accuracies, excess[0], excess[1])
    if balanced is None:
        return "", ""
    der = metrics.defence_effectiveness(*accuracies, old.asr.value or 0.0, new.asr.value or 0.0)
    return f"{der:.2f}", f"{balanced:.2f}"


def accuracy_of(record: RunRecord) -> float | None:
    """Clean accuracy as a share."""
    found = record.measure("clean_accuracy")
    return found.value if found is not None else None


def heads(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def number(of: float | None, digits: int) -> str:
    """A table's cell, empty where there is no value."""
    return "" if of is None else f"{of:.{digits}f}"


def placed(attack: Any, file: Path) -> Any:
    """`attack`, whose trigger, if it is one that is learnt, is kept beside the attacked network's `file`."""
    if not hasattr(attack, "path"):
        return attack
    return replace(attack, path=str(file.with_suffix(".trigger.safetensors")))


def attacks_of(text: str) -> dict[str, Any]:
    """Attacks by what was typed, NAME[:KEY=VALUE[/KEY=VALUE...]], separated by commas."""
    found: dict[str, Any] = {}
    for spec in filter(None, text.split(",")):
        name, _, settings = spec.partition(":")
        pairs = registry.parse_settings(settings.split("/")) if settings else {}
        found[spec] = registry.configure(registry.load(registry.ATTACKS, name), pairs)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdclean.bench encoders", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="cifar10.tar.gz, or the folder it unpacks to"
    )
    parser.add_argument("--work", type=Path, required=True, help="where cells are kept")
    parser.add_argument("--method", choices=tuple(METHODS), default="simclr")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet18")
    parser.add_argument("--epochs", type=float, default=15, help="of pre-training")
    parser.add_argument("--images", type=int, default=50_000, help="how many images are pre-trained on")
    parser.add_argument(
        "--attacks", default=DEFAULT_ATTACKS, help="names, with settings if wanted: ctrl:target=9/rate=0.5"
    )
    parser.add_argument(
        "--recipes", default="", help="names, with settings if wanted: distill:student=void/loss=sp"
    )
    parser.add_argument("--unlabeled", type=int, default=UNLABELED, help="how many images the recipes get")
    parser.add_argument("--clean", action="store_true", help="measure and cleanse the clean encoder, too")
    parser.add_argument(
        "--start", choices=("random", "clean"), default="random",
        help="what poisoned images are pre-trained on from: random weights, or the clean encoder in --work",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    attacks = attacks_of(options.attacks)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        options.work, Images(unpack(options.data, options.work), options.seed), options.method, options.network,
        options.epochs, options.images, options.unlabeled, options.seed, torch.device(options.device), options.start,
    )  # fmt: skip
    recipes = list(filter(None, options.recipes.split(",")))
    bench.make("clean", None)
    cells = [(name, placed(attack, bench.file(name))) for name, attack in attacks.items()]
    if options.clean:
        cells += [("clean", attack) for _, attack in cells[:1]]
    lines = heads(COLUMNS)
    for name, attack in cells:
        bench.make(name, attack)
        lines += bench.lines(name, attack, recipes)
    print("\n".join(lines))
    return 0
