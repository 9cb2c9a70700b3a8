"""The trigger of input-aware attacks: a mask and a pattern drawn for each image (Nguyen, Tran 2020, 2010.08138)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.errors import Refused
from bdclean.triggers import generators
from bdclean.triggers.content import surrogate
from bdclean.triggers.stamping import Stamp, check_pixels, draw_seed, spec_of

SHARPNESS = 10.0
"""By which a mask's values are multiplied before they are squeezed into 0 to 1: most end up at one of the two."""


ALIKE = 0.02
"""In [0, 1]: so little on average does content differ that is the same to a network."""


class Drawing(nn.Module):
    """A U-Net of two sizes that draws `planes` planes for an image, values of any size.

    There is no normalisation over the batch: what is drawn for an image must not depend on its neighbours.
    """

    def __init__(self, planes: int, width: int = generators.WIDTH) -> None:
        super().__init__()
        self.near = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.further = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.far = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.Conv2d(3 * width, width, 3, padding=1)
        self.drawn = nn.Conv2d(width, planes, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        near = F.relu(self.near(pixels - 0.5))
        far = F.relu(self.far(F.relu(self.further(F.relu(self.down(near))))))
        both = torch.cat([near, F.interpolate(far, size=near.shape[2:])], 1)
        return self.drawn(F.relu(self.up(both)))


class MaskAndPattern(nn.Module):
    """The two networks that draw an image's trigger, and the size of the images that they were trained on."""

    bound: Tensor
    size: Tensor

    def __init__(self, height: int = 0, width: int = 0) -> None:
        super().__init__()
        self.register_buffer("bound", torch.tensor(255.0))
        self.register_buffer("size", torch.tensor([float(height), float(width)]))
        self.mask_network = Drawing(1)
        self.pattern_network = Drawing(3)

    def mask(self, pixels: Tensor) -> Tensor:
        """Where the pattern goes, [n 1 h w] in [0, 1], for float `pixels` [n 3 h w] in [0, 1]."""
        return (SHARPNESS * self.mask_network(pixels)).tanh() / 2 + 0.5

    def pattern(self, pixels: Tensor) -> Tensor:
        """What goes there, [n 3 h w] in [0, 1]."""
        return self.pattern_network(pixels).tanh() / 2 + 0.5

    def lay(self, pixels: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
        return pixels + mask * (pattern - pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Stamped images."""
        return self.lay(pixels, self.mask(pixels), self.pattern(pixels))


@dataclass(frozen=True)
class InputAware:
    """Replaces a few pixels of each image by what two networks, learnt with the victim, draw for this very image.

    What it does: mask * pattern + (1 - mask) * image, both drawn from the image. Another image's do not fire.
    When to use: input-aware dynamic backdoors, where the attack's networks are at hand.
    Needs: `generator`, the safetensors file that the attack wrote.
    Limits: the authors' own networks are larger and are not read. A file is for images of one size.
    """

    name: ClassVar[str] = "inputaware"
    family: ClassVar[str] = "noise"

    generator: str

    def __post_init__(self) -> None:
        _ = self.networks  # a file that cannot be read is refused now, not in the middle of a scan

    @cached_property
    def networks(self) -> MaskAndPattern:
        """What draws masks and patterns, in double precision; raises Refused."""
        return generators.read(self.generator, MaskAndPattern())

    def __call__(self, images: Tensor) -> Tensor:
        self._check(images)
        return generators.stamp(images, self.networks)

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> Sequence[Stamp]:
        """Each image's own mask, with its pattern's surrogate: the same colours and spectrum in other shapes."""
        return [partial(self._other, seed=draw_seed(generator)) for _ in range(count)]

    def spec(self) -> str:
        return spec_of(self)

    def _other(self, images: Tensor, seed: int) -> Tensor:
        self._check(images)
        networks = self.networks.to(images.device)

        def stamped(pixels: Tensor) -> Tensor:
            pattern = networks.pattern(pixels)
            shapes = surrogate(pattern, torch.Generator().manual_seed(seed)).double().clamp(0, 1)
            # what is of one colour has no other shapes: it gets the opposite one
            same = (shapes - pattern).abs().mean((1, 2, 3), keepdim=True) < ALIKE
            return networks.lay(pixels, networks.mask(pixels), torch.where(same, 1 - shapes, shapes))

        return generators.over(images, stamped)

    def _check(self, images: Tensor) -> None:
        check_pixels(images)
        height, width = map(int, self.networks.size.tolist())
        if images.shape[2:] != (height, width):
            raise Refused(
                f"trigger {self.generator} is for images of {height} x {width}, "
                f"these are {images.shape[2]} x {images.shape[3]}."
            )
