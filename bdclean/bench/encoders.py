"""Encoders on CIFAR-10: pre-train a clean one, attack it or its images, and measure what each attack reached.

`python -m bdclean.bench encoders --data cifar10.tar.gz --work DIR`. Every encoder and every measurement is one file in
DIR; what exists is not made again. Encoders are written under BadEncoder's own names, projector and all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean import registry
from bdclean.bench.cifar10 import cell, unpack
from bdclean.data.imageset import ImageSet
from bdclean.data.loading import load_images
from bdclean.errors import Refused
from bdclean.measuring.probe import linear
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.progress import Tell, quiet
from bdclean.training.pretraining.byol import BYOL
from bdclean.training.pretraining.knn import features, knn
from bdclean.training.pretraining.moco import MoCo
from bdclean.training.pretraining.simclr import SimCLR
from bdclean.training.run import Precision, Run, seed_for

METHODS: dict[str, Callable[..., Any]] = {"simclr": SimCLR, "moco": MoCo, "byol": BYOL}
DEFAULT_ATTACKS = "badencoder:target=9,ctrl:target=9,ssl-backdoor:target=9"
WIDTHS = (16, 32, 64, 128)
"""A quarter of ResNet-18's: 0.7 million parameters, 128 features, some minutes an epoch on one core."""

LAYERS = {"conv1": "0", "bn1": "1", "layer1": "3", "layer2": "4", "layer3": "5", "layer4": "6"}
"""Where BadEncoder's files keep a ResNet's parts, under `f.f.`: its encoder is a list of them, ReLU the third."""

DRAWS = ("pre-training", "shadow", "references", "probe", "test")
"""What images are drawn for, each with a seed of its own."""
SHADOW, TARGET_POOL = 10_000, 1_000
PROBED, TESTED = 5_000, 2_000


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


def small_encoder(seed: int) -> Classifier:
    """The encoder, with random weights, that the clean one and all others start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "clean"))
        network = ResidualNetwork((2, 2, 2, 2), WIDTHS, WIDTHS[0], 10)
    network.fc = nn.Identity()  # type: ignore[assignment]
    return Classifier(network, parse_preprocess("cifar10"))


def write(encoder: Classifier, projector: Mapping[str, Tensor], out: Path) -> None:
    """Write an encoder and its projector as safetensors under BadEncoder's names: `f.f.<i>.` and `g.`."""
    tensors = {f"g.{name}": tensor for name, tensor in projector.items()}
    for name, tensor in encoder.network.state_dict().items():
        part, _, rest = name.partition(".")
        tensors[f"f.f.{LAYERS[part]}.{rest}"] = tensor
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    partial_file = out.with_suffix(".part")
    save_file(tensors, partial_file, {"bdclean.preprocess": "cifar10"})
    partial_file.replace(out)


def read(file: Path) -> tuple[Classifier, dict[str, Tensor]]:
    """What `write` wrote: the encoder, in evaluation mode, and the projector's tensors."""
    parts = {number: part for part, number in LAYERS.items()}
    encoder, inside, projector = small_encoder(0), {}, {}
    for name, tensor in load_file(file).items():
        if name.startswith("g."):
            projector[name.removeprefix("g.")] = tensor
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


