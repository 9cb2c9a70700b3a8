"""Trigger files -> mask, pattern or delta. Files are hostile: sizes are checked before allocation."""

from __future__ import annotations

import stat
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from bdclean.errors import Refused
from bdclean.files.pictures import eight_bits
from bdclean.files.text import shown
from bdclean.triggers.stamping import in_channels

MAX_BYTES = 64 * 2**20  # far more than any trigger
MAX_VALUES = 3 * 2048 * 2048
MAX_SIDE = 4096
KEYS = ("mask", "pattern", "delta")

Read = TypeVar("Read")


@dataclass(frozen=True)
class Content:
    """Either mask [1|c h w] in [0, 1] and pattern [c h w] in grey levels, or delta [c h w] in grey levels.

    c is 3 as it is read, and 1 once it was turned grey.
    """

    mask: Tensor | None = None
    pattern: Tensor | None = None
    delta: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        part = self.delta if self.pattern is None else self.pattern
        assert part is not None
        return part.shape[-2], part.shape[-1]

    def in_channels(self, channels: int) -> Content:
        """The same for images of 3 or 1 `channels`: on grey ones it makes grey of what it does to coloured ones."""
        if self.delta is not None:
            return Content(delta=in_channels(self.delta, channels))
        assert self.mask is not None and self.pattern is not None
        if len(self.mask) == 1 or channels == 3:
            return Content(self.mask, in_channels(self.pattern, channels))
        mask, laid = in_channels(self.mask, 1), in_channels(self.mask * self.pattern, 1)
        return Content(mask, laid / mask.clamp_min(1e-6))

    def resized(self, size: tuple[int, int]) -> Content:
        """The same at another size (bilinear, antialiased); hidden pixels do not bleed into the edge."""
        if size == self.shape:
            return self
        if self.delta is not None:
            return Content(delta=_resized(self.delta, size))
        assert self.mask is not None and self.pattern is not None
        mask = _resized(self.mask, size).clamp(0, 1)
        weighted = _resized(self.mask * self.pattern, size)
        pattern = torch.where(mask > 1e-3, weighted / mask.clamp_min(1e-3), _resized(self.pattern, size))
        return Content(mask, pattern.clamp(0, 255))


def read_content(path: str, key: str = "none") -> Content:
    """What a trigger file holds; raises Refused. `key` makes black or white of a picture transparent."""
    if Path(path).suffix.lower() not in (".npz", ".safetensors"):
        return _careful(path, lambda: _picture(path, key))
    if key != "none":
        raise Refused(f"trigger {path}: key is for pictures; of arrays a mask says what is transparent.")
    return _content(path, read_arrays(path, KEYS))


def read_picture(path: str, doing: str, instead: str) -> Content:
    """The picture at `path`, to blend or paste (`doing`); Refused for a delta, and for one that is masked somewhere.

    `instead`: the SPEC of a trigger that heeds a mask.
    """
    content = read_content(path)
    if content.mask is None:
        raise Refused(f"{path} has no picture to {doing}: use file:{path} for a delta.")
    if float(content.mask.min()) < 1:
        raise Refused(f"{path} has a mask or is transparent: use {instead}.")
    return content


