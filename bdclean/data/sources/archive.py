"""Tars -> Listing: one, or several shards of a set; folders of images, one tar a class, or webdataset samples."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bdclean.data.decode import MAX_BYTES, SUFFIXES, Picture, Slice, Unreadable
from bdclean.data.sources.listing import HIDDEN, Listing, in_order
from bdclean.data.sources.tar import MAX_MEMBERS, Archive, Member, members
from bdclean.errors import Refused
from bdclean.files import strictjson
from bdclean.files.text import decoded

MAX_NOTE = 256 * 1024  # bytes of a sample's .cls or .json
LABEL_KEYS = ("label", "cls", "class", "class_id", "class_index", "target", "y", "class_name", "label_name")


@dataclass
class _Found:
    """Images as parallel columns: a million of them must not take a million objects each."""

    names: list[str] = field(default_factory=list)
    shards: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    labels: dict[str, str] = field(default_factory=dict)
    """What a .cls or .json says, by the sample's key."""
    others: Counter[str] = field(default_factory=Counter)
    folders: set[str] = field(default_factory=set)


def list_tars(where: str, paths: Sequence[Path], inside: str = "") -> Listing:
    """The images of the tars `paths`, below the folder `inside` of them; raises Refused where one is damaged.

    With several, each one's stem stands before its names. Links, devices and names with `..` are passed over.
    """
    found = _Found()
    packed = []
    for number, path in enumerate(paths):
        stem = f"{path.name.split('.', 1)[0]}/" if len(paths) > 1 else ""
        with Archive(path) as archive:
            packed.append(archive.packed)
            for member in members(archive):
                _note(found, member, archive, number, stem, inside)
    if inside and not found.names:
        raise Refused(f"{where} has no images below {inside!r}.")
    cut = len(_wrapping(found.names)) if len(paths) == 1 else 0
    order = sorted(range(len(found.names)), key=lambda i: (in_order(found.names[i]), i))
    # a name that comes again replaces what came before, as it does when a tar is unpacked
    order = [
        i
        for i, after in zip(
            order, [*order[1:], None], strict=False
        )  # where there is none, nothing is after it
        if after is None or found.names[i] != found.names[after]
    ]
    keys = [_key(found.names[i]) for i in order] if found.labels else []
    labels = [found.labels.get(key) for key in keys]
    names = [found.names[i][cut:] for i in order]
    rows = np.array(order, dtype=np.int64)
    shards, offsets, sizes = (
        np.array(c, dtype=np.int64)[rows] for c in (found.shards, found.offsets, found.sizes)
    )

    def fetch(indices: np.ndarray) -> Iterator[tuple[int, Picture]]:
        for number, path in enumerate(paths):
            mine = indices[shards[indices] == number]
            mine = mine[np.argsort(offsets[mine], kind="stable")]
            yield from _stream(path, packed[number], mine, offsets, sizes)

    filled = {name.split("/", 1)[0] for name in names}
    empty = sorted({folder[cut:].split("/", 1)[0] for folder in found.folders} - filled - {""})
    said = labels if any(label is not None for label in labels) else None
    return Listing(
        where, names, fetch, said, empty=tuple(empty), others=found.others, stems_only=len(paths) > 1
    )


def _note(found: _Found, member: Member, archive: Archive, number: int, stem: str, inside: str) -> None:
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if ".." in parts:
        found.others["names with '..'"] += 1
        return
    name = "/".join(parts)
    if inside:
        if not name.startswith(f"{inside}/"):
            return
        name = name[len(inside) + 1 :]
    if not name or any(part.startswith(HIDDEN) for part in parts):
        return
    if member.kind == "folder":
        found.folders.add(f"{stem}{name}/")
        return
    suffix = os.path.splitext(name)[1].lower()
    if member.kind != "file":
        found.others[member.kind] += 1
    elif suffix in SUFFIXES or not suffix:
        if len(found.names) >= MAX_MEMBERS:
            raise Refused(f"{archive.path} and its kin hold more than {MAX_MEMBERS:,} images: give fewer.")
        found.names.append(stem + name)
        for column, value in (
            (found.shards, number),
            (found.offsets, member.offset),
            (found.sizes, member.size),
        ):
            column.append(value)
    else:
        label = None
        if suffix in (".cls", ".json") and member.size <= MAX_NOTE:
            label = _label(archive.read(member.size), suffix)
        if label is None:
            found.others[suffix] += 1
        else:
            found.labels[_key(stem + name)] = label


def _stream(
    path: Path, packed: bool, mine: np.ndarray, offsets: np.ndarray, sizes: np.ndarray
) -> Iterator[tuple[int, Picture]]:
    """The pictures `mine` of one tar: read on the way through if it is packed, else only where they lie."""
    if not packed:
        for index in mine.tolist():
            yield index, Slice(os.fspath(path), int(offsets[index]), int(sizes[index]))
        return
    if not len(mine):
        return
    with Archive(path) as archive:
        for index in mine.tolist():
            size = int(sizes[index])
            if size > MAX_BYTES:
                yield index, Unreadable(f"{size:,} bytes, more than the {MAX_BYTES:,} allowed")
                continue
            archive.skip_to(int(offsets[index]))
            yield index, archive.read(size)


def _wrapping(names: list[str]) -> str:
    """The folders around everything, as of an archive made of one folder; those that hold images stay."""
    cut = ""
    if not names:
        return cut
    while True:
        first, slash, rest = names[0][len(cut) :].partition("/")
        inner = f"{cut}{first}/"
        if not slash or not all(name.startswith(inner) for name in names):
            return cut
        if not any("/" in name[len(inner) :] for name in names):
            return cut
        cut = inner


def _key(name: str) -> str:
    """A webdataset sample's key: its name up to the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.split('.', 1)[0]}"


def _label(content: bytes, suffix: str) -> str | None:
    text = decoded(content, "replace").strip()
    if suffix == ".cls":
        return text[:200] or None
    try:
        said = strictjson.parse(text)
    except strictjson.NotJson:
        return None
    if isinstance(said, dict):
        said = next((said[key] for key in LABEL_KEYS if key in said), None)
    if isinstance(said, bool) or not isinstance(said, (int, str)):
        return None
    return str(said)[:200]
