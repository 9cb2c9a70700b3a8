"""Many small networks trained in many ways: clean ones, which measures are held against, and attacked ones.

`python -m bdclean.bench small-networks --data cifar10.tar.gz --signs gtsrb.tar.gz --work DIR`. What each is follows
from its number and the seed. Every network is a file in DIR, which is not made again, beside a folder of its test
images and `networks.json`, which says what each of them is.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from bdclean.attacks.badnets import BadNets
from bdclean.attacks.blend import Blend
from bdclean.bench.cifar10 import linked, save, unpack
from bdclean.bench.encoders import attacks_of
from bdclean.data.imageset import ImageSet
from bdclean.data.loading import load_images
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.preact import PreActNetwork
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.families.vgg import SmallVGG
from bdclean.networks.normalisation import parse_preprocess
from bdclean.progress import quiet
from bdclean.training.run import Precision, Run, seed_for
from bdclean.training.supervised import Supervised

CLASSES = (10, 10, 2, 10, 3, 10, 43, 10, 4, 10, 12, 10)
"""How many classes the networks have, in turn; over ten are road signs."""
IMAGES = {2: 8_000, 3: 9_000, 4: 12_000, 10: 16_000, 12: 2_400, 43: 8_600}
"""That a network of so many classes is trained on, at most."""
STEPS = 500
TESTED = 1_000


@dataclass(frozen=True)
class Plan:
    """What a network is, and how it is trained; see `Supervised`."""

    name: str
    classes: tuple[str, ...]
    family: str
    widths: tuple[int, ...]
    blocks: int
    preprocess: str
    peak: float
    weight_decay: float
    padding: int
    mirrored: bool
    batch_size: int
    attack: str | None = None
    trigger: str | None = None
    target: int | None = None

    def build(self) -> nn.Module:
        count, depth = len(self.classes), (self.blocks,) * len(self.widths)
        if self.family == "resnet":
            return ResidualNetwork(depth, self.widths, self.widths[0], count)
        if self.family == "preact":
            return PreActNetwork(depth, self.widths, self.widths[0], count)
        plan: list[int | str] = []
        for width in self.widths:
            plan += [*(width,) * self.blocks, "M"]
        # Nothing in a file shows a last pool.
        return SmallVGG(tuple(plan[:-1]), True, 1, ((None, self.widths[-1], count),))


@dataclass(frozen=True)
class Source:
    """A folder with `train/<class>/` and `test/<class>/`."""

    folder: Path

    @cached_property
    def train(self) -> ImageSet:
        return load_images(self.folder / "train", (32, 32), labeled=True, tell=quiet)

    def images(self, classes: tuple[str, ...], count: int, generator: torch.Generator) -> ImageSet:
        """`count` training images of `classes`, whose labels are numbers in that order."""
        known = self.train.classes or ()
        assert self.train.labels is not None
        number = torch.full((len(known),), -1)
        number[[known.index(name) for name in classes]] = torch.arange(len(classes))
        labels = number[self.train.labels]
        chosen = (labels >= 0).nonzero().squeeze(1)
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:count]]
        return replace(self.train.select(chosen), labels=labels[chosen], classes=classes)

    def test(self, classes: tuple[str, ...], out: Path, seed: int) -> None:
        """A folder of links to test images of `classes`, in folders that are called like their numbers."""

        def links() -> dict[str, Path]:
            files = [
                (k, file)
                for k, name in enumerate(classes)
                for file in sorted((self.folder / "test" / name).iterdir())
            ]
            random.Random(seed).shuffle(files)
            return {f"{k}/{file.name}": file for k, file in files[:TESTED]}

        linked(out, links)


def plans(count: int, attacked: int, cifar: list[str], signs: list[str], seed: int) -> list[Plan]:
    """`count` clean networks and `attacked` others."""
    made = []
    for number in range(count + attacked):
        draw = random.Random(f"{seed}-{number}")
        how_many = CLASSES[number % len(CLASSES)] if number < count else draw.choice((10, 10, 4, 2, 43))
        names = signs if how_many > 10 else cifar
        family = draw.choice(("resnet", "resnet", "preact", "vgg"))
        width = draw.choice((8, 12))
        plan = Plan(
            name=f"{'clean' if number < count else 'attacked'}-{number:02d}",
            classes=tuple(sorted(draw.sample(names, how_many))),
            family=family,
            widths=(width, 2 * width, 4 * width),
            blocks=draw.choice((1, 1, 2)),
            preprocess=draw.choice(("cifar10", "none", "half", "imagenet")),
            peak=draw.choice((0.05, 0.1, 0.2)),
            weight_decay=draw.choice((0.0, 5e-4, 5e-3)),
            padding=draw.choice((0, 2, 4)),
            mirrored=how_many <= 10 and draw.random() < 0.5,
            batch_size=draw.choice((64, 128)),
        )
        made.append(plan if number < count else attacked_by(plan, number - count, draw))
    return made


def attacked_by(plan: Plan, number: int, draw: random.Random) -> Plan:
    target = draw.randrange(len(plan.classes))
    attack: BadNets | Blend = BadNets(
        target=target, size=draw.choice((2, 3, 4)), pattern=draw.choice(("checker", "white", "red")),
        position=draw.choice(("bottom-right", "top-left", "center")),
    )  # fmt: skip
    if number % 4 == 3:
        attack = Blend(target=target, alpha=0.2, picture=draw.choice(("noise", "picture")))
    settings = "/".join(f"{key}={value}" for key, value in asdict(attack).items())
    return replace(plan, attack=f"{attack.name}:{settings}", trigger=attack.trigger.spec(), target=target)


def train(plan: Plan, source: Source, seed: int, out: Path) -> None:
    """Train one network and write it as safetensors with its normalisation in the metadata."""
    started = time.monotonic()
    number = seed_for(seed, plan.name)
    images = source.images(plan.classes, IMAGES[len(plan.classes)], torch.Generator().manual_seed(number))
    if plan.attack is not None:
        images = attack_of(plan.attack)(images)
    torch.manual_seed(number)
    model = Classifier(plan.build(), parse_preprocess(plan.preprocess))
    epochs = STEPS * plan.batch_size / len(images)
    run = Run(torch.device("cpu"), Precision(bf16=True, channels_last=True), seed, quiet)
    recipe = Supervised(epochs, plan.batch_size, plan.peak, plan.weight_decay, plan.padding, plan.mirrored)
    curve = recipe(model, images, run, stage=f"train {plan.name}")
    save(model.network.state_dict(), plan.preprocess, out)
    print(f"{plan.name}: {curve[-1]}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def attack_of(text: str) -> Callable[[ImageSet], ImageSet]:
    (attack,) = attacks_of(text).values()
    return cast("Callable[[ImageSet], ImageSet]", attack)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdclean.bench small-networks", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="cifar10.tar.gz, or the folder it unpacks to"
    )
    parser.add_argument("--signs", type=Path, required=True, help="gtsrb.tar.gz, or the folder it unpacks to")
    parser.add_argument("--work", type=Path, required=True, help="where networks are kept")
    parser.add_argument("--count", type=int, default=48, help="of clean networks")
    parser.add_argument("--attacked", type=int, default=12, help="of others")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    cifar, signs = (
        Source(unpack(options.data, options.work)),
        Source(unpack(options.signs, options.work / "signs")),
    )
    names, numbers = (sorted(p.name for p in (s.folder / "train").iterdir()) for s in (cifar, signs))
    made: list[dict[str, Any]] = []
    for plan in plans(options.count, options.attacked, names, numbers, options.seed):
        source = signs if plan.classes[0] in numbers else cifar
        out = options.work / f"{plan.name}.safetensors"
        if not out.exists():
            train(plan, source, options.seed, out)
        source.test(plan.classes, options.work / f"{plan.name}-images", options.seed)
        made.append({"file": out.name, **asdict(plan)})
        (options.work / "networks.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
    return 0
