"""Detectors on encoders, over seeds: the rows of the bench `inversion` for them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean import registry
from bdclean.bench import unlabeled_encoders
from bdclean.bench.opened import Opened
from bdclean.networks.classifier import Classifier
from bdclean.training.clusters import unit_features
from bdclean.training.forms import SMALL
from bdclean.training.inversion import Detected, spread_out
from bdclean.training.run import Run
from bdclean.training.students import frozen
from bdclean.triggers.bank import make_triggers
from bdclean.triggers.stamping import Trigger

COMPARED = 100
"""Images that an inverted trigger and the true one are both stamped on."""


@dataclass(frozen=True)
class Encoder:
    """A file, the SPEC of the trigger that fires on it (None: it has no backdoor), and a folder of images."""

    file: Path
    trigger: str | None
    images: Path

    @staticmethod
    def parse(words: Sequence[str]) -> Encoder:
        if len(words) != 3:
            raise SystemExit("--encoder takes FILE TRIGGER IMAGES.")
        return Encoder(Path(words[0]), None if words[1] == "-" else words[1], Path(words[2]))


@dataclass(frozen=True)
class Seen:
    """What one seed found: a score (of `inversion` the smallest mask as a share of the median), and outliers.

    `likeness`: of each outlier, the cosine between the mean centred features under it and under the true trigger.
    """

    score: float | None
    outliers: int
    likeness: list[float]


def detections(encoder: Encoder, name: str, seeds: Iterable[int], limit: int) -> Iterator[Seen]:
    """What the detector called `name` finds from each of `seeds` seeds; each is told on standard error."""
    opened = Opened.of(encoder.file, encoder.images, None, "encoder", limit)
    trigger = made(encoder, opened.images)
    detector = registry.load_for(registry.DETECTORS, name, "encoder")()
    for seed in seeds:
        run = Run(opened.device, opened.precision, seed)
        suspect = frozen(opened.classifier, run)
        found: Detected = detector(suspect, opened.arch, opened.images, run)
        likeness = alike(found, trigger, suspect, opened.images, run) if trigger is not None else []
        least = min(found.findings, key=lambda finding: finding["score"] or math.inf)
        score = least["score"]
        if name == "inversion":
            score = SMALL * score / least["threshold"]
        seen = Seen(score, len(found.outliers), likeness)
        print(
            f"{encoder.file.stem} {name} seed {seed}: {seen}; {least['reason']}",
            file=sys.stderr,
            flush=True,
        )
        yield seen


def alike(found: Detected, trigger: Trigger, suspect: Classifier, images: Tensor, run: Run) -> list[float]:
    """The cosine of the mean centred features under each inverted trigger with those under the true one."""
    few = spread_out(images, COMPARED)
    centre = unit_features(suspect, images, run).mean(0)
    true = (unit_features(suspect, trigger(few), run) - centre).mean(0)
    cosines = []
    for outlier in found.outliers:
        stamped = outlier.form.stamp(outlier.parameters[None], few.to(run.device).float() / 255)[0]
        pixels = (255 * stamped).round().to(torch.uint8)
        ours = (unit_features(suspect, pixels, run) - centre).mean(0)
        cosines.append(float(F.cosine_similarity(ours, true, dim=0)))
    return cosines


DETECTORS = ("inversion", "decree", "pull", "whitened")
"""Those of `scan` by name, and its two tests of encoders without labels."""


def table(encoders: Sequence[Encoder], name: str, seeds: int, limit: int) -> None:
    """Prints rows of Markdown for each encoder."""
    if name in ("pull", "whitened"):
        _tests(encoders, name, seeds, limit)
        return
    score = "smallest mask / median" if name == "inversion" else "PL1"
    print(f"| encoder | trigger | outlier in | {score} | likeness with the trigger |\n|---|---|---|---|---|")
    for encoder in encoders:
        found = list(detections(encoder, name, range(seeds), limit))
        scores = [seen.score for seen in found if seen.score is not None]
        likeness = [value for seen in found for value in seen.likeness]
        cells = (
            encoder.file.stem,
            encoder.trigger or "-",
            f"{sum(seen.outliers > 0 for seen in found)} of {len(found)}" if name == "inversion" else "",
            span(scores),
            span(likeness),
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def _tests(encoders: Sequence[Encoder], name: str, seeds: int, limit: int) -> None:
    print(unlabeled_encoders.PULL if name == "pull" else unlabeled_encoders.STAMPED)
    for encoder in encoders:
        features, images = unlabeled_encoders.features_of(encoder.file, encoder.images, limit)
        if name == "pull":
            rows = [unlabeled_encoders.pull_row(encoder.file.stem, features, images, seeds)]
        else:
            trigger = made(encoder, images)
            rows = unlabeled_encoders.stamped_rows(encoder.file.stem, trigger, features, images, seeds)
        print("\n".join(rows), flush=True)


def made(encoder: Encoder, images: Tensor) -> Trigger | None:
    """The encoder's trigger for images of this size."""
    if encoder.trigger is None:
        return None
    (trigger,) = make_triggers((encoder.trigger,), (images.shape[2], images.shape[3]))
    return trigger


def span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else ""
