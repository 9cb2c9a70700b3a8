"""An .npz of pixel arrays -> Listing. Nothing is unpickled, and rows are read one at a time, never a whole array."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path
from typing import IO

import numpy as np

from bdclean.data.decode import MAX_PIXELS, Picture, Unreadable
from bdclean.data.sources.listing import Listing
from bdclean.errors import Refused

IMAGES = ("images", "image", "imgs", "x", "data", "pixels", "arr_0")
LABELS = ("labels", "label", "y", "targets", "target", "classes", "fine_labels", "arr_1")
PARTS = ("train", "val", "valid", "test")
MAX_ROWS = 10_000_000
MOST_PIXELS = 0.9
"""More than this share of the first images must be in one range of pixels; the others are left out."""
PROBE = 256
"""So many images from the start say whether floats mean 0..1 or 0..255."""
DAMAGE = (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class _Array:
    """An array's place and form. `place` gives an image as [h w c] from one row."""

    member: str
    part: str
    shape: tuple[int, ...]
    dtype: np.dtype
    scale: float
    place: Callable[[np.ndarray], np.ndarray]

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize


def list_npz(path: Path, inside: str = "") -> Listing:
    """The images of an .npz: arrays named like `images` or `train_images`; `inside` is one such part.

    uint8, other integers from 0 to 255, or floats from 0 to 1 or 0 to 255; [n h w], [n h w c], [n c h w], or flat rows
    (of planes, as CIFAR's batches have). Raises Refused for anything else, a pickled array included.
    """
    try:
        with zipfile.ZipFile(path) as file:
            members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            pairs = _pairs(members, path)
            if inside:
                pairs = [pair for pair in pairs if pair[0] == inside]
                if not pairs:
                    raise Refused(f"{path} has no part {inside!r}: it holds {_shown(members)}.")
            arrays, labels = [], []
            for part, images, label in pairs:
                found = _images(file, members[images], part, path)
                arrays.append(found)
                labels.append(_labels(file, members[label], found.shape[0], path) if label else None)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror or error}.") from None
    except DAMAGE as error:
        raise Refused(f"{path} is damaged ({error}): get it again.") from None
    counts = [found.shape[0] for found in arrays]
    if sum(counts) > MAX_ROWS:
        raise Refused(f"{path} holds {sum(counts):,} images, more than the {MAX_ROWS:,} allowed.")
    several = len(arrays) > 1
    names = [
        f"{found.part + '/' if several else ''}{row:07}" for found in arrays for row in range(found.shape[0])
    ]
    said: list[str | None] | None = None
    if any(label is not None for label in labels):
        said = [
            value
            for label, count in zip(labels, counts, strict=True)
            for value in (label if label is not None else [None] * count)
        ]
    starts = np.cumsum([0, *counts])

    def fetch(indices: np.ndarray) -> Iterator[tuple[int, Picture]]:
        ordered = np.sort(indices)
        for found, start, end in zip(arrays, starts[:-1], starts[1:], strict=True):
            mine = ordered[(ordered >= start) & (ordered < end)]
            for index, row in zip(mine.tolist(), _rows(path, found, mine - start), strict=True):
                yield index, _picture(row, found)

    return Listing(str(path), names, fetch, said)


def _pairs(members: dict[str, zipfile.ZipInfo], path: Path) -> list[tuple[str, str, str | None]]:
    """(part, images, labels) by name; names are compared without case and without `part_` or `_part` around them."""
    plain = {name.lower(): name for name in members}

    def pick(words: tuple[str, ...], part: str) -> str | None:
        for word in words:
            for name in (f"{part}_{word}", f"{word}_{part}") if part else (word,):
                if name in plain:
                    return plain[name]
        return None

    found = []
    for part in ("", *PARTS):
        images = pick(IMAGES, part)
        if images is not None:
            found.append((part, images, pick(LABELS, part)))
    if not found:
        raise Refused(f"{path} has no array of images: name it 'images' or 'x' (it holds {_shown(members)}).")
    return found


def _shown(members: dict[str, zipfile.ZipInfo]) -> str:
    names = sorted(members)
    shown = ", ".join(repr(name[:40]) for name in names[:4])
    return f"{shown}, ..." if len(names) > 4 else shown or "nothing"


