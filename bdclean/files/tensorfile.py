"""safetensors files read with distrust and written back exactly: same order, offsets, types and metadata.

Every number in a header is checked against the file's size before anything of that size is allocated. The reference
library is not used: it orders tensors and metadata its own way when writing, and a drop-in keeps the file's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from bdclean.errors import Refused
from bdclean.files import strictjson
from bdclean.files.text import shown
from bdclean.files.writing import replace

# The reference implementation's cap is 100 MB, which takes a gigabyte once it is parsed; vision networks' headers have
# under 1 MB and 5,000 tensors.
LARGEST_HEADER = 10_000_000
MOST_TENSORS = 20_000
MOST_VALUES = 1_200_000  # of JSON, where commas in metadata count as well
MOST_AXES = 64  # torch computes with no more
SHARE_OF_MEMORY = 0.8  # that one file's bytes may take

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = ("F64", "F32", "F16", "BF16")
# Types that may be carried over but never computed with here.
OPAQUE_BYTES = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8}
SIZES = {name: torch.empty(0, dtype=dtype).element_size() for name, dtype in DTYPES.items()} | OPAQUE_BYTES
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its type's name in safetensors, and where its bytes lie after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says it holds, checked against its size. `start`: offset of the first data byte."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    start: int
    digest: str


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file; raises Refused with the first thing found wrong."""
    where = shown(path)
    size = path.stat().st_size
    if size < 10:
        raise Refused(f"{where} is not a safetensors file: it has only {size} bytes; fetch it again.")
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > LARGEST_HEADER or length < 2:
            raise Refused(f"{where} {_instead(path, length)}.")
        if 8 + length > size:
            raise Refused(
                f"{where} is truncated: its header should have {length} bytes and the file has {size}; fetch it again."
            )
        raw = stream.read(length)
    parsed = _parse(raw, where)
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Refused(f"{where} has a broken header: its metadata is not a table of texts.")
    entries = tuple(_entry(name, value, where) for name, value in parsed.items())
    _check_cover(entries, size - 8 - length, where)
    return Header(entries, metadata, 8 + length, hashlib.sha256(raw).hexdigest())


def _instead(path: Path, length: int) -> str:
    """What a file is whose first 8 bytes are no header's length, from how it begins."""
    with path.open("rb") as stream:
        start = stream.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "is a web page, not a safetensors file: the download failed, fetch it again"
    if 10 * LARGEST_HEADER >= length > LARGEST_HEADER:
        return f"has a header of {length:,} bytes, more than the {LARGEST_HEADER:,} that are read"
    return f"is not a safetensors file: its first 8 bytes give a header of {length} bytes"


def _parse(raw: bytes, where: str) -> dict:
    many = Refused(f"{where} describes more than {MOST_TENSORS:,} tensors: no vision network has as many.")
    if raw.count(b'"data_offsets"') > MOST_TENSORS:  # before anything is made of them
        raise many
    try:
        parsed = strictjson.parse(raw, MOST_VALUES)
    except strictjson.NotJson as error:
        raise Refused(f"{where} has a broken header: {error}.") from None
    if not isinstance(parsed, dict) or raw[:1] != b"{":
        raise Refused(f"{where} has a broken header: it is not a table of tensors.")
    if len(parsed) > MOST_TENSORS:
        raise many
    return parsed


