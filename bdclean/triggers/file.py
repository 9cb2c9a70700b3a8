"""A trigger from a file: a picture with alpha, mask and pattern, or a delta to add."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from bdclean.errors import Refused, UsageError
from bdclean.triggers.content import surrogate
from bdclean.triggers.reading import Content, read_content
from bdclean.triggers.stamping import Stamp, add, check_pixels, check_position, overlay, places, spec_of

PARTS = 8  # of a mask; scattered pixels are one
DISTINCT = 48.0  # mean grey levels by which a control of flat colours differs from the trigger


@dataclass(frozen=True)
class File:
    """Stamps what a file holds.

    What it does: replaces or blends (mask * pattern + (1 - mask) * image), or adds a delta and clips.
    When to use: a trigger that is known as a file, from a paper's repository or from an inversion.
    Needs: a picture (its alpha is the mask), or `.npz` / `.safetensors` with `mask` and `pattern`, `pattern`
    alone (with `alpha`), or `delta`. Smaller than the input it is put at `position`, larger it is resized;
    `size` makes its longer side that many pixels first. `key=black` or `white` makes that colour transparent.
    On grey images it is turned grey.
    Limits: an opaque picture as large as the input is refused: it would leave nothing of the image.
    """

    name: ClassVar[str] = "file"

    path: str
    position: str = "bottom-right"
    margin: int = 0
    size: int = 0
    alpha: float = 1.0
    key: str = "none"

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise UsageError(f"file needs alpha over 0 and up to 1, got {self.alpha}.")
        if self.size < 0 or self.margin < 0:
            raise UsageError(f"file needs size and margin of 0 or more, got {self.size} and {self.margin}.")
        if self.key not in ("none", "black", "white"):
            raise UsageError(f"key {self.key!r} is unknown: give none, black or white.")
        check_position(self.position)
        _ = self.content  # a file that cannot be read is refused now, not in the middle of a scan

    @cached_property
    def content(self) -> Content:
        """The file's mask and pattern, or delta, at the file's own size."""
        return read_content(os.fspath(self.path), self.key)

    @property
    def family(self) -> str:
        """'patch' where under half of the image changes, else 'blend'; 'noise' where something is added."""
        if self.content.mask is None:
            return "noise"
        return "patch" if self.size or float((self.content.mask > 0).float().mean()) < 0.5 else "blend"

    def __call__(self, images: Tensor) -> Tensor:
        return self._stamp(images, self.content)

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> list[Stamp]:
        """The same mask with the pattern's surrogates (its colours and spectrum in other shapes).

        A flat pattern has none; it gets blocks of random colours. A delta keeps its energy and spectrum.
        """
        own = self.content.in_channels(channels)
        return [partial(self._stamp, content=other_content(own, generator)) for _ in range(count)]

    def spec(self) -> str:
        return spec_of(self, bare="path")

    def _stamp(self, images: Tensor, content: Content) -> Tensor:
        check_pixels(images)
        size = (images.shape[2], images.shape[3])
        content = self._fitted(content.in_channels(images.shape[1]), size)
        if content.delta is not None:
            return add(images, self.alpha * content.delta)
        assert content.mask is not None and content.pattern is not None
        mask = self.alpha * content.mask
        if float(mask.min()) > 0.99:
            raise Refused(
                f"{self.path} covers every pixel of {size[0]} x {size[1]}: give size=, alpha=, or a mask."
            )
        return overlay(images, mask, content.pattern)

    def _fitted(self, content: Content, size: tuple[int, int]) -> Content:
        """`content` on a canvas of `size` that is empty elsewhere."""
        height, width = content.shape
        if self.size:
            scale = self.size / max(height, width)
            height, width = max(1, round(height * scale)), max(1, round(width * scale))
        if height > size[0] or width > size[1]:
            height, width = size
        content = content.resized((height, width))
        if (height, width) == size:
            return content
        corners = places(self.position, self.margin, (height, width), size)
        return Content(
            *(_placed(part, corners, size) for part in (content.mask, content.pattern, content.delta))
        )


def other_content(content: Content, generator: torch.Generator) -> Content:
    """Content of the same mask and strength that is not `content`, nor close to it."""
    if content.delta is not None:
        own = content.delta
        parts = boxes((own != 0).any(0))
        for _ in range(20):
            other = torch.zeros_like(own)
            for part in parts:
                other[part] = surrogate(own[part], generator)
            if float((other - own).norm()) > 0.7 * float(own.norm()):
                return replace(content, delta=other)
        # A constant has no other phases: noise of the same energy.
        white = torch.randn(own.shape, generator=generator, device=generator.device).cpu()
        return replace(content, delta=white * own.norm() / white.norm().clamp_min(1e-12))
    assert content.mask is not None and content.pattern is not None
    inside = (content.mask > 0).expand_as(content.pattern)
    count = inside.sum((1, 2), keepdim=True).clamp_min(1)
    mean = (content.pattern * inside).sum((1, 2), keepdim=True) / count
    own = torch.where(inside, content.pattern, mean)
    deviation = float((own - mean)[inside].square().mean().sqrt())
    parts = boxes(inside.any(0))
    for _ in range(20):
        other = own.clone()
        for part in parts:
            other[part] = surrogate(own[part], generator)
        # What a mask cuts out of a surrogate has less or more contrast than the whole.
        drawn = float((other - mean)[inside].square().mean().sqrt())
        other = (mean + (other - mean) * (deviation / max(drawn, 1e-6))).clamp(0, 255)
        if float((other - own)[inside].abs().mean()) > max(12.0, 0.5 * deviation):
            return replace(content, pattern=other)
    for _ in range(100):
        cells = torch.rand(1, len(own), 3, 3, generator=generator, device=generator.device).cpu() * 255
        other = own.clone()
        for part in parts:
            height, width = own[part].shape[-2:]
            other[part] = functional.interpolate(cells, size=(height, width), mode="nearest")[0]
        if float((other - own)[inside].abs().mean()) >= DISTINCT:
            break
    return replace(content, pattern=other)


def boxes(mask: Tensor) -> list[tuple[slice, ...]]:
    """The boxes around the parts of a bool [h w] mask, as slices of [c h w]; of more than PARTS the box around all.

    Content is drawn inside them: on the whole canvas a small patch's would be spread out to next to nothing.
    """
    labels, count = ndimage.label(mask.numpy(), structure=np.ones((3, 3)))
    found = ndimage.find_objects(labels if count <= PARTS else mask.numpy().astype(int))
    return [(slice(None), *box) for box in found]


def _placed(part: Tensor | None, corners: list[tuple[int, int]], size: tuple[int, int]) -> Tensor | None:
    if part is None:
        return None
    canvas = part.new_zeros(part.shape[0], *size)
    height, width = part.shape[-2:]
    for row, column in corners:
        canvas[:, row : row + height, column : column + width] = part
    return canvas
