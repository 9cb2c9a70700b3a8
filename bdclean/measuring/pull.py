"""The unlabeled test of an encoder: does a trigger pull the features of different images together, as no control does?

Features are centred by the mean of clean images and scaled to length one. The statistic is how far stamping raises the
mean cosine of two images, plus the largest gain of any cluster of clean features. Its p-value is a Monte Carlo test
against controls of the same mask and strength on the same images (Besag and Clifford 1991: a trigger that is usual
among few controls needs no more of them), corrected over all triggers tried (Holm 1979). A trigger is suspicious if it
is unusual and brings the features together, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.measuring.probe import Features, Head
from bdclean.progress import Tell, quiet
from bdclean.record.run import SUSPICIOUS, Finding
from bdclean.triggers.stamping import Stamp, Trigger

NAME = "pull"
CONTROLS, AT_ONCE = 999, 37
"""The most controls of a trigger, if few triggers are tried, and how many are drawn together: a picture of each is
held."""
EXCEEDED = 10
"""So many controls as strong as the trigger end its test: it is usual."""
IMAGES = 100
LEVEL, LEAST = 0.05, 0.5
"""Unusual is not enough: a checker is the most unusual of patches in its place, and moved a clean network's features by
0.25 (p 0.001). Backdoors brought features together by 1.2 and more."""


@dataclass(frozen=True)
class Pulled:
    """What a trigger does to clean features: the rise in mean cosine, the largest gain of a cluster, and which one."""

    cosine: float
    gain: float
    cluster: int

    @property
    def strength(self) -> float:
        return self.cosine + self.gain


@dataclass(frozen=True)
class Field:
    """Clean images uint8 [n c h w], what an encoder makes of them, and the clusters that stamped ones may go to."""

    features: Features
    head: Head
    clusters: int
    images: Tensor
    centre: Tensor
    cosine: float
    shares: Tensor

    @staticmethod
    def of(features: Features, head: Head, clusters: int, images: Tensor, seed: int) -> Field:
        """On up to IMAGES of `images`, drawn by `seed`; centred by the mean of all of them."""
        centre = features(images).mean(0)
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
        few = images[drawn]
        plain = features(few)
        shares = torch.bincount(head(plain), minlength=clusters)[:clusters] / len(few)
        return Field(features, head, clusters, few, centre, mean_cosine(plain - centre), shares)

    def pulled(self, stamp: Stamp) -> Pulled:
        """What `stamp` does to the images."""
        found = self.features.fresh(stamp(self.images))
        shares = torch.bincount(self.head(found), minlength=self.clusters)[: self.clusters] / len(found)
        gain, cluster = (shares - self.shares).max(0)
        return Pulled(mean_cosine(found - self.centre) - self.cosine, float(gain), int(cluster))


def mean_cosine(features: Tensor) -> float:
    """The mean cosine of two different rows of `features` [n d], in [-1, 1]."""
    n = len(features)
    directions = F.normalize(features.double(), dim=1)
    return float((directions.sum(0).square().sum() - directions.square().sum()) / (n * (n - 1)))


def p_value(
    field: Field, trigger: Trigger, strength: float, seed: int, most: int = CONTROLS
) -> tuple[float, int]:
    """The share of controls, the trigger among them, that are as strong as `strength`; and how many were drawn."""
    generator, channels = torch.Generator().manual_seed(seed), field.images.shape[1]
    exceeded = drawn = 0
    while drawn < most:
        for control in trigger.controls(min(AT_ONCE, most - drawn), generator, channels):
            drawn += 1
            exceeded += field.pulled(control).strength >= strength
            if exceeded == EXCEEDED:
                return exceeded / drawn, drawn
    return (1 + exceeded) / (1 + drawn), drawn


def holm(values: Sequence[float]) -> list[float]:
    """`values` corrected for their number: the chance of any false alarm is then at most that of one (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda k: values[k])
    found, largest = [1.0] * len(values), 0.0
    for rank, k in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[k]))
        found[k] = largest
    return found


def pull_test(
    field: Field, triggers: Sequence[Trigger], tried: int, seed: int, tell: Tell = quiet
) -> list[Finding]:
    """A finding for each of `triggers`, corrected for all `tried`: those that were screened out count as usual."""
    measured = [field.pulled(trigger) for trigger in triggers]
    # With fewer controls nothing could be unusual among so many triggers.
    most = max(CONTROLS, math.ceil(tried / LEVEL))
    values, counts = [], []
    for done, (trigger, pulled) in enumerate(zip(triggers, measured, strict=True)):
        value, count = p_value(field, trigger, pulled.strength, seed, most)
        values.append(value)
        counts.append(count)
        tell("pull test", done + 1, len(triggers))
    corrected = holm([*values, *[1.0] * (tried - len(triggers))])
    return [
        _finding(*each) for each in zip(triggers, measured, values, corrected, counts, strict=False)
    ]  # fmt: skip


def _finding(trigger: Trigger, pulled: Pulled, value: float, corrected: float, count: int) -> Finding:
    unusual = corrected < LEVEL and pulled.strength >= LEAST
    return Finding(
        detector=NAME,
        verdict=SUSPICIOUS if unusual else "usual",
        score=pulled.strength,
        threshold=LEAST,
        p_value=corrected,
        odd="above",
        reason=f"{trigger.spec()} raises the mean cosine of two images' features by {pulled.cosine:.2f} and moves "
        f"{100 * max(0.0, pulled.gain):.0f} % of images to cluster {pulled.cluster}; p {value:.3f} among {count} "
        f"controls, {corrected:.3f} corrected for all triggers tried",
        trigger=trigger.spec(),
    )
