"""Torch files of newer pickle protocols, rewritten into protocol 2 without unpickling anything.

torch's restricted unpickler knows the instructions of protocol 2, which torch.save writes unless it is told otherwise
(`pickle_protocol=4`). What protocols 3 to 5 write for tensors and tables are other words for the same: frames, shorter
strings, an implicit memo, names of classes taken from the stack.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MAGIC = b"PK\x03\x04"
# A file from before torch's archives begins with so many pickles; what follows are the tensors' bytes.
PICKLES_IN_LEGACY = 5
PROTOCOL = 2
# Instructions of protocols 3 to 5 that no table of tensors needs.
UNKNOWN = frozenset("EMPTY_SET ADDITEMS FROZENSET NEWOBJ_EX BYTEARRAY8 NEXT_BUFFER READONLY_BUFFER".split())


# Names of classes, which the stack may give again and again at a byte each, may be so much longer than the pickle.
MOST_NAMED = 2**20


class NoProtocol2(Exception):
    """Names the instruction that has no words in protocol 2."""


def opened(path: Path) -> IO[bytes]:
    """The torch file at `path` with its pickles in protocol 2: itself, or where they are newer, a copy in memory.

    Raises NoProtocol2. A damaged file is given as it is, for torch to say what is wrong with it.
    """
    with path.open("rb") as stream:
        if stream.read(4) != MAGIC:
            stream.seek(0)
            parts = _legacy(stream)
            return io.BytesIO(b"".join(parts)) if parts else path.open("rb")
    try:
        with zipfile.ZipFile(path) as archive:
            inner = data_of(archive)
            if inner is None or not newer(raw := archive.read(inner)):
                return path.open("rb")
            copy = io.BytesIO()
            with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as rewritten:
                for name in archive.namelist():
                    rewritten.writestr(name, in_protocol_2(raw) if name == inner else archive.read(name))
    except (ValueError, OSError, KeyError, zipfile.BadZipFile, NotImplementedError, OverflowError):
        return path.open("rb")
    copy.seek(0)
    return copy


def data_of(archive: zipfile.ZipFile) -> str | None:
    """The member of torch's archive that holds the pickle."""
    return next((name for name in archive.namelist() if name.split("/", 1)[-1] == "data.pkl"), None)


def newer(pickled: bytes) -> bool:
    """Whether a pickle says that it is of a protocol above 2."""
    return pickled[:1] == b"\x80" and pickled[1:2] > bytes([PROTOCOL])


def _legacy(stream: IO[bytes]) -> list[bytes]:
    """The pickles in protocol 2 and the rest of the file; empty where they are none of newer protocols."""
    if not newer(stream.read(2)):
        return []
    stream.seek(0)
    parts = []
    try:
        for _ in range(PICKLES_IN_LEGACY):
            begin = stream.tell()
            for _ in pickletools.genops(stream):
                pass
            end = stream.tell()
            stream.seek(begin)
            parts.append(in_protocol_2(stream.read(end - begin)))
    except (ValueError, OverflowError):
        return []
    return [*parts, stream.read()]


@dataclass
class _Word:
    """What one instruction became; `text` of one that pushes a string, `memo`: the place that it is kept at."""

    code: bytes
    text: str | None = None
    memo: int | None = None


def in_protocol_2(pickled: bytes) -> bytes:
    """The same pickle in the instructions of protocol 2; raises ValueError for a damaged one, and NoProtocol2.

    It is at most five times as long, and MOST_NAMED and its own length longer for names of classes.
    """
    words: list[_Word] = []
    kept: dict[int, str | None] = {}  # what the memo holds, None for anything but strings
    named = 0
    gone: set[int] = (
        set()
    )  # strings that were only pushed for the name of a class, and are not in the memo any more
    for name, argument, code in _instructions(pickled):
        if name in UNKNOWN:
            raise NoProtocol2(name)
        if name == "PROTO":
            words.append(_Word(bytes([0x80, PROTOCOL])))
        elif name == "FRAME":
            continue
        elif name in ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"):
            words.append(_Word(_string(argument), argument))
        elif name in ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"):
            # as protocol 2 itself writes bytes
            pair = _string(argument.decode("latin-1")) + _string("latin1")
            words.append(_Word(b"c_codecs\nencode\n" + pair + b"\x86R"))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            place = len(kept) if name == "MEMOIZE" else argument
            kept[place] = words[-1].text if words else None
            words.append(_Word(b"r" + struct.pack("<I", place), kept[place], place))
        elif name in ("BINGET", "LONG_BINGET"):
            text = kept.get(argument)
            words.append(_Word(b"j" + struct.pack("<I", argument), text))
            if argument in gone and text is not None:
                gone.remove(argument)
                words[-1].code = _string(text)
                words.append(_Word(b"r" + struct.pack("<I", argument), text, argument))
        elif name == "STACK_GLOBAL":
            last, first = _popped(words, gone), _popped(words, gone)
            words.append(_Word(f"c{first}\n{last}\n".encode()))
            named += len(words[-1].code)
            if named > MOST_NAMED + len(pickled):
                raise ValueError("names the same classes without end")
        else:
            words.append(_Word(code))
    return b"".join(word.code for word in words)


def _instructions(pickled: bytes) -> Iterator[tuple[str, Any, bytes]]:
    """Name, argument and bytes of each instruction."""
    found = [(opcode.name, argument, place) for opcode, argument, place in pickletools.genops(pickled)]
    ends = [place for _, _, place in found[1:]] + [len(pickled)]
    for (name, argument, place), end in zip(found, ends, strict=True):
        yield name, argument, pickled[place or 0 : end]


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _popped(words: list[_Word], gone: set[int]) -> str:
    """The string that the last instructions pushed, which are taken back."""
    text = words[-1].text if words else None
    if text is None or "\n" in text:
        raise ValueError("no name of a class on the stack")
    while words[-1].memo is not None:
        gone.add(words.pop().memo or 0)
    words.pop()
    return text