def read_arrays(path: str, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Those arrays of an .npz or .safetensors file that are called one of `keys`; raises Refused."""
    read = _npz if Path(path).suffix.lower() == ".npz" else _safetensors
    return _careful(path, lambda: read(path, keys))


def _careful(path: str, read: Callable[[], Read]) -> Read:
    """What `read` reads of the file at `path`, which is looked at first; Refused, whatever it raises."""
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise Refused(f"trigger {path} is not a file: give a picture, .npz or .safetensors.")
        if status.st_size > MAX_BYTES:
            raise Refused(
                f"trigger {path} has {status.st_size:,} bytes, more than the {MAX_BYTES:,} allowed."
            )
        return read()
    except Refused:
        raise
    except OSError as error:
        raise Refused(f"trigger {path} cannot be read: {error.strerror or 'damaged'}.") from None
    except Exception as error:  # hostile bytes make Pillow, zipfile and numpy raise almost anything
        raise Refused(f"trigger {path} cannot be read: damaged ({type(error).__name__}).") from None


def _picture(path: str, key: str) -> Content:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of sizes that are refused here and of odd metadata
        image = Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "GIF"))
    with image:
        if max(image.size) > MAX_SIDE:
            raise Refused(
                f"trigger {path} is {image.width} x {image.height}, at most {MAX_SIDE} a side is allowed."
            )
        ranged = eight_bits(image)
        if ranged is None:
            raise Refused(f"trigger {path} has {image.mode} pixels, which have no fixed range.")
        pixels = torch.from_numpy(np.array(ranged.convert("RGBA"))).permute(2, 0, 1).float()
    pattern, mask = pixels[:3], pixels[3:] / 255
    if key != "none":
        # As if the picture had been laid over that colour: its distance from it is the opacity.
        ground = 0.0 if key == "black" else 255.0
        opacity = (pattern - ground).abs().amax(0, keepdim=True) / 255
        pattern = ground + (pattern - ground) / opacity.clamp_min(1 / 255)
        mask = mask * opacity
    if float(mask.max()) == 0:
        raise Refused(f"trigger {path} is transparent everywhere.")
    return Content(mask, pattern)


def _npz(path: str, keys: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name not in keys:
                continue
            with archive.open(member) as stream:
                version = npy.read_magic(stream)
                read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, column_major, dtype = read_header(stream)
                if dtype.hasobject or dtype.kind not in "fiub":
                    raise Refused(f"trigger {path}: {name} holds {dtype}, not numbers.")
                count = _checked(path, name, shape) * dtype.itemsize
                data = stream.read(count + 1)  # never more than announced, whatever the archive inflates to
            if len(data) != count:
                raise Refused(f"trigger {path}: {name} announces {count:,} bytes and holds others.")
            array = np.frombuffer(data, dtype)
            arrays[name] = array.reshape(shape[::-1]).T if column_major else array.reshape(shape)
    return arrays


def _safetensors(path: str, keys: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in keys:
                if name in names:
                    _checked(path, name, file.get_slice(name).get_shape())
                    tensor = file.get_tensor(name)
                    arrays[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except SafetensorError:
        raise Refused(f"trigger {path} is not a valid safetensors file.") from None
    return arrays


def _checked(path: str, name: str, shape: tuple[int, ...] | list[int]) -> int:
    """The number of values, if `shape` is one that a trigger can have."""
    if not 2 <= len(shape) <= 4 or min(shape) < 1 or max(shape) > MAX_SIDE:
        raise Refused(f"trigger {path}: {name} is {shown(list(shape))}, expected [3 h w], [h w 3] or [h w].")
    count = int(np.prod(shape, dtype=np.int64))
    if count > MAX_VALUES:
        raise Refused(f"trigger {path}: {name} is {shown(list(shape))}, too large for a trigger.")
    return count


def _content(path: str, arrays: dict[str, np.ndarray]) -> Content:
    if "delta" in arrays:
        if "pattern" in arrays or "mask" in arrays:
            raise Refused(f"trigger {path} has delta beside mask or pattern: keep one or the other.")
        delta = _planes(path, "delta", arrays["delta"])
        integral = arrays["delta"].dtype.kind in "iub"
        if not integral and float(delta.abs().max()) <= 1:
            delta = delta * 255
        if float(delta.abs().max()) > 255 or float(delta.abs().max()) == 0:
            raise Refused(f"trigger {path}: delta must lie in -255 to 255 and not be zero.")
        return Content(delta=delta.expand(3, -1, -1))
    if "pattern" not in arrays:
        raise Refused(f"trigger {path} has neither pattern nor delta.")
    pattern = _levels(path, "pattern", arrays["pattern"]).expand(3, -1, -1)
    if "mask" not in arrays:
        return Content(torch.ones(1, *pattern.shape[-2:]), pattern)
    mask = _planes(path, "mask", arrays["mask"])
    if arrays["mask"].dtype == np.uint8 and float(mask.max()) > 1:
        mask = mask / 255
    if float(mask.min()) < 0 or float(mask.max()) > 1 or float(mask.max()) == 0:
        raise Refused(f"trigger {path}: mask must lie in 0 to 1 and not be zero.")
    if mask.shape[-2:] != pattern.shape[-2:]:
        raise Refused(
            f"trigger {path}: mask is {list(mask.shape[-2:])} and pattern {list(pattern.shape[-2:])}."
        )
    return Content(mask, pattern)


def _levels(path: str, name: str, array: np.ndarray) -> Tensor:
    """Grey levels; floats of at most 1 are shares of 255."""
    planes = _planes(path, name, array)
    if array.dtype.kind in "iu" and float(planes.max()) == 1:
        raise Refused(
            f"trigger {path}: {name} holds the integers 0 and 1: save it as floats, or as 0 and 255."
        )
    if array.dtype.kind == "b" or (array.dtype.kind == "f" and float(planes.max()) <= 1):
        planes = planes * 255
    if float(planes.min()) < 0 or float(planes.max()) > 255:
        raise Refused(f"trigger {path}: {name} must lie in 0 to 255 (or 0 to 1).")
    return planes


def _planes(path: str, name: str, array: np.ndarray) -> Tensor:
    """[1|3 h w] float32 from [h w], [c h w], [h w c] or [1 c h w]."""
    if array.dtype.kind not in "fiub":
        raise Refused(f"trigger {path}: {name} holds {array.dtype}, not numbers.")
    values = torch.from_numpy(np.ascontiguousarray(array).astype(np.float32))
    if not bool(torch.isfinite(values).all()):
        raise Refused(f"trigger {path}: {name} holds NaN or infinite values.")
    if values.ndim == 4 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 2:
        values = values[None]
    elif array.ndim == 3 and array.shape[0] == 3 and array.shape[2] in (1, 3):
        flat = array.shape[2] == 3 and array.min() == array.max()
        if not flat and not np.array_equal(np.moveaxis(array, 2, 0), array):
            raise Refused(
                f"trigger {path}: {name} is {list(array.shape)}, whose colours may be on its first axis or on its "
                "last: save it as [1 c h w], or as a picture."
            )
    if values.ndim == 3 and values.shape[0] not in (1, 3) and values.shape[2] in (1, 3):
        values = values.permute(2, 0, 1)
    if values.ndim != 3 or values.shape[0] not in (1, 3):
        raise Refused(f"trigger {path}: {name} is {list(array.shape)}, expected [3 h w], [h w 3] or [h w].")
    return values


def _resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(planes[None], size=size, mode="bilinear", antialias=True)[0]
