"""How good features are without training anything on them: weighted nearest neighbours (Wu et al. 2018, 1805.01978)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.networks.classifier import Classifier

NEIGHBOURS = 200
TEMPERATURE = 0.1
"""CTRL's; BadEncoder's is 0.5. A low one lets the nearest neighbours speak loudest."""


def features(encoder: Classifier, images: Tensor, device: torch.device, batch: int = 500) -> Tensor:
    """Float32 features [n d], on the CPU, of uint8 `images`; the encoder's mode is left as it was."""
    training = encoder.training
    encoder.to(device).eval()
    with torch.inference_mode():
        parts = [encoder(some.to(device)).float().cpu() for some in images.split(batch)]
    encoder.train(training)
    return torch.cat(parts)


def knn(
    memory: Tensor,
    labels: Tensor,
    queries: Tensor,
    classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The class of each of `queries` [m d] by its nearest of `memory` [n d], whose classes are `labels` [n].

    Each of the `neighbours` (at most n) most similar ones votes with exp(cosine / temperature).
    """
    memory, found = F.normalize(memory, dim=1), []
    for some in F.normalize(queries, dim=1).split(1000):
        similar, which = (some @ memory.T).topk(min(neighbours, len(memory)), dim=1)
        # less 1, so that nothing overflows: the ratios are the same
        weights = ((similar - 1) / temperature).exp()
        votes = torch.zeros(len(some), classes, device=weights.device)
        found.append(votes.scatter_add_(1, labels[which], weights).argmax(1))
    return torch.cat(found)