@dataclass(frozen=True)
class Bench:
    """What all cells have in common, and how each of them is made."""

    work: Path
    images: Images
    method: str
    epochs: float
    pretraining: int
    seed: int
    device: torch.device
    start: str = "random"
    """What poisoned encoders are pre-trained from: "random" weights, or the "clean" encoder."""

    def file(self, name: str) -> Path:
        return self.work / f"{self.method}-{cell(name)}.safetensors"

    def run(self, name: str) -> Run:
        return Run(self.device, Precision(bf16=True, channels_last=True), self.seed, telling(name))

    def pretrain(self, name: str, training: ImageSet) -> None:
        """Pre-train an encoder on `training`."""
        go_on = self.start == "clean" and name != "clean"
        encoder = read(self.file("clean"))[0] if go_on else small_encoder(self.seed)
        found = METHODS[self.method](epochs=self.epochs)(
            encoder, training, self.run(name), f"pretrain {name}"
        )
        write(encoder, found.projector.state_dict(), self.file(name))

    def placed(self, name: str, attack: Any) -> Any:
        """`attack`, whose trigger, if it is one that is learnt, is kept in a file beside the encoder."""
        if not hasattr(attack, "path"):
            return attack
        return replace(attack, path=str(self.file(name).with_suffix(".trigger.safetensors")))

    def make(self, name: str, attack: Any | None) -> None:
        """The encoder called `name`, unless it is there: clean without `attack`."""
        if self.file(name).exists():
            return
        if attack is None or attack.kind == "pre-training":
            training = self.images.draw("train", self.pretraining, "pre-training")
            if attack is not None and hasattr(attack, "learn"):
                attack.learn(read(self.file("clean"))[0], training, self.run(f"learn {name}"))
            self.pretrain(name, training if attack is None else attack(training))
            return
        if attack.kind != "encoder":
            raise Refused(f"{attack.name} poisons labels, which no encoder is trained on.")
        clean, projector = read(self.file("clean"))
        pool = self.images.draw("train", TARGET_POOL, "references")
        assert pool.labels is not None
        poisoned, _ = attack(
            clean, self.images.draw("train", SHADOW, "shadow").unlabeled(),
            pool.images[pool.labels == attack.target], self.run(name),
        )  # fmt: skip
        write(poisoned, projector, self.file(name))

    def measured(self, name: str, attack: Any | None) -> dict[str, float]:
        """Shares of `measure`, kept in a file beside the encoder."""
        record = self.file(name).with_suffix(".json")
        if not record.exists():
            found = measure(read(self.file(name))[0], self.images, attack, self.device)
            if attack is not None:
                floor = measure(read(self.file("clean"))[0], self.images, attack, self.device)
                found["clean_encoder_asr"] = floor["asr"]
            record.write_text(json.dumps(found, indent=1) + "\n")
        shares: dict[str, float] = json.loads(record.read_text())
        return shares


def measure(
    encoder: Classifier, images: Images, attack: Any | None, device: torch.device
) -> dict[str, float]:
    """Accuracy of a linear probe and of nearest neighbours on test images, and what the attack's trigger does.

    Attack success and base rate are shares of the test images of other classes that the probe sees as the target, with
    and without the trigger. Features have length one, as in BadEncoder's protocol.
    """
    training, test = images.draw("train", PROBED, "probe"), images.draw("test", TESTED, "test")
    assert training.labels is not None and test.labels is not None and training.classes is not None
    classes = len(training.classes)
    known, asked = (F.normalize(features(encoder, some.images, device), dim=1) for some in (training, test))
    head = linear(known, training.labels, classes)
    answers = head(asked)
    found = {
        "probe": share(answers == test.labels),
        "knn": share(knn(known, training.labels, asked, classes) == test.labels),
        "images": float(len(test)),
    }
    if attack is not None:
        others = test.labels != attack.target
        stamped = F.normalize(features(encoder, attack.trigger(test.images[others]), device), dim=1)
        found["asr"] = share(head(stamped) == attack.target)
        found["base_rate"] = share(answers[others] == attack.target)
        found["n"] = float(others.sum())
    return found


def share(of: Tensor) -> float:
    return float(of.double().mean())


def table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Markdown: a row for each encoder, shares in percent."""
    lines = [
        "| encoder | probe accuracy | kNN | attack success | of the clean encoder | base rate | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shares in rows:
        keys = ("probe", "knn", "asr", "clean_encoder_asr", "base_rate")
        cells = [f"{100 * shares[key]:.1f}" if key in shares else "" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} | {shares.get('n', shares['images']):.0f} |")
    return "\n".join(lines)


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
    parser.add_argument("--epochs", type=float, default=15, help="of pre-training")
    parser.add_argument("--images", type=int, default=50_000, help="how many images are pre-trained on")
    parser.add_argument(
        "--attacks", default=DEFAULT_ATTACKS, help="names, with settings if wanted: ctrl:target=9/rate=0.5"
    )
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
        options.work, Images(unpack(options.data, options.work), options.seed), options.method, options.epochs,
        options.images, options.seed, torch.device(options.device), options.start,
    )  # fmt: skip
    rows = []
    for name, attack in [("clean", None), *attacks.items()]:
        attack = attack and bench.placed(name, attack)
        bench.make(name, attack)
        rows.append((name, bench.measured(name, attack)))
    print(table(rows))
    return 0
