"""One picture -> uint8 pixels at the network's input size. Files are hostile: every size is capped."""

from __future__ import annotations

import io
import os
import stat
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's other plugins are left out on purpose: EPS starts Ghostscript, others parse documents.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm".split())
MAX_PIXELS = 64 * 2**20  # 192 MiB as RGB: above any camera's usual output, below Pillow's own warning at 89 M
MAX_BYTES = 256 * 2**20
LARGE = 16 * 2**20  # pictures of more pixels are decoded one at a time: many at once would fill the memory
ORIENTATION = 0x0112
_one_at_a_time = threading.Lock()


class Unreadable(Exception):
    """Why one file gave no image; the message is a short phrase."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a file that holds one picture."""

    path: str
    offset: int
    size: int


Picture = str | Path | bytes | Slice | np.ndarray | Unreadable
"""A file's path, an encoded picture, where one lies, pixels as uint8 [h w 3], or why there is none."""


def decode(picture: Picture, size: tuple[int, int]) -> np.ndarray:
    """The picture's first frame as uint8 [3 h w]; raises Unreadable.

    EXIF rotation is applied; palette, grey and CMYK become RGB. Alpha is dropped, as torchvision's ImageFolder
    does: these are the pixels that training saw. Another size is stretched to `size` (bilinear, antialiased).
    """
    try:
        if isinstance(picture, Unreadable):
            raise picture
        if isinstance(picture, np.ndarray):
            return _fitted(Image.fromarray(picture), size)
        if isinstance(picture, Slice):
            picture = _read(picture)
        if isinstance(picture, bytes):
            _check_bytes(len(picture))
            with Image.open(io.BytesIO(picture), formats=FORMATS) as opened:
                return _pixels(opened, size)
        status = os.stat(picture)
        if not stat.S_ISREG(status.st_mode):  # a pipe or device behind a link would block or never end
            raise Unreadable("not a regular file")
        _check_bytes(status.st_size)
        with Image.open(picture, formats=FORMATS) as opened:
            return _pixels(opened, size)
    except Unreadable:
        raise
    except FileNotFoundError:
        raise Unreadable("dangling link or file gone") from None
    except PermissionError:
        raise Unreadable("permission denied") from None
    except UnidentifiedImageError:
        raise Unreadable("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise Unreadable(f"more than the {MAX_PIXELS:,} pixels allowed") from None
    except Exception as error:  # Pillow's plugins raise almost anything on damaged bytes
        raise Unreadable(f"damaged ({type(error).__name__})") from None


def _check_bytes(count: int) -> None:
    if count == 0:
        raise Unreadable("empty file")
    if count > MAX_BYTES:
        raise Unreadable(f"{count:,} bytes, more than the {MAX_BYTES:,} allowed")


def _read(place: Slice) -> bytes:
    _check_bytes(place.size)
    file = os.open(place.path, os.O_RDONLY)
    try:
        return os.pread(file, place.size, place.offset)
    finally:
        os.close(file)


def _pixels(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    if image.width * image.height > MAX_PIXELS:
        raise Unreadable(f"{image.width} x {image.height}, more than the {MAX_PIXELS:,} pixels allowed")
    # A large JPEG is decoded at a fraction of its size, but at least twice the size wanted: alike, and faster.
    longest = 2 * max(size)
    if image.width > longest or image.height > longest:
        image.draft(None, (longest, longest))
    with _one_at_a_time if image.width * image.height > LARGE else nullcontext():
        image.load()
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise Unreadable(f"{image.mode} pixels have no fixed range")
        return _fitted(_upright(image), size)


def _fitted(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    try:
        # transposing copies the image even where nothing is to be turned
        turned = image.getexif().get(ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged metadata of whatever kind: the pixels are fine
        return image
