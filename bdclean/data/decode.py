"""One picture -> uint8 pixels at the network's input size. Files are hostile: every size is capped."""

from __future__ import annotations

import io
import math
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from bdclean.files.pictures import eight_bits

AVIF = "avif" in features.modules and features.check(
    "avif"
)  # Pillow before 11.3 does not know the word, and warns
# Pillow's other plugins are left out on purpose: EPS starts Ghostscript, others parse documents.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(("AVIF",) if AVIF else ()))
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .avif".split()
)
MAX_PIXELS = 64 * 2**20  # 192 MiB as RGB: above any camera's usual output, below Pillow's own warning at 89 M
MAX_BYTES = 256 * 2**20
LARGE = 16 * 2**20  # pictures of more pixels are decoded one at a time: many at once would fill the memory
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
_one_at_a_time = threading.Lock()
FILTERS = {filter.name.lower(): filter for filter in Image.Resampling}


STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", *(b"P%d" % k for k in range(1, 7)))
SNIFFED = 16
"""Bytes that `looks_like_image` wants to see."""


def looks_like_image(start: bytes) -> bool:
    """Whether a file that begins so is of one of FORMATS: of one without an ending nothing else tells."""
    webp, avif = start[:4] == b"RIFF" and start[8:12] == b"WEBP", start[4:12] == b"ftypavif"
    return webp or avif or start.startswith(STARTS)


class Unreadable(Exception):
    """Why one file gave no image; the message is a short phrase."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a file that holds one picture."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class Resize:
    """How a picture gets the network's input size: all of it is stretched, or its centre is cut out.

    `crop_pct`, in (0, 1], is timm's: the input's side over that of the shorter side which the picture is resized to
    before its centre is cut out; None stretches. `interpolation` is a name of FILTERS; all of them are antialiased.
    """

    crop_pct: float | None = None
    interpolation: str = "bilinear"

    def box(self, width: int, height: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part of a picture of `width` x `height` that is shown at `size` (height, width), in its pixels."""
        if self.crop_pct is None:
            return 0, 0, width, height
        # a hair more: 224 / (224 / 235) is 234.99...
        tall, wide = (math.floor(side / self.crop_pct + 1e-6) for side in size)
        if width * tall <= height * wide:
            resized = wide, int(wide * height / width)
        else:
            resized = int(tall * width / height), tall
        left, top = (round((r - side) / 2) for r, side in zip(resized, reversed(size), strict=True))
        x, y = width / resized[0], height / resized[1]
        return left * x, top * y, min(width, (left + size[1]) * x), min(height, (top + size[0]) * y)

    def spec(self) -> str:
        """What a record says of it."""
        crop = "stretched" if self.crop_pct is None else f"crop_pct={self.crop_pct:g}"
        return f"{crop}, {self.interpolation}"


STRETCH = Resize()

Picture = str | Path | bytes | Slice | np.ndarray | Unreadable
"""A file's path, an encoded picture, where one lies, pixels as uint8 [h w 3], or why there is none."""


def decode(
    picture: Picture, size: tuple[int, int], resize: Resize = STRETCH, channels: int = 3
) -> np.ndarray:
    """The picture's first frame as uint8 [channels h w], 3 (RGB) or 1 (grey); raises Unreadable.

    EXIF rotation is applied; palette, grey and CMYK become RGB. Alpha is dropped, as torchvision's ImageFolder
    does: these are the pixels that training saw. Grey is Pillow's mode L of the RGB pixels, which is torchvision's
    Grayscale of a picture. `resize` says how another size becomes `size` (height, width).
    """
    with _opened(picture) as image:
        if isinstance(picture, np.ndarray):
            return _fitted(image, size, resize, channels)
        return _pixels(image, size, resize, channels)


def size_of(picture: Picture) -> tuple[int, int]:
    """Height and width of the picture as it is shown; raises Unreadable."""
    with _opened(picture) as image:
        turned = not isinstance(picture, np.ndarray) and image.getexif().get(ORIENTATION, 1) in SIDEWAYS
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _opened(picture: Picture) -> Iterator[Image.Image]:
    """The picture as Pillow opens it; what is raised meanwhile becomes Unreadable."""
    try:
        if isinstance(picture, Unreadable):
            raise picture
        if isinstance(picture, np.ndarray):
            yield Image.fromarray(picture)
            return
        if isinstance(picture, Slice):
            picture = _read(picture)
        if isinstance(picture, bytes):
            _check_bytes(len(picture))
            with Image.open(io.BytesIO(picture), formats=FORMATS) as opened:
                yield opened
            return
        status = os.stat(picture)
        if not stat.S_ISREG(status.st_mode):  # a pipe or device behind a link would block or never end
            raise Unreadable("not a regular file")
        _check_bytes(status.st_size)
        with Image.open(picture, formats=FORMATS) as opened:
            yield opened
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
    with open(place.path, "rb") as file:
        file.seek(place.offset)
        return file.read(place.size)


def _pixels(image: Image.Image, size: tuple[int, int], resize: Resize, channels: int) -> np.ndarray:
    if image.width * image.height > MAX_PIXELS:
        raise Unreadable(f"{image.width} x {image.height}, more than the {MAX_PIXELS:,} pixels allowed")
    # A large JPEG is decoded at a fraction of its size, but at least twice the size wanted: alike, and faster.
    longest = math.ceil(2 * max(size) / (resize.crop_pct or 1))
    if image.width > longest or image.height > longest:
        image.draft(None, (longest, longest))
    with _one_at_a_time if image.width * image.height > LARGE else nullcontext():
        image.load()
        ranged = eight_bits(image)
        if ranged is None:
            raise Unreadable(f"{image.mode} pixels have no fixed range")
        return _fitted(_upright(ranged), size, resize, channels)


def _fitted(image: Image.Image, size: tuple[int, int], resize: Resize, channels: int) -> np.ndarray:
    height, width = size
    if image.mode != "RGB":
        image = image.convert("RGB")
    if channels == 1:
        image = image.convert("L")
    # Only what is shown is resized: a picture of one pixel's width would be resized to a very long one first.
    box = resize.box(*image.size, size)
    if (width, height, box) != (*image.size, (0, 0, *image.size)):
        image = image.resize((width, height), FILTERS[resize.interpolation], box)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    try:
        # transposing copies the image even where nothing is to be turned
        turned = image.getexif().get(ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged metadata of whatever kind: the pixels are fine
        return image
