"""One hostile file, the command line that meets it, and how the run must end."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from bdclean.networks.families.residual import ResidualNetwork

MODEL = "good.safetensors"
IMAGES = "images"
SCAN = ("scan", "m.safetensors", "--data", IMAGES, "-q")


@dataclass(frozen=True)
class Case:
    """`write` gets a folder that holds a good model and good images, and puts the hostile file there.

    `said`: words of the one sentence on standard error. Where `codes` has more than 3, the file may be taken as well,
    and only a crash, a hang or memory is wrong. `memory`: bytes beyond twice the files on the disk that a run on
    good files does not take; `seconds` of processor time, of which a loaded machine needs no more.
    """

    name: str
    write: Callable[[Path], object]
    said: str = ""
    argv: tuple[str, ...] = SCAN
    codes: tuple[int, ...] = (3,)
    slow: bool = False
    memory: int = 80 * 2**20  # of what is imported and built late: timm and pyarrow among it
    seconds: float = 15.0

    @property
    def refused(self) -> bool:
        return max(self.codes) == 3 and min(self.codes) >= 2


@cache
def good_model() -> bytes:
    """A tiny classifier of ten classes as a safetensors file."""
    torch.manual_seed(0)
    network = ResidualNetwork((1, 1, 1), (4, 8, 16), 4, 10).eval()
    return save(network.state_dict(), {"author": "someone"})


def parts() -> tuple[dict, bytes]:
    """Header and data of the good model, to be changed."""
    content = good_model()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header: bytes as they are, else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def png(width: int, height: int, colour: int = 2, rows: bytes | None = None, more: bytes = b"") -> bytes:
    """A PNG of `rows` (filter byte and pixels, black where None is given for a small picture)."""
    if rows is None:
        rows = (b"\0" + bytes(width * {0: 1, 2: 3, 6: 4}[colour])) * height
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + more + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def prepare(folder: Path) -> None:
    """Puts the good model and 24 good images into a folder."""
    (folder / MODEL).write_bytes(good_model())
    pictures(folder / IMAGES, 0)


def pictures(folder: Path, seed: int) -> None:
    """Puts 24 images into a new folder, no two alike."""
    folder.mkdir()
    draw = random.Random(seed)
    for number in range(24):
        rows = b"".join(b"\0" + draw.randbytes(96) for _ in range(32))
        (folder / f"{number:02}.png").write_bytes(png(32, 32, rows=rows))
