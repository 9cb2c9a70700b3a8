"""How alike two images look: structure, noise, and colours as people name them. Float images [n 3 h w] in [0, 1]."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
FLOORS = (0.01**2, 0.03**2)
"""Wang et al. 2004: the Gaussian window, and what keeps quotients of small means and variances stable."""


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """SSIM (Wang, Bovik, Sheikh, Simoncelli 2004), its mean over images, channels and places, in [-1, 1].

    Borders are padded with zeros on both sides of the comparison, as most implementations do.
    """
    offsets = torch.arange(WINDOW, device=first.device, dtype=first.dtype) - WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    line = line / line.sum()
    down, across = line.view(1, 1, -1, 1), line.view(1, 1, 1, -1)

    def mean(values: Tensor) -> Tensor:
        """Weighted around each pixel."""
        planes = values.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(planes, down, padding="same"), across, padding="same")

    means = mean(first), mean(second)
    variances = mean(first.square()) - means[0].square() + mean(second.square()) - means[1].square()
    together = mean(first * second) - means[0] * means[1]
    brightness = (2 * means[0] * means[1] + FLOORS[0]) / (means[0].square() + means[1].square() + FLOORS[0])
    return (brightness * (2 * together + FLOORS[1]) / (variances + FLOORS[1])).mean()


def signal_to_noise(first: Tensor, second: Tensor) -> Tensor:
    """PSNR of a batch in decibels: the higher the more alike, at most 100."""
    return -10 * (first - second).square().mean().clamp_min(1e-10).log10()


def colour_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared differences of hue (in radians), saturation, value (HSV) and lightness (HSL), summed; >= 0."""
    return (colours(first) - colours(second)).square().mean((0, 2, 3)).sum()


def colours(images: Tensor) -> Tensor:
    """Hue in [0, 2 pi), saturation and value of HSV and lightness of HSL, in [0, 1] each: float [n 4 h w]."""
    red, green, blue = images.unbind(1)
    value, largest = images.max(1)
    span = value - images.amin(1)
    steps = torch.stack([green - blue, blue - red, red - green], 1) / span.clamp_min(1e-6)[:, None]
    turned = steps.gather(1, largest[:, None])[:, 0] + 2 * largest
    hue = turned.remainder(6) * (math.pi / 3)
    return torch.stack([hue, span / value.clamp_min(1e-6), value, value - span / 2], 1)
