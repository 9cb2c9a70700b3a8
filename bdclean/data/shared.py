"""What the runs of one command read alike: sources listed once, pictures decoded once a size, within a limit."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from bdclean.data.imageset import ImageSet
from bdclean.data.scratch import available
from bdclean.data.sources.listing import Listing
from bdclean.data.sources.opening import open_images

SHARE = 0.2
"""Of the memory that is available at first, decoded images may keep so much from one run to the next."""
LISTINGS, SETS = 4, 64
"""So many sources, and so many labellings of what was drawn from them, are remembered."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded images, uint8 [n c h w], as many of the `wanted` as could be read.

    `chosen`: which of the listing they are, rising; `paths`: their names; `skipped`: what could not be read, and why.
    """

    images: Tensor
    chosen: np.ndarray
    paths: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    wanted: int
    on_disk: bool


class Shared:
    """Listings, pixels and image sets that one run has read, for the next ones; none of them is ever written to.

    Pixels take `most` bytes (default: a share of what is available now): before others are decoded, those go that
    were used longest ago. A set that is larger alone stays until another one is decoded. A source is what it was when
    it was first read: files that come or change meanwhile are not seen.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = int(available() * SHARE) if most is None else most
        self._listings: dict[Path, Listing] = {}
        self._pixels: dict[Hashable, Pixels] = {}
        self._sets: dict[Hashable, tuple[Hashable, ImageSet]] = {}

    @property
    def held(self) -> int:
        """Bytes of the pixels that are kept now."""
        return sum(pixels.images.numel() for pixels in self._pixels.values())

    def listing(self, path: Path) -> Listing:
        """What `path` holds, listed the first time; raises Refused as `open_images` does."""
        listing = self._listings.pop(path, None) or open_images(path)
        self._listings[path] = listing  # the newest last
        _drop_oldest(self._listings, LISTINGS)
        return listing

    def pixels(self, key: Hashable, size: int, decode: Callable[[], Pixels]) -> Pixels:
        """The pixels under `key`, which says all that decides them; `decode` makes them, of `size` bytes at most."""
        pixels = self._pixels.pop(key, None)
        if pixels is None:
            self._make_room(size)
            pixels = decode()
        self._pixels[key] = pixels
        return pixels

    def found(self, key: Hashable) -> ImageSet | None:
        """The image set that was put under `key`, with its digest if that was asked for; None where it went."""
        found = self._sets.pop(key, None)
        if found is None:
            return None
        self._sets[key] = found
        under, images = found
        self._pixels[under] = self._pixels.pop(under)
        return images

    def put(self, key: Hashable, under: Hashable, images: ImageSet) -> None:
        """Remembers an image set that lies on the pixels that are `under` a key."""
        self._sets[key] = under, images
        _drop_oldest(self._sets, SETS)

    def _make_room(self, size: int) -> None:
        while self._pixels and self.held + size > self.most:
            gone = next(iter(self._pixels))
            del self._pixels[gone]
            self._sets = {key: (under, kept) for key, (under, kept) in self._sets.items() if under != gone}


def _drop_oldest(kept: dict, most: int) -> None:
    while len(kept) > most:
        del kept[next(iter(kept))]
