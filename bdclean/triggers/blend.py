"""Blended injection: a faint picture over the whole image (Chen et al. 2017, arXiv 1712.05526)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.triggers.content import noise, picture
from bdclean.triggers.file import other_content
from bdclean.triggers.reading import Content, read_picture
from bdclean.triggers.stamping import Stamp, check_pixels, draw_seed, in_channels, overlay, spec_of

SOURCES = ("noise", "picture")


LARGEST = 512
"""A file's surrogates are drawn at so many pixels a side at most: of 2,000 a control took 1.5 s and 64 MB."""


@dataclass(frozen=True)
class Blend:
    """Blends noise, a drawn picture or a picture file over the whole image.

    What it does: alpha * picture + (1 - alpha) * image.
    When to use: the blended backdoor of most papers, whose strength is alpha 0.1 to 0.2.
    Needs: `source` is `noise` or `picture` (both from `seed`), or the path of a picture, which is resized. On grey
    images noise is drawn grey, and a picture turned grey.
    Limits: a blend finds its own picture, hardly another one. An attacker's noise cannot be drawn again from
    a seed of ours (not BCU's, nor BackdoorBench's): where the picture is known, give its file.
    """

    name: ClassVar[str] = "blend"
    family: ClassVar[str] = "blend"

    source: str = "noise"
    alpha: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise UsageError(f"blend needs alpha over 0 and up to 1, got {self.alpha}.")
        if self.seed < 0:
            raise UsageError(f"blend needs a seed of 0 or more, got {self.seed}.")
        if self.source not in SOURCES:
            _ = self.file  # a file that cannot be read is refused now, not in the middle of a scan

    @cached_property
    def file(self) -> Content:
        """What the picture file holds, at its own size; only where `source` is a path."""
        return read_picture(self.source, "blend", f"file:{self.source},alpha={self.alpha}")

    def content(self, height: int, width: int, channels: int = 3) -> Tensor:
        """What is blended in, grey levels [channels h w]."""
        if self.source in SOURCES:
            return _drawn(self.source, self.seed, height, width, channels)
        return _picture(self.file.resized((height, width)), channels)

    def __call__(self, images: Tensor) -> Tensor:
        check_pixels(images)
        channels, height, width = images.shape[1:]
        return overlay(images, self.alpha, self.content(height, width, channels))

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> list[Stamp]:
        """Noise or pictures of other seeds; for a file its surrogates: its colours and spectrum, other shapes."""
        if self.source not in SOURCES:
            height, width = self.file.shape
            less = min(1.0, LARGEST / max(height, width))
            size = max(1, round(less * height)), max(1, round(less * width))
            own = self.file.resized(size).in_channels(channels)
            others = [other_content(own, generator) for _ in range(count)]
            return [partial(_blend_file, content=other, alpha=self.alpha) for other in others]
        seeds = [draw_seed(generator) for _ in range(count)]
        # Stepping past the own seed keeps the trigger out of its controls.
        return [replace(self, seed=seed + 1 if seed == self.seed else seed) for seed in seeds]

    def spec(self) -> str:
        return spec_of(self)


@lru_cache(maxsize=64)
def _drawn(source: str, seed: int, height: int, width: int, channels: int) -> Tensor:
    if source == "noise":
        return torch.from_numpy(noise(seed, height, width, channels))
    return in_channels(torch.from_numpy(picture(seed, height, width)).float(), channels)


def _blend_file(images: Tensor, content: Content, alpha: float) -> Tensor:
    channels, height, width = images.shape[1:]
    return overlay(images, alpha, _picture(content.resized((height, width)), channels))


def _picture(content: Content, channels: int) -> Tensor:
    assert content.pattern is not None
    return in_channels(content.pattern, channels)
