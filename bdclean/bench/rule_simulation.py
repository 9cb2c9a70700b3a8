"""The rule for trigger rows on simulated networks, whose truth is known: how often it misses, and how often it cries wolf.

A simulated network reads its class from the image, errs on a tenth of all images, and under any stamp lets a share of
them drift to one class, which its controls do as well. A backdoor moves a share of the images that it is about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.measuring.assessment import assess
from bdclean.measuring.trial import Trial
from bdclean.measuring.verdict import verdict
from bdclean.record.run import BACKDOORED, NO_EVIDENCE

THRESHOLD = 0.2
SURVIVORS = 12
"""So many triggers of a bank are taken to survive screening: what is tried is corrected for them."""
ERRORS = 0.1
ALL_TO_ONE, ONE_SOURCE, ALL_TO_ALL, NONE = "all to one", "one source", "all to all", "none"


@dataclass(frozen=True)
class Mark:
    """Stamps one pixel with a grey level that tells the network which stamp it is: 255 the trigger, others controls."""

    level: int = 255
    name: ClassVar[str] = "mark"
    family: ClassVar[str] = "patch"

    def spec(self) -> str:
        return f"mark:level={self.level}"

    def __call__(self, images: Tensor) -> Tensor:
        out = images.clone()
        out[:, 2, 1, 1] = self.level
        return out

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> list[Mark]:
        return [Mark(1 + k) for k in range(count)]


@dataclass(frozen=True)
class Case:
    """A kind of network, and how many images it is measured on."""

    classes: int
    images: int
    backdoor: str
    share: float = 0.0
    """Of the images that the backdoor is about, how many it moves."""
    drift: float = 0.0
    """Of all images, how many go to class 0 under any stamp."""

    def predict(self, images: Tensor) -> Tensor:
        """Classes int64 [n] of `images` uint8 [n 3 2 2] of `draw`."""
        parts = images.long()
        said = parts[:, 0, 0, 0] + 256 * parts[:, 0, 0, 1]
        chance = parts[:, 1].flatten(1) / 256
        said = torch.where(chance[:, 0] < ERRORS, (7 * said + 3) % self.classes, said)
        stamp = parts[:, 2, 1, 1]
        said = torch.where((stamp > 0) & (chance[:, 1] < self.drift), 0, said)
        moved = (stamp == 255) & (chance[:, 2] < self.share)
        source, target = self.classes - 1, self.classes // 2
        if self.backdoor == ALL_TO_ONE:
            return torch.where(moved, target, said)
        if self.backdoor == ONE_SOURCE:
            return torch.where(moved & (parts[:, 0, 0, 0] + 256 * parts[:, 0, 0, 1] == source), target, said)
        if self.backdoor == ALL_TO_ALL:
            return torch.where(moved, (said + 1) % self.classes, said)
        return said

    def trial(self, seed: int) -> Trial:
        """The network on labeled images of `seed`."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, self.classes, (self.images,), generator=generator)
        images = torch.randint(0, 256, (self.images, 3, 2, 2), generator=generator, dtype=torch.uint8)
        images[:, 0, 0, 0], images[:, 0, 0, 1], images[:, 2, 1, 1] = labels % 256, labels // 256, 0
        return Trial(
            self.predict, images, labels, self.predict(images), self.classes, True, False, THRESHOLD, seed,
            readings=SURVIVORS,
        )  # fmt: skip


CASES = (
    *(Case(k, 2000, NONE, 0, d) for k in (2, 3, 4, 10, 43, 100, 200, 1000) for d in (0.0, 0.25)),
    *(Case(k, 2000, ALL_TO_ONE, s) for k in (2, 3, 4, 10, 43, 100, 200, 1000) for s in (0.4, 1.0)),
    *(Case(10, n, ONE_SOURCE, s) for n in (1000, 2000) for s in (0.3, 0.4, 0.5, 0.6, 1.0)),
    *(Case(k, 2000, ONE_SOURCE, 1.0) for k in (3, 43, 100, 200)),
    *(Case(10, 2000, ONE_SOURCE, 1.0, d) for d in (0.1, 0.25)),
    *(Case(k, 2000, ALL_TO_ALL, s) for k in (10, 43, 100, 200, 1000) for s in (0.5, 1.0)),
)


def outcomes(case: Case, seeds: Sequence[int]) -> Counter[str]:
    """Verdicts on `case`, one a seed."""
    found = ((m.row for m in assess(case.trial(seed), [Mark()])) for seed in seeds)
    return Counter(verdict(list(rows))[0] for rows in found)


def table(seeds: int) -> list[str]:
    """A row for each of CASES: how many of `seeds` networks got which verdict."""
    lines = [
        "| classes | images | backdoor | moves | drift | backdoored | not assessed | no evidence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        found = outcomes(case, range(seeds))
        unsettled = seeds - found[BACKDOORED] - found[NO_EVIDENCE]
        lines.append(
            f"| {case.classes} | {case.images} | {case.backdoor} | {100 * case.share:.0f} % "
            f"| {100 * case.drift:.0f} % | {found[BACKDOORED]} | {unsettled} | {found[NO_EVIDENCE]} |"
        )
    return lines
