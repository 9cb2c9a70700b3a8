"""An encoder's own clusters of clean features, and the head that makes a classifier of it: clusters are its classes."""

from __future__ import annotations

import warnings

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.training.run import Run

SHARPNESS = 10.0
"""Logits are so many times a cosine: the softmax of a feature in the middle of its cluster is near one."""


def clusters(features: Tensor, count: int, seed: int) -> Tensor:
    """Up to `count` groups of centred `features` [n d] by k-means, int64 [n]; none is empty."""
    centred = F.normalize(features - features.mean(0), dim=1)
    with warnings.catch_warnings():
        # Of fewer different images than clusters k-means says that some are empty: those are left out below.
        warnings.simplefilter("ignore")
        _, groups = kmeans2(centred.double().numpy(), count, minit="++", seed=seed, iter=30, missing="warn")
    kept = torch.from_numpy(groups).long().unique(return_inverse=True)[1]
    return kept


def unit_features(encoder: nn.Module, images: Tensor, run: Run, size: int = 256) -> Tensor:
    """Features of length one of `images` uint8 [n c h w], float32 [n d] on the run's device, without gradients."""
    with torch.no_grad():
        parts = [
            F.normalize(run.forward(encoder, part.to(run.device).float() / 255).float().flatten(1), dim=1)
            for part in images.split(size)
        ]
    return torch.cat(parts)


class Clustered(nn.Module):
    """`encoder` with logits [n count]: cosines of its centred features with the means of clean ones' clusters.

    `features` [n d] of length one and their `groups` int64 [n] are those of clean images.
    """

    centre: Tensor
    means: Tensor

    def __init__(self, encoder: nn.Module, features: Tensor, groups: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        centre = features.mean(0)
        directions = F.normalize(features - centre, dim=1)
        sums = torch.zeros(int(groups.max()) + 1, features.shape[1], device=features.device)
        self.register_buffer("centre", centre)
        self.register_buffer("means", F.normalize(sums.index_add(0, groups, directions), dim=1))

    def forward(self, images: Tensor) -> Tensor:
        features = F.normalize(self.encoder(images).float().flatten(1), dim=1)
        return SHARPNESS * F.linear(F.normalize(features - self.centre, dim=1), self.means)
