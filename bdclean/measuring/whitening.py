"""Whitened features of an encoder: how far stamped images lie from clean ones, and which given images crowd together.

The Mahalanobis norm of a feature of length one weighs each direction by how little clean images spread along it, where
a trigger's signal was said to lie. Measured here (sample_models/tables/inversion.md): where one in a hundred images is
stamped, the features that a poisoned classifier rests on lie farther for it; where one in twenty is, they are in the
covariance themselves. Attacks on encoders leave stamped images as far as clean ones, or nearer, but draw them to one
place, where they are unusually near to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdclean.measuring.probe import Features
from bdclean.record.run import Finding
from bdclean.triggers.stamping import Trigger

DISTANCE, CROWDING = "whitened-distance", "crowding"
"""Names of the findings."""
IMAGES = 500
"""Stamped with each trigger, at most."""
BEYOND = 0.95
"""The quantile of clean images' distances that stamped ones are held against."""
NEIGHBOURS, NEAR, MANY = 3, 0.5, 0.004
"""An image crowds if its NEIGHBOURS-th nearest among the others is nearer than NEAR of the median image's. Of clean
images up to 0.0025 did, with eight encoders: from MANY on they are too many."""
LEAST = 100
"""Images of a half: with fewer nothing is said of single ones."""


@dataclass(frozen=True)
class Whitening:
    """The mean [d] of clean features and the lower Cholesky factor [d d] of their covariance, float64."""

    mean: Tensor
    factor: Tensor

    @staticmethod
    def of(features: Tensor) -> Whitening:
        """From `features` [n d] with the covariance shrunk as Ledoit and Wolf do, so that it can be inverted."""
        return Whitening(features.double().mean(0), torch.linalg.cholesky(shrunk_covariance(features)))

    def __call__(self, features: Tensor) -> Tensor:
        """`features` [n d] whitened, float64 [n d]: those of clean images have about unit covariance."""
        centred = (features.double() - self.mean).T
        return torch.linalg.solve_triangular(self.factor, centred, upper=False).T

    def distances(self, features: Tensor) -> Tensor:
        """Mahalanobis norms of `features` [n d], float64 [n]; of clean images about the root of d."""
        return self(features).norm(dim=1)


def shrunk_covariance(features: Tensor) -> Tensor:
    """The covariance of `features` [n d], float64 [d d], drawn towards a multiple of the identity.

    By the share that is best in the mean square for this n (Ledoit and Wolf 2004, "A well-conditioned estimator for
    large-dimensional covariance matrices"); at least a millionth, for features that never change.
    """
    n, d = features.shape
    centred = features.double() - features.double().mean(0)
    sample = centred.T @ centred / n
    identity = torch.eye(d, dtype=torch.float64)
    level = sample.trace() / d
    away = (sample - level * identity).square().sum()
    noise = (centred.square().sum(1).square().mean() - sample.square().sum()) / n
    share = float((noise / away.clamp_min(1e-300)).clamp(1e-6, 1.0))
    return (1 - share) * sample + share * level.clamp_min(1e-12) * identity


def stamped_distances(
    features: Features, known: Tensor, images: Tensor, triggers: Sequence[Trigger]
) -> list[Finding]:
    """How far `images` uint8 [n c h w] lie from clean ones when stamped, a finding for each of `triggers`.

    `known` uint8 [m c h w] are other images: the covariance is theirs. The score is the area under the ROC curve: how
    often a stamped image lies farther than a clean one, 0.5 where the trigger changes nothing.
    """
    whiten, few = Whitening.of(features(known)), images[:IMAGES]
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
            )
        )
    return found


def area(positive: Tensor, negative: Tensor) -> float:
    """The share of pairs in which a `positive` [n] is above a `negative` [m], ties counted half: in [0, 1]."""
    order = negative.sort().values
    below = torch.searchsorted(order, positive) + torch.searchsorted(order, positive, right=True)
    return float(below.double().mean() / (2 * len(negative)))


def crowding(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """For both halves of the images, float64 [n] and [m]: the distance to the NEIGHBOURS-th nearest of the other half.

    `first` [n d] and `second` [m d] are features. A half is whitened by the other one's covariance, and the distances
    are shares of the half's median: an image among others that a trigger draws to its place is far below one.
    """

    def held_out(judged: Tensor, others: Tensor) -> Tensor:
        whiten = Whitening.of(others)
        distances = torch.cdist(whiten(judged), whiten(others))
        near = distances.topk(min(NEIGHBOURS, len(others)), largest=False).values[:, -1]
        return near / near.median().clamp_min(1e-300)

    return held_out(first, second), held_out(second, first)


def crowded(first: Tensor, second: Tensor) -> Finding:
    """How many images of both halves, by their features [n d] and [m d], crowd as stamped ones would."""
    near = torch.cat(crowding(first, second))
    count = int((near < NEAR).sum())
    return Finding(
        CROWDING,
        "outlier" if count >= MANY * len(near) else "no-outlier",
        score=count / len(near),
        threshold=MANY,
        reason=f"{count} of {len(near)} images look stamped: in whitened features they are nearer to "
        f"{NEIGHBOURS} images of the other half than {NEAR:g} of what is usual (nearest {near.min():.2f}). Copies of "
        "one picture do that, too. Not calibrated: it does not decide the verdict.",
    )
