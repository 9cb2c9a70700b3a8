"""Whitened features of an encoder: how far stamped images lie from clean ones, and which given images crowd together.

The Mahalanobis norm of a feature of length one weighs each direction by how little clean images spread along it, where
a trigger's signal was said to lie. Measured here (sample_models/tables/inversion.md): where one in a hundred images is
stamped, the features that a poisoned classifier rests on lie farther for it; where one in twenty is, they are in the
covariance themselves. Attacks on encoders leave stamped images as far as clean ones, or nearer, but draw them to one
place, where they are unusually near to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bdclean.measuring.probe import Features
from bdclean.record.run import Finding
from bdclean.training.whitening import NEIGHBOURS, Whitening, crowding
from bdclean.triggers.stamping import Trigger

DISTANCE, CROWDING = "whitened-distance", "crowding"
"""Names of the findings."""
IMAGES = 500
"""Stamped with each trigger, at most."""
BEYOND = 0.95
"""The quantile of clean images' distances that stamped ones are held against."""
NEAR, MANY = 0.5, 0.004
"""An image crowds if its NEIGHBOURS-th nearest among the others is nearer than NEAR of the median image's. Of clean
images up to 0.0025 did, with the ten files of the table: from MANY on they are too many."""
LEAST = 100
"""Images of a half: with fewer nothing is said of single ones."""


def stamped_distances(
    features: Features, known: Tensor, images: Tensor, triggers: Sequence[Trigger]
) -> list[Finding]:
    """How far `images` uint8 [n c h w] lie from clean ones when stamped, a finding for each of `triggers`.

    `known` uint8 [m c h w] are other images: the covariance is theirs. The score is the area under the ROC curve: how
    often a stamped image lies farther than a clean one, 0.5 where the trigger changes nothing.
    """
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:IMAGES]
    whiten, few = Whitening.of(features(known)), images[drawn]
    clean = whiten.distances(features(images))
    far = float(clean.quantile(BEYOND))
    found = []
    for trigger in triggers:
        stamped = whiten.distances(features.fresh(trigger(few)))
        found.append(
            Finding(
                DISTANCE,
                "reported",
                score=area(stamped, clean),
                reason=f"{trigger.spec()}: the whitened features of {len(few)} stamped images have a median norm of "
                f"{stamped.median():.1f}, those of {len(clean)} clean ones {clean.median():.1f}; "
                f"{100 * float((stamped > far).double().mean()):.0f} % lie beyond {100 * BEYOND:.0f} % of the clean. "
                "Not calibrated: it does not decide the verdict.",
                trigger=trigger.spec(),
            )
        )
    return found


def area(positive: Tensor, negative: Tensor) -> float:
    """The share of pairs in which a `positive` [n] is above a `negative` [m], ties counted half: in [0, 1]."""
    order = negative.sort().values
    below = torch.searchsorted(order, positive) + torch.searchsorted(order, positive, right=True)
    return float(below.double().mean() / (2 * len(negative)))


def crowded(first: Tensor, second: Tensor) -> Finding:
    """How many images of both halves, by their features [n d] and [m d], crowd as stamped ones would."""
    near = torch.cat(crowding(first, second))
    count = int((near < NEAR).sum())
    return Finding(
        CROWDING,
        "outlier" if count >= MANY * len(near) else "no-outlier",
        score=count / len(near),
        threshold=MANY,
        odd="above",
        reason=f"{count} of {len(near)} images look stamped: in whitened features they are nearer to "
        f"{NEIGHBOURS} images of the other half than {NEAR:g} of what is usual (nearest {near.min():.2f}). Copies of "
        "one picture do that, too. Not calibrated: it does not decide the verdict.",
    )
