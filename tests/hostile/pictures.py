"""Image files that are bombs, broken, or no images."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile.case import MODEL, Case, chunk, png

DATA = ("scan", MODEL, "--data", "d", "-q")
COUNT = 24  # so many that the count alone would do


def cases() -> Iterator[Case]:
    """Folders that hold nothing else: none of the images can be read."""
    for name, suffix, content in _contents():
        yield Case(f"picture-{name}", _folder(content, suffix), "none of the 24 images", DATA)
    for name, make in {
        "link-to-zero": lambda path: path.symlink_to("/dev/zero"),
        "link-to-nothing": lambda path: path.symlink_to("nowhere"),
        "link-loop": lambda path: path.symlink_to(path.name),
        "pipe": lambda path: os.mkfifo(path),
    }.items():
        yield Case(f"picture-{name}", _each(make), "none of the 24 images", DATA)
    yield Case("picture-odd-name", _odd_names, "none of the", DATA)
    yield Case("picture-folder-loop", _loop, "holds no images", DATA)
    yield Case("picture-folder-nested-5000", _nested, "", DATA)
    # As large as is allowed: decoded one after another, in memory for one of them and its RGB copy.
    large = _folder(_flat(8100, 8100), ".png", 6)
    yield Case("picture-64-megapixels", large, "", DATA, (0, 1, 3), True, 6 * 64 * 2**20, 30.0)


def _each(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "d").mkdir()
        for number in range(COUNT):
            make(folder / "d" / f"{number}.png")

    return write


def _folder(content: bytes, suffix: str, count: int = COUNT) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "d").mkdir()
        for number in range(count):
            (folder / "d" / f"{number}{suffix}").write_bytes(content)

    return write


def _odd_names(folder: Path) -> None:
    (folder / "d").mkdir()
    for name in ("\x1b[2J\x1b[31m.png", "a\nbdclean: fine.png", "\u202egnp.png", "[red]x.png"):
        (folder / "d" / name).write_bytes(b"x")
    with open(os.path.join(os.fsencode(folder / "d"), b"caf\xe9.png"), "wb") as file:
        file.write(b"x")


def _loop(folder: Path) -> None:
    (folder / "d" / "a").mkdir(parents=True)
    (folder / "d" / "a" / "b").symlink_to("..")
    (folder / "d" / "c").symlink_to(".")


def _nested(folder: Path) -> None:
    here = os.getcwd()
    os.chdir(folder)
    try:
        for _ in range(600):  # longer than any path that can be opened at once
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)


def _flat(width: int, height: int) -> bytes:
    """A PNG of one grey level, a thousandth of its pixels' size."""
    stream = zlib.compressobj(9)
    row = b"\0" + bytes(width)
    data = b"".join([*(stream.compress(row) for _ in range(height)), stream.flush()])
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _contents() -> Iterator[tuple[str, str, bytes]]:
    small = png(8, 8)
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0)
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999)))
    yield "html", ".png", b"<!DOCTYPE html><html><script>alert(1)</script></html>"
    yield "svg", ".png", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "svg-doctype", ".jpg", b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///x">]><svg/>'
    yield "eps", ".jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%true) (r) file\n"
    yield "pdf", ".png", b"%PDF-1.7\n1 0 obj <<>> endobj\n%%EOF"
    yield "zip", ".png", b"PK\x03\x04" + bytes(99)
    yield "empty", ".png", b""
    yield "noise", ".jpg", bytes(range(256)) * 9
    yield "png-huge", ".png", huge
    yield "png-wide", ".png", _flat(400_000, 200)
    yield "png-truncated", ".png", png(64, 64)[:60]
    yield "png-wrong-sum", ".png", small[:-20] + b"\xff" + small[-19:]
    yield "png-no-pixels", ".png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header[:0] + struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")  # fmt: skip # noqa: E501
    yield "png-zero-size", ".png", png(0, 0)
    text = b"k\0\0" + zlib.compress(bytes(50_000_000), 9)
    yield "png-text-bomb", ".png", png(8, 8, rows=b"", more=chunk(b"zTXt", text))
    yield "png-profile-bomb", ".png", png(8, 8, rows=b"", more=chunk(b"iCCP", text))
    yield "jpeg-truncated", ".jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    frame = b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 65535, 65535) + b"\x03\x01\x22\0\x02\x11\1\x03\x11\1"
    yield "jpeg-huge", ".jpg", b"\xff\xd8" + frame + b"\xff\xda\x00\x0c\x03\x01\0\x02\x11\x03\x11\0\x3f\0"
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    yield (
        "gif-huge",
        ".gif",
        gif + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x08\x02\xff\xff\0;",
    )
    head = struct.pack("<IiiHHIIiiII", 40, 60000, -60000, 1, 24, 0, 0, 0, 0, 0, 0)
    yield "bmp-huge", ".bmp", b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head
    yield "tiff-huge", ".tif", _tiff(2**20, 2**20)
    yield "tiff-loop", ".tif", b"II*\0" + struct.pack("<I", 8) + struct.pack("<HI", 0, 8)
    yield "ppm-huge", ".ppm", b"P6\n99999 99999\n255\n" + bytes(99)
    yield "ppm-long-number", ".ppm", b"P6\n" + b"9" * 100_000 + b" 9\n255\n"
    yield "webp-truncated", ".webp", b"RIFF\xff\xff\xff\x7fWEBPVP8X\n\0\0\0\x10\0\0\0\xff\xff\xff\xff\xff\xff"


def _tiff(width: int, height: int) -> bytes:
    tags = ((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 2**32 - 1))  # fmt: skip
    body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + body + struct.pack("<I", 0)
