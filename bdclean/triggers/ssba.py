"""SSBA: a message hidden in each image, whose traces depend on the image (Li et al. 2021, arXiv 2012.03816)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.triggers import generators
from bdclean.triggers.stamping import Stamp, spec_of

BITS = 16
"""Of a message."""
SIDE = 8
"""Of the planes that a message is written on, before they are enlarged to the image."""


class Steganographer(nn.Module):
    """Hides a message of BITS bits in images, changing each pixel by at most `bound` grey levels.

    A U-Net of two sizes beside which the message lies as three more colours; `message` is the one that a trigger hides.
    There is no normalisation over the batch: an image's stamp must not depend on its neighbours.
    """

    bound: Tensor
    message: Tensor

    def __init__(self, bound: float = 0.0, width: int = generators.WIDTH) -> None:
        super().__init__()
        self.register_buffer("bound", torch.tensor(float(bound)))
        self.register_buffer("message", torch.zeros(BITS))
        self.written = nn.Linear(BITS, 3 * SIDE * SIDE)
        self.near = nn.Conv2d(6, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.far = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.Conv2d(3 * width + 3, width, 3, padding=1)
        self.change = nn.Conv2d(width, 3, 1)

    def hide(self, pixels: Tensor, messages: Tensor) -> Tensor:
        """Images of float `pixels` [n 3 h w], both in [0, 1], with `messages` [n BITS] of 0 and 1 in them."""
        size = pixels.shape[2:]
        written = self.written(2 * messages - 1).view(-1, 3, SIDE, SIDE)
        beside = F.interpolate(written, size=size)
        near = F.relu(self.near(torch.cat([pixels - 0.5, beside], 1)))
        far = F.relu(self.far(F.relu(self.down(near))))
        both = torch.cat([near, F.interpolate(far, size=size), beside], 1)
        change = self.change(F.relu(self.up(both))).tanh()
        return (pixels + self.bound / 255 * change).clamp(0, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Stamped images: with `message` in them."""
        return self.hide(pixels, self.message.expand(len(pixels), -1))


@dataclass(frozen=True)
class SSBA:
    """Hides a message in each image by a network that the attack trained.

    What it does: each pixel changes by at most the bound in the network's file, as it sees fit for image and message.
    When to use: sample-specific invisible backdoors, where the attack's network is at hand.
    Needs: `generator`, the safetensors file that the attack wrote.
    Limits: the authors hide text with StegaStamp, a larger network whose files are not read; where only images before
    and after are known, no file can be made of them.
    """

    name: ClassVar[str] = "ssba"
    family: ClassVar[str] = "noise"

    generator: str

    def __post_init__(self) -> None:
        _ = self.network  # a file that cannot be read is refused now, not in the middle of a scan

    @cached_property
    def network(self) -> Steganographer:
        """What hides the message, in double precision; raises Refused."""
        return generators.read(self.generator, Steganographer())

    def __call__(self, images: Tensor) -> Tensor:
        return generators.stamp(images, self.network)

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> Sequence[Stamp]:
        """Changes as strong on each image and of the same spectrum, in other shapes and colours.

        Other messages are no control: their traces have much in common with the trigger's.
        """
        return generators.controls(self.network, count, generator)

    def spec(self) -> str:
        return spec_of(self)
