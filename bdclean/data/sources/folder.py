"""Folders -> Listing: every image file below them, in one order."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bdclean.data.decode import SNIFFED, SUFFIXES, Picture
from bdclean.data.sources.listing import HIDDEN, Listing, in_order, kind_without_ending
from bdclean.errors import Refused

SHARDS = (".tar", ".tar.gz", ".tgz", ".parquet")
"""Archives of which a folder may be made; others are named one at a time."""
MAX_FILES = 10_000_000


@dataclass
class Found:
    """What lies below a folder, as paths relative to `root`: images and archives sorted, others counted by suffix."""

    root: Path
    files: list[str]
    shards: list[str]
    others: Counter[str]
    empty: tuple[str, ...]


def list_folder(found: Found) -> Listing:
    """The images of a folder; one that cannot be read is only noticed when it is decoded."""
    fetch = partial(_fetch, str(found.root), found.files)
    return Listing(str(found.root), found.files, fetch, empty=found.empty, others=found.others)


def search(root: Path) -> Found:
    """Every image file below `root`, by suffix, or without one by its first bytes.

    Hidden ones are left out, links followed once.
    """
    # An archive often unpacks to one folder in another: its only folder stands for it.
    top = _entries(str(root))
    while len(top) == 1 and _own_folder(top[0]) and any(map(_is_folder, _entries(top[0].path))):
        root = Path(top[0].path)
        top = _entries(str(root))
    files: list[str] = []
    shards: list[str] = []
    others: Counter[str] = Counter()
    for relative in _walk(str(root)):
        suffix = os.path.splitext(relative)[1].lower()
        if suffix in SUFFIXES:
            files.append(relative)
        elif not suffix:
            kind = kind_without_ending(_start(f"{root}/{relative}"))
            if kind is None:
                files.append(relative)
            else:
                others[kind] += 1
        elif relative.lower().endswith(SHARDS):
            shards.append(relative)
        else:
            others[suffix] += 1
        if len(files) + len(shards) > MAX_FILES:
            raise Refused(f"{root} holds more than {MAX_FILES:,} images: give a part of it.")
    files.sort(key=in_order)
    shards.sort(key=in_order)
    filled = {file.split("/", 1)[0] for file in files if "/" in file}
    empty = sorted(entry.name for entry in top if _is_folder(entry) and entry.name not in filled)
    return Found(root, files, shards, others, tuple(empty))


def _start(path: str) -> bytes:
    """The first bytes of a file; none where it cannot be read, or is a pipe or a device, which may never end."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return b""
        with open(path, "rb") as file:
            return file.read(SNIFFED)
    except OSError:
        return b""


def _fetch(root: str, files: list[str], indices: np.ndarray) -> Iterator[tuple[int, Picture]]:
    for index in indices.tolist():
        yield index, f"{root}/{files[index]}"


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(HIDDEN)]
    except OSError as error:
        raise Refused(f"folder {folder} cannot be read: {error.strerror}.") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a file that cannot be read
        return False


def _own_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _walk(root: str) -> Iterator[str]:
    """Relative paths of all files; a folder met again through a link (or a loop) is not entered twice."""
    seen = {os.path.realpath(root)}
    waiting = [(root, "")]
    while waiting:
        folder, prefix = waiting.pop()
        folders = []
        for entry in _entries(folder):
            if _is_folder(entry):
                folders.append(entry)
            else:
                yield prefix + entry.name
        # real folders before links to them, so that a picture keeps its own path
        for entry in sorted(folders, key=lambda entry: (entry.is_symlink(), entry.name)):
            real = os.path.realpath(entry.path)
            if real not in seen:
                seen.add(real)
                waiting.append((entry.path, f"{prefix}{entry.name}/"))
