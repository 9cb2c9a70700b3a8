"""Whether a network's answers speak for labels, for the same labels in another order, or against both.

The rule was set on a simulation (`tests/data/test_agreement.py` repeats a part of it) over 2 to 100 classes, 20 to
1,000 images and networks that are right on 15 to 97 % of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom
from torch import Tensor

from bdclean.data.labels.folders import labels_plausible

ERROR_LEVEL = 1e-3
"""One-sided, of the test that another order is right on more of the same images; shared by all orders tried."""
ORDER_TIMES, MATCHING_TIMES = 2.0, 3.0
"""Another order fits *far* better where it leaves at most half the errors, or is right so many times as often. A
matching is chosen among all there are, and networks that are bad do mix up classes one for one: it needs more."""
FOLDS = 5
"""A matching is made on all parts but one and counted on that one, or it would fit anything."""
LEAST_OF_CLASS, LEAST_CLASSES, LEAST_SHARE = 10, 4, 0.6
"""Of the classes with so many images, if there are so many such classes, this share must get their own answer more
often than other images do. By chance half of them would."""


@dataclass(frozen=True)
class Agreement:
    """What a network's answers say of labels.

    `verdict`: 'agrees'; 'order': as `order`, which fits far better; 'matching': some one-to-one matching of labels and
    answers, of no known name, fits far better; 'chance': no better than chance, and no order is; 'few classes': above
    chance, but only a few classes are. `right`: share of answers that are the label; `best`: the same of the order or,
    on images that it was not made on, of the matching. `places` [labels] gives each label's place in `order`.
    `nearer_chance`: `right` is surely nearer to chance than to 1.
    """

    verdict: str
    right: float
    best: float | None = None
    order: str | None = None
    places: Tensor | None = None
    nearer_chance: bool = False


def agreement(
    predictions: Tensor, labels: Tensor, names: Sequence[str] | None, classes: int, sure: bool = False
) -> Agreement:
    """How `predictions` [n] of a head of `classes` agree with `labels` [n], whose classes are called `names`.

    `sure`: somebody said which class is which, so that a few classes above chance are enough.
    """
    predictions, labels = predictions.cpu(), labels.cpu()
    hits = predictions == labels
    right = float(hits.double().mean()) if len(hits) else 0.0
    orders = named_orders(names, labels.unique().tolist(), classes) if names is not None else {}
    fitting = {
        order: predictions == places[labels]
        for order, places in orders.items()
        if labels_plausible(predictions, places[labels], classes)
    }
    order = max(fitting, key=lambda name: int(fitting[name].sum()), default=None)
    matched = _matched(predictions, labels)
    if order is not None:
        found, places = fitting[order], orders[order]
        if (
            _far_better(found, hits, ORDER_TIMES, ERROR_LEVEL / len(orders))
            # a few classes stay in their place in every order
            and not _far_better(matched, found, MATCHING_TIMES, ERROR_LEVEL)
            and _share_of_classes(predictions, places[labels]) >= LEAST_SHARE
        ):
            return Agreement("order", right, float(found.double().mean()), order, places)
    if _far_better(matched, hits, MATCHING_TIMES, ERROR_LEVEL):
        return Agreement("matching", right, float(matched.double().mean()))
    if not labels_plausible(predictions, labels, classes):
        return Agreement("chance", right, nearer_chance=_nearer_chance(right, len(hits), classes))
    if not sure and _share_of_classes(predictions, labels) < LEAST_SHARE:
        return Agreement("few classes", right)
    return Agreement("agrees", right)


def named_orders(names: Sequence[str], present: Sequence[int], classes: int) -> dict[str, Tensor]:
    """Other orders that people's classes are found in: name -> place [len(names)] of each label; none twice.

    `present`: the labels that there are; a head of `classes` must have a place for each.
    """
    count = len(names)
    orders = {
        "text order, as torchvision's ImageFolder sorts": _ranks(names, str),
        "text order without regard to case": _ranks(names, str.casefold),
        "the order of the numbers in their names": _ranks(names, _by_numbers),
    }
    if all(name.isascii() and name.isdigit() and len(name) <= 9 for name in names):
        numbers = torch.tensor([int(name) for name in names])
        orders["their numbers, from 0"] = numbers
        orders["their numbers, from 1"] = numbers - 1
    kept: dict[str, Tensor] = {}
    known = [torch.arange(count)[list(present)]]
    for order, places in orders.items():
        mine = places[list(present)]
        if len(mine) == 0 or int(mine.min()) < 0 or int(mine.max()) >= classes:
            continue
        if not any(torch.equal(mine, other) for other in known):
            known.append(mine)
            kept[order] = places
    return kept


def _ranks(names: Sequence[str], key: Callable[[str], Any]) -> Tensor:
    order = sorted(range(len(names)), key=lambda k: key(names[k]))
    return torch.tensor(order).argsort()


def _by_numbers(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"([0-9]+)", name)]


def _far_better(one: Tensor, other: Tensor, times: float, level: float) -> bool:
    """Whether `one` is right on far more of the same images (bool [n] each) than `other`, by McNemar's exact test."""
    gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
    if gained <= lost or float(binom.cdf(lost, gained + lost, 0.5)) >= level:
        return False
    hits, before, n = int(one.sum()), int(other.sum()), len(one)
    return 2 * (n - hits) <= n - before or hits >= times * before


def _matched(predictions: Tensor, labels: Tensor) -> Tensor:
    """Which images the best one-to-one matching of labels and answers is right on, bool [n]; made on other images."""
    n = len(labels)
    values = torch.cat([labels, predictions]).unique()
    rows, answered = (torch.searchsorted(values, each) for each in (labels, predictions))
    fold = torch.randperm(n, generator=torch.Generator().manual_seed(0)) % FOLDS
    right = torch.zeros(n, dtype=torch.bool)
    for k in range(FOLDS):
        made, counted = fold != k, fold == k
        table = np.zeros((len(values), len(values)))
        np.add.at(table, (rows[made].numpy(), answered[made].numpy()), 1)
        table += 0.5 * np.eye(len(values))  # nothing is gained: the order stays as it is
        _, places = linear_sum_assignment(table, maximize=True)
        right[counted] = torch.from_numpy(places)[rows[counted]] == answered[counted]
    return right


def _share_of_classes(predictions: Tensor, labels: Tensor) -> float:
    """Of the classes with LEAST_OF_CLASS images, those that get their own answer more often than other images do."""
    better = []
    for label in labels.unique():
        own = labels == label
        if LEAST_OF_CLASS <= int(own.sum()) < len(labels):
            said = (predictions == label).double()
            better.append(bool(said[own].mean() > said[~own].mean()))
    return sum(better) / len(better) if len(better) >= LEAST_CLASSES else 1.0


def _nearer_chance(right: float, n: int, classes: int) -> bool:
    """Whether Wilson's upper bound (level 0.001) of a share `right` of `n` is below the middle of chance and 1."""
    if n == 0:
        return False
    z = 3.1
    upper = (right + z * z / (2 * n) + z * (right * (1 - right) / n + z * z / (4 * n * n)) ** 0.5) / (
        1 + z * z / n
    )
    return bool(upper < (1 + 1 / classes) / 2)
