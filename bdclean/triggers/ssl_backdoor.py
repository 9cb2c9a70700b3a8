"""SSL-Backdoor's patch: opaque, at a place of its own in each image (Saha et al. 2022, arXiv 2105.10123)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import Refused, UsageError
from bdclean.triggers.badnets import BadNets
from bdclean.triggers.reading import Content, read_picture
from bdclean.triggers.stamping import Stamp, check_pixels, draw_seed, in_channels, spec_of

SAMPLES = 32
"""Rows and columns of an image that decide where its patch goes."""


@dataclass(frozen=True)
class SSLBackdoor:
    """Stamps a square patch, at a place that depends on the image.

    What it does: replaces a square of 50 of 224 pixels, anywhere within `inner` to 1 - `inner` of each side; the place
    is drawn from the image's own pixels and `seed`, so that an image always gets the same one.
    When to use: encoders whose pre-training set was poisoned with SSL-Backdoor (hidden-trigger patches).
    Needs: `patch` is `random` (4 x 4 colours from `colours`, enlarged, as the hidden-trigger patches are) or the path
    of a picture.
    Limits: the authors' patches cannot be drawn from a seed of ours: where one is known, give its file.
    """

    name: ClassVar[str] = "ssl-backdoor"
    family: ClassVar[str] = "patch"

    patch: str = "random"
    colours: int = 0
    size: int = 0
    inner: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 0 or not 0 <= self.seed < 2**63 or self.colours < 0 or not 0 <= self.inner < 0.5:
            raise UsageError(
                f"ssl-backdoor needs size, colours and seed (under 2^63) of 0 or more and inner from 0 to under 0.5, "
                f"got {self.size}, {self.seed}, {self.colours} and {self.inner}."
            )
        if self.patch != "random":
            _ = self.file  # a file that cannot be read is refused now, not in the middle of a scan

    @cached_property
    def file(self) -> Content:
        """What the patch's file holds, at its own size; only where `patch` is a path."""
        return read_picture(self.patch, "paste", f"file:{self.patch}")

    def content(self, side: int, channels: int = 3) -> Tensor:
        """The patch, grey levels [channels side side]."""
        if self.patch == "random":
            square = BadNets(side, pattern="random", cells=min(4, side), seed=self.colours)
            return torch.from_numpy(square.patch(channels)).float()
        pattern = self.file.resized((side, side)).pattern
        assert pattern is not None
        return in_channels(pattern, channels)

    def __call__(self, images: Tensor) -> Tensor:
        check_pixels(images)
        channels, height, width = images.shape[1:]
        side = patch_side(self.size, height, width)
        if side > min(height, width):
            raise Refused(f"a patch of {side} x {side} does not fit into images of {height} x {width}.")
        patch = self.content(side, channels).round().clamp(0, 255).to(torch.uint8).to(images.device)
        top, left = self._places(images, side)
        rows = torch.arange(height, device=images.device)[None, :] - top[:, None]
        columns = torch.arange(width, device=images.device)[None, :] - left[:, None]
        inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
        pasted = patch[:, rows.clamp(0, side - 1)[:, :, None], columns.clamp(0, side - 1)[:, None, :]]
        return torch.where(inside[:, None], pasted.transpose(0, 1), images)

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> Sequence[Stamp]:
        """Patches of other random colours at the same places."""
        drawn: list[Stamp] = []
        while len(drawn) < count:
            other = draw_seed(generator)
            if self.patch != "random" or other != self.colours:
                drawn.append(replace(self, patch="random", colours=other))
        return drawn

    def spec(self) -> str:
        return spec_of(self)

    def _places(self, images: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Top and left of each image's patch, int64 [n] each."""
        height, width = images.shape[2:]
        sampled = images[:, :, :: max(1, height // SAMPLES), :: max(1, width // SAMPLES)].flatten(1).long()
        generator = torch.Generator().manual_seed(self.seed)
        weights = torch.randint(1, 2**20, (2, sampled.shape[1]), generator=generator).to(images.device)
        drawn = [(sampled * w).sum(1) % 65521 for w in weights]  # a prime, so that all bits count
        return _spread(drawn[0], self.inner, height, side), _spread(drawn[1], self.inner, width, side)


def patch_side(size: int, height: int, width: int) -> int:
    """A patch's side in pixels: `size`, or the authors' share of images of this size."""
    return size or max(1, round(min(height, width) * 50 / 224))


def _spread(drawn: Tensor, inner: float, length: int, side: int) -> Tensor:
    """Places of a span of `side` within the middle of `length`; of those that do not fit there, the nearest."""
    low = min(round(inner * length), length - side)
    high = max(low, round((1 - inner) * length) - side)
    return low + drawn % (high - low + 1)