def _header(file: IO[bytes], name: str, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the array whose header is next in `file`; raises Refused for pickles and odd layouts."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file, max_header_size=10_000)
    if dtype.hasobject:
        raise Refused(f"{path}: {name!r} is pickled, which can run code when loaded: save plain numbers.")
    if fortran and len(shape) > 1:
        raise Refused(
            f"{path}: {name!r} is stored column by column: save it again with numpy.ascontiguousarray."
        )
    return shape, dtype


def _images(file: zipfile.ZipFile, info: zipfile.ZipInfo, part: str, path: Path) -> _Array:
    name = info.filename.removesuffix(".npy")
    with file.open(info) as opened:
        shape, dtype = _header(opened, name, path)
        place = _layout(shape)
        if place is None:
            raise Refused(
                f"{path}: {name!r} is {list(shape)}: give images as [n h w], [n h w 3] or [n 3 h w]."
            )
        if dtype.kind not in "uifb" or dtype.itemsize > 8:
            raise Refused(f"{path}: {name!r} holds {dtype}: give uint8, or floats from 0 to 1 or 0 to 255.")
        found = _Array(info.filename, part, shape, dtype, 1.0, place)
        if prod(shape[1:]) > 4 * MAX_PIXELS:
            raise Refused(f"{path}: {name!r} has images of {prod(shape[1:]):,} values, more than allowed.")
        if opened.tell() + shape[0] * found.row_bytes != info.file_size:
            raise Refused(f"{path} is damaged: {name!r} is {list(shape)} and has {info.file_size:,} bytes.")
        count = max(1, min(shape[0], PROBE, 64 * 2**20 // max(1, found.row_bytes)))
        raw = opened.read(count * found.row_bytes)
        values = np.frombuffer(raw, dtype)
    if dtype == np.uint8 or not len(values):
        return found
    # A row of no pixels, such as one of NaN, is left out when it is read; most must be pixels, in the others' range.
    each = values.reshape(count, -1)
    lows, highs = each.min(1), each.max(1)
    pixels = (lows >= 0) & (highs <= 255)  # false for NaN
    usual = highs[pixels] <= 1
    finite = each[np.isfinite(each)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (np.nan, np.nan)
    most = pixels.mean() > MOST_PIXELS
    if dtype.kind == "b" or (dtype.kind == "f" and most and usual.mean() > MOST_PIXELS):
        return _Array(info.filename, part, shape, dtype, 255.0, place)
    if not most:
        raise Refused(
            f"{path}: {name!r} has values from {low:g} to {high:g}: give pixels from 0 to 255 or 0 to 1, before "
            "normalisation."
        )
    return found


def _layout(shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray] | None:
    """What makes [h w c] of one row of an array of `shape`; None where that cannot be told."""
    if not all(side > 0 for side in shape[1:]):
        return None
    if len(shape) == 4 and shape[3] in (1, 3, 4):
        return lambda row: row
    if len(shape) == 4 and shape[1] in (1, 3, 4):
        return lambda row: row.transpose(1, 2, 0)
    if len(shape) == 3 and shape[2] > 4:  # else it is one picture alone
        return lambda row: row[:, :, None]
    if len(shape) == 2:
        for channels in (1, 3):
            side = isqrt(shape[1] // channels)
            if side >= 4 and channels * side * side == shape[1]:
                return lambda row: row.reshape(channels, side, side).transpose(1, 2, 0)
    return None


def _labels(file: zipfile.ZipFile, info: zipfile.ZipInfo, count: int, path: Path) -> list[str | None]:
    name = info.filename.removesuffix(".npy")
    with file.open(info) as opened:
        shape, dtype = _header(opened, name, path)
        size = prod(shape) * dtype.itemsize
        if opened.tell() + size != info.file_size:
            raise Refused(f"{path} is damaged: {name!r} is {list(shape)} and has {info.file_size:,} bytes.")
        if not shape or shape[0] != count or dtype.itemsize > 1024 or size > 2**31:
            raise Refused(f"{path}: {name!r} is {list(shape)} for {count:,} images: give one label an image.")
        values = np.frombuffer(opened.read(size), dtype).reshape(shape)
    if len(shape) == 2 and 1 < shape[1] <= 100_000 and ((values == 1).sum(1) == 1).all():
        values = values.argmax(1)  # one column a class
    values = values.reshape(-1)
    if len(values) != count or values.dtype.kind not in "uifUS":
        raise Refused(f"{path}: {name!r} is {list(shape)} of {dtype}: give one label an image.")
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and (values == np.rint(values)).all()):
            raise Refused(f"{path}: {name!r} has labels that are no whole numbers.")
        values = values.astype(np.int64)
    if values.dtype.kind == "S":
        return [value.decode("utf-8", "replace") for value in values.tolist()]
    return [str(value) for value in values.tolist()]


def _rows(path: Path, found: _Array, rows: np.ndarray) -> Iterator[np.ndarray | None]:
    """The rows of an array, in rising order; None from where the file is damaged."""
    done, position = 0, 0
    try:
        with zipfile.ZipFile(path) as file, file.open(found.member) as opened:
            _header(opened, found.member, path)
            for row in rows.tolist():
                while position < row:  # what lies between is unpacked, a little at a time
                    step = min(row - position, max(1, 2**20 // found.row_bytes))
                    opened.read(step * found.row_bytes)
                    position += step
                raw = opened.read(found.row_bytes)
                position += 1
                yield np.frombuffer(raw, found.dtype).reshape(found.shape[1:])
                done += 1
    except DAMAGE:
        for _ in range(len(rows) - done):
            yield None


def _picture(row: np.ndarray | None, found: _Array) -> Picture:
    """uint8 [h w 3] of one row, or why there is none."""
    if row is None:
        return Unreadable("damaged (the archive's checksum is wrong)")
    pixels = found.place(row)
    if pixels.dtype != np.uint8:
        scaled = pixels.astype(np.float64) * found.scale
        if not (np.isfinite(scaled).all() and scaled.min() >= 0 and scaled.max() <= 255):
            return Unreadable(f"values outside 0 to {255 / found.scale:g}")
        pixels = np.rint(scaled).astype(np.uint8)
    return np.ascontiguousarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3])
