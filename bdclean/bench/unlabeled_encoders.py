"""The tests of encoders without labels: false alarms of the pull test, and stamped images among the given ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bdclean.bench.opened import Opened
from bdclean.measuring.predictor import Predictor
from bdclean.measuring.probe import Features, nearest_mean
from bdclean.measuring.pull import LEAST, LEVEL, Field, p_value
from bdclean.measuring.trial import halves, make_predictor
from bdclean.measuring.whitening import NEAR, area
from bdclean.runs.encoders import CLUSTERS
from bdclean.training.clusters import clusters
from bdclean.training.run import seed_for
from bdclean.training.whitening import Whitening, crowding
from bdclean.triggers.bank import make_triggers
from bdclean.triggers.stamping import Trigger

SHARES = (0.0, 0.01, 0.05)
"""Of the images given, that are stamped."""
BESIDE = ("badencoder", "ctrl", "ssl-backdoor", "drupe")
"""Triggers of attacks on encoders, beside the stock bank."""


def features_of(file: Path, images: Path, limit: int) -> tuple[Features, Tensor]:
    """The features of an encoder in float32, as `scan` measures them, and its images uint8 [n 3 h w]."""
    opened = Opened.of(file, images, None, "encoder", limit)
    predictor: Predictor = make_predictor(opened.classifier, opened.device, None, opened.images)
    return Features(predictor), opened.images


@dataclass(frozen=True)
class Alarms:
    """Of one seed: triggers that were tried, that reach LEAST, that are suspicious, and the strongest one."""

    tried: int
    strong: int
    suspicious: int
    highest: float
    trigger: str


def alarms(features: Features, images: Tensor, seed: int) -> Alarms:
    """What the pull test says of the stock bank and BESIDE, with clusters from a half of `images`, as in `scan`.

    Without screening, so that no trigger is left out; controls are drawn only where the strength reaches LEAST, for
    others cannot be suspicious.
    """
    size = (images.shape[2], images.shape[3])
    triggers = list(dict.fromkeys([*make_triggers((), size), *make_triggers(BESIDE, size)]))
    first, second = halves(len(images), seed)
    known = features(images[first])
    groups = clusters(known, CLUSTERS, seed)
    count = int(groups.max()) + 1
    field = Field.of(features, nearest_mean(known, groups, count), count, images[second], seed)
    strengths = [field.pulled(trigger).strength for trigger in triggers]
    strong = [k for k, strength in enumerate(strengths) if strength >= LEAST]
    # Bonferroni's correction, which is never below Holm's
    values = [p_value(field, triggers[k], strengths[k], seed)[0] * len(triggers) for k in strong]
    best = max(range(len(triggers)), key=strengths.__getitem__)
    return Alarms(
        len(triggers),
        len(strong),
        sum(value < LEVEL for value in values),
        strengths[best],
        triggers[best].spec(),
    )


def pull_row(name: str, features: Features, images: Tensor, seeds: int) -> str:
    found = [alarms(features, images, seed) for seed in range(seeds)]
    highest = max(found, key=lambda each: each.highest)
    cells = (
        name, str(seeds * found[0].tried), str(sum(each.strong for each in found)),
        str(sum(each.suspicious for each in found)), f"{highest.highest:.2f}", highest.trigger,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


PULL = (
    "| encoder | triggers tried, all seeds | strength 0.5 or more | suspicious | highest strength | of |\n"
    "|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Stamped:
    """Of one seed, with a share of the images stamped: rates of those that crowd, and the areas of both scores."""

    found: float
    false: float
    distance: float
    crowd: float


def stamped(clean: Tensor, marked: Tensor, share: float, seed: int) -> Stamped:
    """`clean` and `marked` [n d] are features of the same images without and with the trigger."""
    # a seed of its own: drawn with that of the halves, all of them would lie in one half
    generator = torch.Generator().manual_seed(seed_for("stamped", seed))
    chosen = torch.zeros(len(clean), dtype=torch.bool)
    chosen[torch.randperm(len(clean), generator=generator)[: round(share * len(clean))]] = True
    mixed = torch.where(chosen[:, None], marked, clean)
    first, second = halves(len(clean), seed)
    near, far = torch.empty(len(clean)).double(), torch.empty(len(clean)).double()
    near[first], near[second] = crowding(mixed[first], mixed[second])
    for judged, others in ((first, second), (second, first)):
        far[judged] = Whitening.of(mixed[others]).distances(mixed[judged])
    crowds = near < NEAR
    return Stamped(
        float(crowds[chosen].double().mean()), float(crowds[~chosen].double().mean()),
        area(far[chosen], far[~chosen]), area(-near[chosen], -near[~chosen]),
    )  # fmt: skip


def stamped_rows(
    name: str, trigger: Trigger | None, features: Features, images: Tensor, seeds: int
) -> list[str]:
    """Rows for each of SHARES; without a trigger for none stamped alone."""
    clean = features(images)
    marked = clean if trigger is None else features(trigger(images))
    rows = []
    for share in SHARES if trigger is not None else SHARES[:1]:
        found = [stamped(clean, marked, share, seed) for seed in range(seeds)]
        rates = [_span([100 * each.false for each in found])]
        if share:
            rates = [
                _span([100 * each.found for each in found]), *rates,
                _span([each.distance for each in found]), _span([each.crowd for each in found]),
            ]  # fmt: skip
        else:
            rates = ["", *rates, "", ""]
        said = trigger.spec() if trigger is not None else "-"
        rows.append(f"| {name} | {said} | {100 * share:g} | {' | '.join(rates)} |")
    return rows


STAMPED = (
    "| encoder | trigger | stamped % | found % | clean ones flagged % | area, distance | area, crowding |\n"
    "|---|---|---|---|---|---|---|"
)


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"
