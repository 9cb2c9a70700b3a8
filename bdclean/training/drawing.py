"""Masks and patterns that a small network draws for each image: the form of change of sample-specific triggers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bdclean.training.forms import Form, blended

SAMPLE_SPECIFIC = "sample-specific"
"""The name of the form."""
WIDTH = 8
"""Channels of the small network at full size."""
SHARPNESS = 4.0
"""By which what it draws is multiplied before it is squeezed into 0 to 1."""
SMALL_DRAWN = 0.27
"""The share of the median of masks for all images under which these are unusually small: of an input-aware trigger they
were at 0.15 to 0.24 over four seeds, of three clean networks at 0.297 and more."""
STARTS = 3
LEADING = 4
"""So many classes go on after the first round. How small a mask for all images is tells what is usual, for what other
classes need so is 60 to 1,000 pixels, far from its least after so few steps."""


class Drawing(nn.Module):
    """Draws a mask and a pattern, logits [n 1+c h w], for pixels [n c h w] in [0, 1], each from 19 x 19 of them.

    It is not the network of `triggers.inputaware`, whose backdoors it is measured on.
    """

    def __init__(self, channels: int, width: int = WIDTH) -> None:
        super().__init__()
        self.near = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.far = nn.Conv2d(2 * width, 2 * width, 3, padding=2, dilation=2)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.drawn = nn.Conv2d(2 * width, 1 + channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        near = F.relu(self.near(pixels - 0.5))
        far = F.relu(self.up(F.relu(self.far(F.relu(self.down(near))))))
        return SHARPNESS * self.drawn(torch.cat([near, F.interpolate(far, size=near.shape[2:])], 1))


def drawn(images: Tensor) -> Form:
    """A mask and a pattern for each image, by the weights of a small network [k m]; its size is the mean L1 norm, in
    pixels, of the masks of `images` uint8 [n c h w], a few, on the device that it is fitted on.

    Convolutions do not know where they are but by the border: a trigger at one place is found by masks for all images,
    and by these where there is something in the images that tells the place.
    """
    channels, height, width = images.shape[1:]
    network = Drawing(channels).to(images.device)
    shapes = {name: weight.shape for name, weight in network.named_parameters()}
    counts = [shape.numel() for shape in shapes.values()]
    usual = images.float() / 255

    def halves(row: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(shapes.items(), row.split(counts), strict=True)
        weights = {name: part.view(shape) for (name, shape), part in parts}
        # a quarter of the time of the other layout, on a processor
        both = functional_call(network, weights, (pixels.contiguous(memory_format=torch.channels_last),))
        return torch.sigmoid(both[:, :1]), torch.sigmoid(both[:, 1:])

    def stamp(parameters: Tensor, pixels: Tensor) -> Tensor:
        return torch.stack([blended(pixels, *halves(row, pixels)) for row in parameters])

    def sizes(parameters: Tensor) -> Tensor:
        return torch.stack([halves(row, usual)[0].sum(dim=(1, 2, 3)).mean() for row in parameters])

    def start(classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Weights as He et al. (2015) draw them, uniform; a mask is of about 0.5 everywhere."""
        parts = []
        for shape in shapes.values():
            bound = math.sqrt(6 / math.prod(shape[1:])) if len(shape) > 1 else 0.0
            uniform = torch.rand(
                (STARTS * classes, shape.numel()), generator=generator, device=generator.device
            )
            parts.append(bound * (2 * uniform - 1))
        return torch.cat(parts, 1).view(classes, STARTS, -1), torch.zeros(STARTS, dtype=torch.int64)

    def picture(row: Tensor) -> Tensor:
        """What it draws on grey: an image of the user's is never shown."""
        return stamp(row[None], torch.full_like(usual[:1], 0.5))[0, 0]

    return Form(
        SAMPLE_SPECIFIC, "patch", (sum(counts),), start, stamp, sizes, picture,
        said="a mask of {:.1f} pixels drawn for each image",
        steps=1.0, rate=0.02, last_rate=0.004, push=0.004, reach=math.inf, weight=1.024 / (height * width),
        goal=0.95, least=0.8, small=SMALL_DRAWN, together=LEADING,
    )  # fmt: skip
