"""Tars, `.npz` and `.parquet` files of images that lie."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hostile.case import MODEL, Case, png

COUNT = 24


def cases() -> Iterator[Case]:
    """Each holds nothing that can be used: the run is refused."""
    for name, content in _tars():
        yield _case(f"tar-{name}", "d.tar", content)
    for name, content in _compressed():
        yield _case(f"tar-gz-{name}", "d.tar.gz", content)
    for name, content in _npz():
        yield _case(f"npz-{name}", "d.npz", content)
    for name, content in (
        ("noise", bytes(range(256)) * 9),
        ("truncated", b"PAR1" + bytes(99)),
        ("magic-alone", b"PAR1" + bytes(4) + b"PAR1"),
        ("footer-beyond", b"PAR1" + (2**31 - 1).to_bytes(4, "little") + b"PAR1"),
        ("empty", b""),
    ):
        yield _case(f"parquet-{name}", "d.parquet", content)


def _case(name: str, file: str, content: bytes | Callable[[], bytes]) -> Case:
    def write(folder: Path) -> None:
        (folder / file).write_bytes(content() if callable(content) else content)

    return Case(name, write, "", ("scan", MODEL, "--data", file, "-q"))


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of a tar; `fields` are TarInfo's."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of such entries, whose sizes are as given, not as they are."""
    made = b""
    for info, content in members:
        made += info.tobuf(form) + content + bytes(-len(content) % 512)
    return made + bytes(1024)


def _tars() -> Iterator[tuple[str, bytes | Callable[[], bytes]]]:
    def links(kind: bytes, target: str) -> bytes:
        return tar(*(member(f"{n}.png", type=kind, linkname=target) for n in range(COUNT)))

    yield "links-outside", links(tarfile.SYMTYPE, "/etc/passwd")
    yield "links-to-zero", links(tarfile.SYMTYPE, "/dev/zero")
    yield "hard-links-outside", links(tarfile.LNKTYPE, "../../etc/passwd")
    yield "links-to-themselves", links(tarfile.LNKTYPE, "0.png")
    yield (
        "devices",
        tar(*(member(f"{n}.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5) for n in range(COUNT))),
    )
    yield "pipes", tar(*(member(f"{n}.png", type=tarfile.FIFOTYPE) for n in range(COUNT)))
    yield "not-images", tar(*(member(f"../../{n}.png", b"hello") for n in range(COUNT)))
    yield "absolute", tar(*(member(f"/tmp/{n}.png", b"hello") for n in range(COUNT)))
    yield "odd-names", tar(*(member(f"\x1b[2J\n{n}\u202e.png", b"hello") for n in range(COUNT)))
    yield "size-terabyte", tar(member("0.png", png(8, 8), size=2**40))
    yield "size-negative", tar(member("0.png", png(8, 8), size=-512), form=tarfile.GNU_FORMAT)
    yield "sparse-terabyte", _sparse()
    long = member("x", size=2**33, type=tarfile.GNUTYPE_LONGNAME)
    yield "long-name-8-gb", tar(long)
    yield (
        "long-name-loop",
        tar(*(member("x", b"y" * 100, type=tarfile.GNUTYPE_LONGNAME) for _ in range(3000))),
    )
    yield "pax-bomb", tar(member("x", b"9999999999 path=" + b"a" * 4000, type=tarfile.XHDTYPE))
    yield "pax-not-numbers", tar(member("x", b"abc size=xyz\n", type=tarfile.XHDTYPE), member("0.png", b"x"))
    yield "truncated", tar(member("0.png", png(64, 64)))[:900]
    yield "noise", bytes(range(256)) * 40
    yield "empty", b""
    yield "zeros", bytes(10240)
    yield "many-entries", lambda: tar(*(member("x", type=tarfile.DIRTYPE) for _ in range(20_000)))
    yield "tar-in-tar", tar(member("d.tar", tar(member("0.png", png(8, 8)))))
    yield "html", b"<!DOCTYPE html><html></html>"


def _sparse() -> bytes:
    """GNU's old sparse form: a picture that claims a terabyte of zeros."""
    info, _ = member("0.png", size=512, type=tarfile.GNUTYPE_SPARSE)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    block[483:495] = b"%011o\0" % (2**32)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512) + bytes(1024)


def _compressed() -> Iterator[tuple[str, bytes | Callable[[], bytes]]]:
    one = tar(member("0.png", b"hello"))
    yield "bomb", lambda: gzip.compress(tar(member("0.png", bytes(300_000_000))), 9)
    yield "bomb-of-zeros", lambda: gzip.compress(bytes(400_000_000), 9)
    yield "twice", gzip.compress(gzip.compress(one))
    yield "truncated", gzip.compress(one)[:40]
    yield "wrong-sum", gzip.compress(one)[:-8] + bytes(8)
    yield "not-gzip", one
    yield "empty", b""
    yield "noise", b"\x1f\x8b" + bytes(range(256))


def _npz() -> Iterator[tuple[str, bytes | Callable[[], bytes]]]:
    from hostile.options import _archive, _npy, npz_members

    for name, content in npz_members("(24, 8, 8, 3)"):
        yield f"images-{name}", _archive({"images.npy": content})
    shape = "(24, 8, 8, 3)"
    yield "images-nan", _archive({"images.npy": _npy(shape, np.full(4608, np.nan, "<f4").tobytes())})
    yield "images-huge-side", _archive({"images.npy": _npy("(24, 1, 99999999, 3)", bytes(999), "'|u1'")})
    yield "bomb", lambda: _archive({"images.npy": _npy("(100, 2048, 2048, 3)", bytes(300_000_000), "'|u1'")})
    yield "many-members", lambda: _archive({f"{n}.npy": b"" for n in range(20_000)}, zipfile.ZIP_STORED)
    yield "no-images", _archive({"y.npy": _npy(shape, bytes(4608), "'|u1'")})
    fine = _npy(shape, bytes(4608), "'|u1'")
    objects = io.BytesIO()
    np.save(objects, np.array([print] * 24, dtype=object), allow_pickle=True)
    yield "labels-objects", _archive({"images.npy": fine, "labels.npy": objects.getvalue()})
    yield "truncated", _archive({"images.npy": fine})[:-40]
    yield "not-zip", b"hello"
    yield "empty", b""
