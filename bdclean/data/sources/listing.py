"""What a source of images holds before any is decoded: names, where each one lies, and what is known of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from bdclean.data.decode import Picture, looks_like_image
from bdclean.files.text import plain

HIDDEN = (".", "__MACOSX", "@eaDir", "#recycle")
"""Beginnings of what systems leave beside people's files: Synology's thumbnails, macOS's resource forks."""
PICKLED = "pickles"
"""Among `Listing.others`: files of Python objects, as in CIFAR's official archives."""
SPLITS = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "labeled", "unlabeled")
)
"""Folder names that part a data set and are no classes."""

Fetch = Callable[[np.ndarray], Iterator[tuple[int, Picture]]]


@dataclass(frozen=True)
class Listing:
    """Images of a folder or archive, in a fixed order.

    `fetch` takes indices into `names` and yields each with what `decode` takes, in whatever order is cheap to read.
    `labels`: what the container itself says of each image (None: nothing), `classes`: names that those number.
    `empty`: folders without images; `others`: how many files were left out, by kind. `stems_only`: first folders are
    archives' names, which are labels only where they are known class names.
    """

    where: str
    names: Sequence[str]
    fetch: Fetch
    labels: Sequence[str | None] | None = None
    classes: tuple[str, ...] | None = None
    empty: tuple[str, ...] = ()
    others: Counter[str] = field(default_factory=Counter)
    stems_only: bool = False


def kind_without_ending(start: bytes) -> str | None:
    """What a file without an ending is among `Listing.others`, by its first bytes; None for a picture."""
    if looks_like_image(start):
        return None
    return PICKLED if start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" else "files without an ending"


def in_order(name: str) -> str:
    """A sort key that keeps a folder's files together: as if sorted part by part."""
    return name.replace("/", "\0")


def held(others: Counter[str]) -> str:
    """The most frequent kinds of files that were left out: '12 .txt, 3 links'."""
    return ", ".join(f"{count:,} {plain(kind)}" for kind, count in others.most_common(3))
