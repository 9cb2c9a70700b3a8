"""Whitened features of an encoder, and which images crowd together in them.

Each direction is weighed by how little clean images spread along it. Attacks on encoders draw stamped images to one
place, where they are unusually near to each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3
"""An image crowds by how near its NEIGHBOURS-th nearest among the others is."""
AT_ONCE = 1_000
"""Images whose distances to all others are known at a time."""


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


def crowding(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """For both halves of the images, float64 [n] and [m]: the distance to the NEIGHBOURS-th nearest of the other half.

    `first` [n d] and `second` [m d] are features. A half is whitened by the other one's covariance, and the distances
    are shares of the half's median: an image among others that a trigger draws to its place is far below one.
    """

    def held_out(judged: Tensor, others: Tensor) -> Tensor:
        whiten = Whitening.of(others)
        there, nearest = whiten(others), min(NEIGHBOURS, len(others))
        # In parts: all distances at once would grow with the square of the images.
        near = torch.cat(
            [
                torch.cdist(part, there).topk(nearest, largest=False).values[:, -1]
                for part in whiten(judged).split(AT_ONCE)
            ]
        )
        return near / near.median().clamp_min(1e-300)

    return held_out(first, second), held_out(second, first)