def _entry(name: str, value: object, where: str) -> Entry:
    def broken(what: str) -> Refused:
        return Refused(f"{where} has a broken header: {shown(name)} {what}.")

    if not isinstance(value, dict):
        raise broken("is not described by a table")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str):
        raise broken("has no type")
    if dtype not in SIZES:
        raise broken(f"has the unknown type {shown(dtype)}")
    if not isinstance(shape, list) or not all(_whole(n) for n in shape):
        raise broken("has a shape that is not a list of whole numbers")
    if len(shape) > MOST_AXES:
        raise broken(f"has {len(shape)} axes, more than the {MOST_AXES} that can be read")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole(n) for n in offsets):
        raise broken("has offsets that are not two whole numbers")
    begin, end = offsets
    # Python's integers do not overflow, so a product beyond 64 bits fails here like any other lie. That of a tensor
    # without elements is taken over its other axes: torch multiplies them for its strides.
    if math.prod(n or 1 for n in shape) * SIZES[dtype] > strictjson.LARGEST:
        raise broken(f"has the shape {shown(shape)}, whose size is beyond 63 bits")
    needed = math.prod(shape) * SIZES[dtype]
    if end - begin != needed:
        raise broken(f"is {dtype} of shape {shown(shape)}, which does not fill its {end - begin} bytes")
    return Entry(name, dtype, tuple(shape), begin, end)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_cover(entries: Iterable[Entry], size: int, where: str) -> None:
    """Tensors must follow one another without overlap or gap, up to the last byte."""
    at = 0
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != at:
            what = "overlaps another tensor" if entry.begin < at else "leaves a gap before it"
            raise Refused(f"{where} has a broken header: {shown(entry.name)} {what}.")
        at = entry.end
    if at > size:
        raise Refused(
            f"{where} is truncated: its tensors need {at} bytes and {size} are there; fetch it again."
        )
    if at < size:
        raise Refused(f"{where} has {size - at} bytes after its last tensor that no tensor owns.")


def read_tensors(path: Path, header: Header) -> tuple[dict[str, Tensor], str]:
    """All tensors, in the header's order and the file's own types, and the file's sha256.

    Booleans and types that torch has no name for here come as their bytes: other bytes than 0 and 1 are no booleans.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        # Checked, not tried: a sparse file costs its maker nothing, and zeroed memory is taken page by page until
        # the system kills somebody.
        if size > most_bytes():
            raise Refused(
                f"{shown(path)} has {size / 1e9:.1f} GB and this machine {_memory() / 1e9:.1f} GB of memory: "
                "use a larger one."
            )
        data = bytearray(size)
        view = memoryview(data)
        at = 0
        while at < size:
            got = stream.readinto(view[at : at + (1 << 24)])
            if not got:
                break
            digest.update(view[at : at + got])
            at += got
    last = max((e.end for e in header.entries), default=0)
    if at != header.start + last or hashlib.sha256(view[8 : header.start]).hexdigest() != header.digest:
        raise Refused(f"{shown(path)} changed while it was read: run again when nothing writes to it.")
    return {e.name: _tensor(data, header.start + e.begin, e) for e in header.entries}, digest.hexdigest()


def most_bytes() -> float:
    """How large a file may be that is read here."""
    return SHARE_OF_MEMORY * _memory()


def _memory() -> float:
    """Bytes of memory that this machine has; infinite where it does not say."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _tensor(data: bytearray, offset: int, entry: Entry) -> Tensor:
    known = entry.dtype in DTYPES and entry.dtype != "BOOL"
    dtype = DTYPES[entry.dtype] if known else torch.uint8
    shape = entry.shape if known or entry.dtype == "BOOL" else (entry.end - entry.begin,)
    if entry.end == entry.begin:
        return torch.empty(shape, dtype=dtype)
    if offset % SIZES[entry.dtype]:
        data, offset = data[offset : offset + entry.end - entry.begin], 0
    count = math.prod(shape)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).reshape(shape)


def lay_out(tensors: Mapping[str, Tensor]) -> tuple[Entry, ...]:
    """Entries for tensors that come from elsewhere, one after the other in the given order."""
    entries, at = [], 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        entries.append(Entry(name, NAMES[tensor.dtype], tuple(tensor.shape), at, end))
        at = end
    return tuple(entries)


def write_file(
    path: Path, entries: Iterable[Entry], metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> str:
    """Write and return the sha256; the same input gives the same bytes. What was at `path` stays until all is written.

    Raises Refused when there is no room or no permission.
    """
    entries = list(entries)
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for e in entries:
        table[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.begin, e.end]}
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    ordered = [tensors[e.name] for e in sorted(entries, key=lambda e: (e.begin, e.end))]

    def write(stream: IO[bytes]) -> str:
        digest = hashlib.sha256()
        for piece in (memoryview(len(raw).to_bytes(8, "little") + raw), *map(_bytes, ordered)):
            stream.write(piece)
            digest.update(piece)
        return digest.hexdigest()

    return replace(path, write)


def _bytes(tensor: Tensor) -> memoryview[int]:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
