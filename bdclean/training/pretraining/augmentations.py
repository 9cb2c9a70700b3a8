"""Views of an image: crop, mirror, colour and blur for a whole batch at once, each image with its own draw.

Every function takes float images [n c h w] in [0, 1] and returns new ones of that shape and range. What torchvision
does image by image in many passes is two here: crop and mirror are one affine sampling, and brightness, contrast,
saturation, hue and grey are one affine map of each image's colours. Of grey images (c is 1) the last three leave all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

LUMINANCE = (0.299, 0.587, 0.114)
# From RGB to the two colour axes of YIQ; the third axis is the luminance.
CHROMA = ((0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclass(frozen=True)
class Views:
    """Draws a view of each image, as SimCLR does (arXiv 2002.05709, appendix A), strengths as for CIFAR-10.

    Departures: crops begin at `smallest` 0.2 of the area (MoCo v2's choice; SimCLR's is 0.08); colour changes come in
    one order and are clamped once; hue turns the colour plane of YIQ where torchvision goes through HSV.
    Zero strengths and probabilities, and a `smallest` of 1 with `stretch` 1, give the images back.
    """

    smallest: float = 0.2  # least share of the area that a crop keeps, in (0, 1]
    stretch: float = 4 / 3  # a crop's sides differ by up to this factor; 1 keeps the aspect
    mirrored: float = 0.5  # probability
    brightness: float = 0.4  # factor 1 - b to 1 + b
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # turns by up to this share of the circle, either way
    jittered: float = 0.8  # probability that an image's colours change at all
    grey: float = 0.2  # probability
    blurred: float = 0.0  # probability; SimCLR blurs ImageNet's images alone

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """New float images [n c h w] in [0, 1]; `images` may be uint8."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        if self.smallest < 1 or self.stretch > 1 or self.mirrored > 0:
            x = resized_crop(x, generator, self.smallest, self.stretch, self.mirrored)
        x = self.recolour(x, generator)
        return blur(x, generator, self.blurred) if self.blurred > 0 else x

    def recolour(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The colour changes alone."""
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        return recolour(images, generator, strengths, self.jittered, self.grey)


def resized_crop(
    images: Tensor, generator: torch.Generator, smallest: float, stretch: float, mirrored: float
) -> Tensor:
    """A rectangle of each image, enlarged to the whole, mirrored with probability `mirrored`.

    Its area is uniform in [smallest, 1] of the image's, its aspect log-uniform; a side that would be longer than the
    image is cut to it (torchvision draws again).
    """
    n, draw = len(images), partial(_uniform, images, generator)
    area = draw(n, smallest, 1.0)
    aspect = (draw(n, -1.0, 1.0) * math.log(stretch)).exp()
    wide, tall = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    right, down = draw(n, -1.0, 1.0) * (1 - wide), draw(n, -1.0, 1.0) * (1 - tall)
    turned = torch.where(draw(n, 0.0, 1.0) < mirrored, -wide, wide)
    zero = torch.zeros_like(wide)
    theta = torch.stack([turned, zero, right, zero, tall, down], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp(0, 1)


def recolour(
    images: Tensor,
    generator: torch.Generator,
    strengths: tuple[float, float, float, float],
    jittered: float,
    grey: float,
) -> Tensor:
    """Brightness, contrast, saturation and hue by `strengths`, then grey, as one affine map of each image's colours.

    The map is gain * matrix and an offset, since saturation, hue and grey leave grey colours and every luminance alone.
    """
    if not (any(strengths) and jittered) and not grey:
        return images
    n, draw = len(images), partial(_uniform, images, generator)
    coin = draw(n, 0.0, 1.0) < jittered
    brightness, contrast, saturation = (
        torch.where(coin, 1 + s * draw(n, -1.0, 1.0), 1.0) for s in strengths[:3]
    )
    angle = torch.where(coin, 2 * math.pi * strengths[3] * draw(n, -1.0, 1.0), 0.0)
    saturation = torch.where(draw(n, 0.0, 1.0) < grey, 0.0, saturation)
    luminance = images.new_tensor(LUMINANCE if images.shape[1] == 3 else (1.0,))
    mean = torch.einsum("nchw,c->n", images, luminance) / (images.shape[2] * images.shape[3])
    matrix = (brightness * contrast).view(n, 1, 1)
    if images.shape[1] == 3:
        matrix = matrix * _chroma_turns(saturation, angle)
    offset = ((1 - contrast) * brightness * mean).view(n, 1, 1)
    return (matrix @ images.flatten(2) + offset).clamp(0, 1).view_as(images)


def blur(images: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Gaussian blur of each image with that probability; sigma uniform in 0.1 to 2 pixels, as SimCLR's.

    The kernel is a tenth of the image wide, too, and at least three pixels.
    """
    n, c, height, width = images.shape
    radius = max(1, round(min(height, width) / 20))
    sigma = _uniform(images, generator, n, 0.1, 2.0)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-(offsets**2) / (2 * sigma.view(n, 1) ** 2))
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(c, 0)
    kept = _uniform(images, generator, n, 0.0, 1.0) >= probability
    padded = F.pad(images, (radius,) * 4, mode="replicate").view(
        1, n * c, *(s + 2 * radius for s in (height, width))
    )
    across = F.conv2d(padded, weights.view(n * c, 1, 1, -1), groups=n * c)
    smooth = F.conv2d(across, weights.view(n * c, 1, -1, 1), groups=n * c).view_as(images)
    return torch.where(kept.view(n, 1, 1, 1), images, smooth.clamp(0, 1))


def _chroma_turns(saturation: Tensor, angle: Tensor) -> Tensor:
    """Matrices [n 3 3] of RGB that scale and turn the colour plane and keep the luminance."""
    n = len(angle)
    axes = angle.new_tensor((LUMINANCE, *CHROMA))
    cosine, sine = saturation * angle.cos(), saturation * angle.sin()
    one, zero = torch.ones_like(angle), torch.zeros_like(angle)
    turn = torch.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine], 1).view(n, 3, 3)
    return torch.linalg.inv(axes) @ turn @ axes


def _uniform(like: Tensor, generator: torch.Generator, n: int, low: float, high: float) -> Tensor:
    return torch.rand(n, generator=generator, device=like.device) * (high - low) + low
