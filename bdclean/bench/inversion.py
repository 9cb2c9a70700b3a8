"""How often the inversion misses a backdoor whose target is known, over seeds, and which other classes it names.

    python -m bdclean.bench inversion --seeds 10 --network wrn16-grid.safetensors 0 IMAGES \\
        --network vgg-added.safetensors 0 IMAGES small_vgg.py:cifar10

`--network FILE TARGET IMAGES [ARCH]`, once for each; a TARGET of `-` is a network without a backdoor. The suspect is
read as `cleanse` reads it, without labels; images and settings are `inoculate`'s.

    python -m bdclean.bench inversion --seeds 5 --encoder badencoder.safetensors badencoder IMAGES \\
        --encoder clean.safetensors - IMAGES [--detector decree|pull|whitened]

`--encoder FILE TRIGGER IMAGES`, once for each; a TRIGGER of `-` is an encoder without a backdoor. `pull`
counts the alarms of the test of encoders without labels over the stock bank; `whitened` how well stamped images among
the given ones are told by whitened features.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdclean import registry
from bdclean.bench import inversion_encoders
from bdclean.bench.opened import Opened
from bdclean.recipes.inoculate import Inoculate
from bdclean.training.drawing import SAMPLE_SPECIFIC
from bdclean.training.inversion import Detected
from bdclean.training.run import Run
from bdclean.training.students import frozen

FORMS = ("mask", SAMPLE_SPECIFIC, "pattern", "smooth")


@dataclass(frozen=True)
class Network:
    """A file, the class that its backdoor sends images to (None: it has none), and how to read it."""

    file: Path
    target: int | None
    images: Path
    arch: str | None

    @staticmethod
    def parse(words: Sequence[str]) -> Network:
        if not 3 <= len(words) <= 4:
            raise SystemExit("--network takes FILE TARGET IMAGES [ARCH].")
        target = None if words[1] == "-" else int(words[1])
        return Network(Path(words[0]), target, Path(words[2]), words[3] if len(words) == 4 else None)


def detections(network: Network, seeds: int, limit: int) -> Iterator[Detected]:
    """What the detector finds from each of `seeds` seeds, with the suspect and its images read once."""
    opened = Opened.of(network.file, network.images, network.arch, "auto", limit)
    recipe = Inoculate()
    detector = registry.load(registry.DETECTORS, "inversion")(recipe.inversion_steps, recipe.families)
    for seed in range(seeds):
        run = Run(opened.device, opened.precision, seed)
        yield detector(frozen(opened.classifier, run), opened.arch, opened.images, run)


def row(network: Network, found: Sequence[Detected]) -> str:
    """A line of Markdown: in how many seeds the target was found, by form, how clearly, and what else was named."""
    seeds = len(found)
    right = [[o for o in each.outliers if o.target == network.target] for each in found]
    others = [[o for o in each.outliers if o.target != network.target] for each in found]
    by_form = [sum(any(o.form.name == form for o in each) for each in right) for form in FORMS]
    clearest = [min(o.size / o.limit for o in each) for each in right if each]
    missed = "" if network.target is None else f"{sum(not each for each in right)} of {seeds}"
    how = f"{min(clearest):.2f} to {max(clearest):.2f}" if clearest else ""
    named = sorted({o.target for each in others for o in each})
    wrong = f"{sum(bool(each) for each in others)} of {seeds}"
    cells = [network.file.stem, "-" if network.target is None else str(network.target), missed]
    cells += ["" if network.target is None else str(count) for count in by_form]
    return "| " + " | ".join([*cells, how, wrong, ", ".join(map(str, named))]) + " |"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdclean.bench inversion", description=__doc__)
    parser.add_argument("--network", nargs="+", action="append", default=[], metavar="WORD")
    parser.add_argument("--encoder", nargs="+", action="append", default=[], metavar="WORD")
    parser.add_argument(
        "--detector", choices=inversion_encoders.DETECTORS, default="inversion", help="of encoders"
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--limit", type=int, default=5000, help="images at most; `cleanse` takes 5,000")
    options = parser.parse_args(arguments)
    networks = [Network.parse(words) for words in options.network]
    encoders = [inversion_encoders.Encoder.parse(words) for words in options.encoder]
    if not networks and not encoders:
        parser.error("give --network or --encoder.")
    if networks:
        _networks(networks, options.seeds, options.limit)
    if encoders:
        inversion_encoders.table(encoders, options.detector, options.seeds, options.limit)
    return 0


def _networks(networks: Sequence[Network], seeds: int, limit: int) -> None:
    """Prints a row of Markdown for each network, and what each seed found on standard error."""
    columns = ["network", "target", "missed", *FORMS, "share of the limit", "others named in", "which"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for network in networks:
        found = []
        for seed, detected in enumerate(detections(network, seeds, limit)):
            found.append(detected)
            said = ", ".join(
                f"{o.form.name} {o.target}: {o.size:.1f} < {o.limit:.1f}" for o in detected.outliers
            )
            print(f"{network.file.stem} seed {seed}: {said or 'nothing'}", file=sys.stderr, flush=True)
        print(row(network, found), flush=True)
