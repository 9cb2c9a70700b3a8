"""The members of a tar, one after another and never extracted. Every number in a header is checked before it is used.

The formats: POSIX ustar and pax, GNU long names, old GNU sparse files (passed over), GNU's and star's large numbers.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bdclean.errors import Refused

BLOCK = 512
MAX_MEMBERS = 10_000_000
MAX_HEADER = 64 * 1024  # bytes of a long name or a pax header
MAX_EXPANSION, FREE_EXPANSION = 200, 2**30
"""A compressed archive may hold so many times its own size: photographs hardly shrink, bombs grow a thousandfold.
The first GiB is free: tiny archives of drawings do shrink that much."""


@dataclass(frozen=True, slots=True)
class Member:
    """One entry: `kind` is 'file', 'folder' or what it is else; its content is at `offset` of the unpacked archive.

    `target`: what a link points to, by the archive's own names if it is `hard`.
    """

    name: str
    kind: str
    offset: int
    size: int
    target: str = ""
    hard: bool = False


KINDS = {b"1": "links", b"2": "links", b"3": "devices", b"4": "devices", b"6": "pipes", b"S": "sparse files"}


class Archive:
    """The bytes of a tar, unpacked on the way, read forwards only. Raises Refused where they are damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        try:
            self._raw = open(path, "rb")
            self._size = os.fstat(self._raw.fileno()).st_size
            self._limit = max(FREE_EXPANSION, MAX_EXPANSION * self._size)
            self.packed = self._raw.read(2) == b"\x1f\x8b"
            self._raw.seek(0)
        except OSError as error:
            raise Refused(f"{path} cannot be read: {error.strerror}.") from None
        self._file = gzip.GzipFile(fileobj=self._raw) if self.packed else self._raw

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._raw.close()

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end."""
        try:
            data = self._file.read(count)
        except (OSError, EOFError, zlib.error) as error:
            raise Refused(
                f"{self.path} is damaged or cut short after {self.position:,} bytes ({error}): get it again."
            ) from None
        self.position += len(data)
        if self.packed and self.position > self._limit:
            raise Refused(
                f"{self.path} unpacks to more than {MAX_EXPANSION} times its size: images do not, so it is not read."
            )
        return data

    def skip_to(self, position: int) -> None:
        """Goes forward to `position`; the end of the file may lie before it."""
        if not self.packed:
            if position > self._size:
                raise Refused(f"{self.path} is cut short at {self._size:,} bytes: get it again.")
            self._raw.seek(position)
            self.position = position
            return
        while self.position < position:
            if not self.read(min(2**20, position - self.position)):
                raise Refused(f"{self.path} is cut short at {self.position:,} bytes: get it again.")


def members(archive: Archive) -> Iterator[Member]:
    """Every entry of the archive in its order. Between two of them, the caller may read the content of the first."""
    name, target, size = "", "", None  # what a header before the member says of it
    sparse = False
    for _ in range(3 * MAX_MEMBERS):
        start = archive.position
        header = archive.read(BLOCK)
        if not header.strip(b"\0"):  # two empty blocks at the end; some writers leave one, or none
            if start == 0:
                raise Refused(f"{archive.path} is not a tar, or an empty one.")
            return
        kind = _check(header, archive, start)
        length = _number(header[124:136], archive, start)
        if kind == b"S":
            more = header[482] != 0
            while more:  # lists of holes that did not fit into the header
                block = archive.read(BLOCK)
                if len(block) < BLOCK:
                    raise Refused(f"{archive.path} is cut short at {archive.position:,} bytes: get it again.")
                more = block[504] != 0
        offset = archive.position
        if kind in (b"L", b"K", b"x", b"g", b"X"):
            if length > MAX_HEADER:
                raise Refused(
                    f"{archive.path} has a header of {length:,} bytes at byte {start:,}: no image's name is that long."
                )
            content = archive.read(length)
            if kind == b"L":
                name = _text(content)
            elif kind == b"K":
                target = _text(content)
            elif kind in (b"x", b"X"):
                said = _records(content)
                name = _text(said.get(b"path", b"")) or name
                target = _text(said.get(b"linkpath", b"")) or target
                size = int(said[b"size"]) if said.get(b"size", b"").isdigit() else None
                sparse = any(key.startswith(b"GNU.sparse") for key in said)
        else:
            length = length if size is None else size
            shown = name or _short_name(header)
            regular = kind in (b"0", b"\0", b"7")
            what = KINDS.get(kind, "others")
            if kind == b"5" or (regular and shown.endswith("/")):
                what = "folder"
            elif regular:
                what = "sparse files" if sparse else "file"
            if kind in b"123456":
                length = 0  # some writers state the size of what is linked to; no content follows
            points = (target or _text(header[157:257])) if what == "links" else ""
            yield Member(shown, what, offset, length, points, kind == b"1")
            name, target, size, sparse = "", "", None, False
        archive.skip_to(offset + -(-length // BLOCK) * BLOCK)
    raise Refused(f"{archive.path} has more than {MAX_MEMBERS:,} members: split it.")


def _check(header: bytes, archive: Archive, start: int) -> bytes:
    """The header's type; raises Refused unless its checksum is right."""
    if len(header) == BLOCK:
        said = header[148:156].strip(b" \0")
        right = sum(header[:148]) + 256 + sum(header[156:])
        if said and all(48 <= c <= 55 for c in said) and int(said, 8) == right:
            return header[156:157]
    if start == 0:
        raise Refused(f"{archive.path} is not a tar.")
    raise Refused(f"{archive.path} is damaged or cut short at byte {start:,}: get it again.")


def _number(text: bytes, archive: Archive, start: int) -> int:
    if text[0] == 0x80:
        value = int.from_bytes(text[1:], "big")
        if value < 2**62:
            return value
    else:
        digits = text.strip(b" \0")
        if all(48 <= c <= 55 for c in digits):
            return int(digits or b"0", 8)
    raise Refused(f"{archive.path} is damaged at byte {start:,}: a member's size is no number.")


def _records(content: bytes) -> dict[bytes, bytes]:
    """A pax header's KEY=VALUE records; what cannot be read ends them."""
    found: dict[bytes, bytes] = {}
    while content:
        length, space, _ = content[:20].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 1 < int(length) <= len(content):
            break
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key] = value
        content = content[int(length) :]
    return found


def _short_name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
