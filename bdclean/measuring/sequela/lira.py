"""LiRA: which images was a network trained on, by shadow networks of which that is known?

The online attack of Carlini et al. (2022, arXiv 2112.03570). An easy image is given its class surely by a network that
has never seen it, a hard one by none: a threshold on the loss takes the first for a member. Here each image is held
against itself: how sure are networks of it that were trained on it, and how sure those that were not?
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdclean.errors import Refused

FEW = 64
"""With fewer shadow networks an image's own variance is of a handful of numbers: one is pooled over all images."""
LEAST_VARIANCE = 1e-12
"""Of networks that all answer alike."""


def halves(shadows: int, images: int, seed: int) -> Tensor:
    """Which shadow network is trained on which images, bool [shadows images]: a seeded draw.

    Every image is in for half of the networks, and the networks' shares are about half of the images each. Raises
    Refused for an odd number of networks.
    """
    if shadows % 2:
        raise Refused(f"every image is in for half of the shadow networks: {shadows} cannot be halved.")
    generator = torch.Generator().manual_seed(seed)
    # In each column a random order of the networks, of which the first half is taken.
    return torch.rand(shadows, images, generator=generator).argsort(0) < shadows // 2


def likelihood_ratios(asked: Tensor, shadows: Tensor, trained_on: Tensor) -> Tensor:
    """How much likelier each image is a member than not, log of the ratio, float64 [n]: higher for members, 0 for
    neither.

    `asked` float [n] are the margins (see `membership.margins`) of the network in question, `shadows` float [s n] those
    of shadow networks, `trained_on` bool [s n] which of these had the image. Of either kind of shadow networks each
    image's margins are taken for a Gaussian: with its own mean, and under FEW networks with one variance of all images,
    about their own means. Raises Refused where an image has under two networks of a kind.

    A departure: networks are asked about an image as it is, once, not about several views of it.
    """
    fewest = int(torch.minimum(trained_on.sum(0), (~trained_on).sum(0)).min())
    if fewest < 2:
        raise Refused(f"LiRA takes two shadow networks with each image, and two without: there are {fewest}.")
    asked, shadows = asked.double(), shadows.double()
    return _log_likelihood(asked, shadows, trained_on) - _log_likelihood(asked, shadows, ~trained_on)


def _log_likelihood(asked: Tensor, shadows: Tensor, chosen: Tensor) -> Tensor:
    """Of each margin under the Gaussian of the `chosen` shadow networks, up to a constant: float64 [n]."""
    count = chosen.sum(0)
    mean = shadows.where(chosen, 0).sum(0) / count
    squares = (shadows - mean).where(chosen, 0).square().sum(0)
    variance = squares.sum() / (count - 1).sum() if len(shadows) < FEW else squares / (count - 1)
    variance = variance.clamp_min(LEAST_VARIANCE)
    return -((asked - mean).square() / variance + variance.log()) / 2
