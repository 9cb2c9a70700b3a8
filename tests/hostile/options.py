"""Trigger files, class names, records and resume states: the other files that a command reads."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from bdclean.record.run import RunRecord
from hostile.case import IMAGES, MODEL, Case, png, raw
from hostile.case import pictures as pictures_of
from hostile.pictures import _contents as pictures
from hostile.pictures import _flat

BADNETS = ("--trigger", "badnets")
ANY = (0, 1, 3)


def cases() -> Iterator[Case]:
    """One after another."""
    yield from _triggers()
    yield from _classes()
    yield from _records()
    yield from _resume_states()


def _put(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content() if callable(content) else content)


# --- triggers -----------------------------------------------------------------------------------------------


def _triggers() -> Iterator[Case]:
    def trigger(file: str) -> tuple[str, ...]:
        return ("scan", MODEL, "--data", IMAGES, "--trigger", f"file:{file}", "-q")

    for name, _, content in pictures():
        yield Case(f"trigger-{name}", _put("t.png", content), "trigger", trigger("t.png"))
    yield Case("trigger-64-megapixels", _put("t.png", lambda: _flat(8100, 8100)), "4096", trigger("t.png"))
    yield Case("trigger-100-megapixels", _put("t.png", lambda: _flat(10_000, 10_000)), "", trigger("t.png"))
    yield Case("trigger-transparent", _put("t.png", png(4, 4, 6)), "transparent", trigger("t.png"))
    for name, content in _npz():
        yield Case(f"trigger-npz-{name}", _put("t.npz", content), "trigger", trigger("t.npz"))
    header = {"mask": {"dtype": "F32", "shape": [1, 8, 8], "data_offsets": [0, 256]}}
    tensors: tuple[tuple[str, bytes], ...] = (
        ("empty", b""),
        ("length", raw(header, bytes(256), 2**63)),
        ("truncated", raw(header, bytes(100))),
        ("huge", raw({"delta": {"dtype": "F32", "shape": [3, 2**30, 2**30], "data_offsets": [0, 0]}})),
        ("sized", save({"delta": torch.zeros(3, 5000, 2)})),
        ("nan", save({"delta": torch.full((3, 8, 8), float("nan"))})),
        ("other-names", save({"\x1b[2J": torch.zeros(3, 8, 8)})),
        ("complex", save({"delta": torch.zeros(3, 8, 8, dtype=torch.complex64)})),
        ("fp8", save({"delta": torch.zeros(3, 8, 8).to(torch.float8_e4m3fn)})),
        ("zero-size", save({"delta": torch.zeros(3, 0, 8)})),
        ("scalar", save({"delta": torch.zeros(())})),
        ("comma-bomb", raw(b"[" + b"[]," * 3_000_000 + b"[]]")),
        ("deep", raw(b'{"a":' * 100_000)),
    )
    for name, content in tensors:
        yield Case(
            f"trigger-safetensors-{name}", _put("t.safetensors", content), "trigger", trigger("t.safetensors")
        )
    for name in ("/dev/zero", "/dev/stdin", "/proc/self/environ", IMAGES, "missing.png", "x" * 5000):
        stem = name.strip("/").replace("/", "-")[:20]
        yield Case(f"trigger-{stem}", lambda folder: None, "trigger", trigger(name), (2, 3))
    yield Case("trigger-pipe", lambda folder: os.mkfifo(folder / "t.png"), "not a file", trigger("t.png"))
    odd = "\x1b[2J\nbdclean: fine.\u202e.png"
    yield Case("trigger-odd-name", lambda folder: None, "trigger", trigger(odd))


def _npy(shape: object, data: bytes, descr: str = "'<f4'", version: bytes = b"\x01\x00") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    size = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + size + header + data


def _archive(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def npz_members(shape: str = "(3, 8, 8)") -> Iterator[tuple[str, bytes]]:
    """Arrays that lie, for any `.npz`: name of the lie, content of the `.npy`."""
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}, print], dtype=object), allow_pickle=True)
    yield "objects", objects.getvalue()
    yield "objects-announced", _npy(shape, b"cos\nsystem\n(S'true'\ntR." * 99, "'|O'")
    yield "shape-2^63", _npy("(3, 9223372036854775807, 3)", bytes(99))
    yield "shape-huge", _npy(f"(3, {10**4000}, 3)", bytes(99))
    yield "shape-negative", _npy("(3, -8, -8)", bytes(768))
    yield "shape-true", _npy("(True, True, True)", bytes(4))
    yield "shape-text", _npy("'(3, 8, 8)'", bytes(768))
    yield "shape-code", _npy("__import__('os').system('true')", bytes(768))
    yield "shape-deep", _npy("(" * 3000 + ")" * 3000, bytes(768))
    yield "short", _npy(shape, bytes(700))
    yield "long", _npy(shape, bytes(10_000_000))
    yield "type-structured", _npy(shape, bytes(768), "[('a', '<f4'), ('b', '|O')]")
    yield "type-code", _npy(shape, bytes(768), '\'__import__("os").system("true")\'')
    yield "type-text", _npy(shape, bytes(9999), "'<U99'")
    yield "type-time", _npy(shape, bytes(1536), "'<M8[s]'")
    yield "version-9", _npy(shape, bytes(768), version=b"\x09\x00")
    yield "header-4-gb", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99)
    yield "not-npy", b"hello"
    yield "empty", b""


def _npz() -> Iterator[tuple[str, bytes | Callable[[], bytes]]]:
    for name, member in npz_members():
        yield name, _archive({"delta.npy": member})
    fine = _npy("(3, 8, 8)", np.full(192, 0.1, "<f4").tobytes())
    bomb = lambda: _archive({"delta.npy": _npy("(3, 4096, 4096)", bytes(200_000_000))})  # noqa: E731
    yield "bomb", bomb
    yield "not-zip", b"PK\x03\x04" + bytes(999)
    yield "not-zip-at-all", b"hello"
    yield "truncated", _archive({"delta.npy": fine})[:-30]
    yield "no-arrays", _archive({"x.npy": fine})
    yield "path-names", _archive({"../../delta.npy": fine, "/etc/delta.npy": fine})
    encrypted = bytearray(_archive({"delta.npy": fine}, zipfile.ZIP_STORED))
    for sign, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(sign) + place] |= 1
    yield "encrypted", bytes(encrypted)


# --- class names --------------------------------------------------------------------------------------------


def _classes() -> Iterator[Case]:
    def with_classes(file: str) -> tuple[str, ...]:
        return ("scan", MODEL, "--data", IMAGES, "--classes", file, *BADNETS, "-q")

    broken: tuple[tuple[str, str, bytes | Callable[[], bytes]], ...] = (
        ("empty", "c.txt", b""),
        ("one", "c.txt", b"cat\n"),
        ("not-utf-8", "c.txt", b"\xff\xfe\x00caf\xe9\n" * 20),
        ("huge", "c.txt", lambda: b"a\n" * 3_000_000),
        ("json-broken", "c.json", b"[1,"),
        ("json-deep", "c.json", b"[" * 100_000),
        ("json-number", "c.json", b"7"),
        ("json-null", "c.json", b"null"),
        ("json-holes", "c.json", b'{"0":"a","2":"b"}'),
        ("json-huge-number", "c.json", b"[" + b"9" * 5000 + b",1]"),
        ("json-nan", "c.json", b"[NaN, NaN]"),
        ("json-half-pair", "c.json", b'["\\ud800","b"]'),
        ("json-comma-bomb", "c.json", b"[" + b"[]," * 1_000_000 + b"[]]"),
    )
    for name, file, content in broken:
        yield Case(f"classes-{name}", _put(file, content), "", with_classes(file))
    for file in ("/dev/zero", "/dev/stdin", IMAGES, "missing.txt"):
        stem = file.strip("/").replace("/", "-")
        yield Case(f"classes-{stem}", lambda folder: None, "", with_classes(file))
    yield Case("classes-pipe", lambda folder: os.mkfifo(folder / "c.txt"), "", with_classes("c.txt"))
    odd = "\n".join(f"\x1b[3{n}m<b>[red]{n}\u202e" for n in range(10)).encode()
    yield Case("classes-escapes", _put("c.txt", odd), argv=with_classes("c.txt"), codes=ANY, slow=True)


# --- records ------------------------------------------------------------------------------------------------


def record(**more: object) -> bytes:
    """A record that `report` reads, with some keys replaced."""
    return json.dumps({**json.loads(RunRecord("scan").dump()), **more}).encode()


def _records() -> Iterator[Case]:
    wrong: tuple[tuple[str, bytes | Callable[[], bytes]], ...] = (
        ("empty", b""),
        ("binary", bytes(range(256))),
        ("not-json", b"hello"),
        ("number", b"7"),
        ("list", b"[]"),
        ("deep", b'{"a":' * 100_000),
        ("deep-schema", b'{"schema":' + b"[" * 900 + b"]" * 900 + b"}"),
        ("deep-extra", record(more=_deep(200))),
        ("schema-list", record(schema=["\x1b[2J"])),
        ("schema-long", record(schema="x" * 1_000_000)),
        ("verdict", record(verdict="\x1b[2Jclean\n")),
        ("outcome", record(outcome="\x1b[2J\nbdclean: fine")),
        ("verdict-long", record(verdict="clean" * 100_000)),
        ("nan", record(seconds=float("nan"))),
        ("huge-number", record(seed=10**400)),
        ("twice", record()[:-1] + b',"verdict":"no-evidence"}'),
        ("seconds-text", record(seconds="soon")),
        ("triggers-table", record(triggers={})),
        ("triggers-of-numbers", record(triggers=[1, 2])),
        ("row-without-name", record(triggers=[{"asr": {}}])),
        ("asr-text", record(triggers=[{"trigger": "x", "asr": "all"}])),
        ("checkpoint-list", record(checkpoint=[])),
        ("key-long", record(versions={"k" * 1_000_000: 1})),
        ("comma-bomb", lambda: b"[" + b"[]," * 10_000_000 + b"[]]"),
        ("report-runs-text", b'{"schema":"bdclean.report/1","runs":"x"}'),
        ("report-runs-nested", b'{"schema":"bdclean.report/1","runs":[{"schema":"bdclean.report/1"}]}'),
    )
    for name, content in wrong:
        yield Case(f"record-{name}", _put("r.json", content), "r.json", ("report", "r.json"))
    torn = _put("r.json", record() + b"\n{]\n")
    yield Case("record-second-line", torn, "(line 2)", ("report", "r.json"), ANY)
    for name in ("/dev/zero", "/dev/full", "/dev/tty", IMAGES, "missing", "/proc/self/mem"):
        stem = name.strip("/").replace("/", "-")
        yield Case(f"record-{stem}", lambda folder: None, "", ("report", name))
    yield Case("record-pipe", lambda folder: os.mkfifo(folder / "r.json"), "", ("report", "r.json"))
    place = ("scan", MODEL, "--data", IMAGES, "-q", "--record", "/dev/zero")
    yield Case("record-to-dev-zero", lambda folder: None, "", place)
    pipe = ("scan", MODEL, "--data", IMAGES, "-q", "--record", "r.json")
    yield Case("record-to-a-pipe", lambda folder: os.mkfifo(folder / "r.json"), "", pipe)
    rows = {
        "control-texts": {"control_rate": {"median": "a", "highest": [], "count": {}}, "outcome": "fails"},
        "source-texts": {
            "worst_source": {"value": 0.5, "n": "a", "low": "b", "high": []},
            "outcome": "fails",
        },
        "source-true": {"worst_source": {"value": True, "class": {"a": []}}},
    }
    for name, row in rows.items():
        content = record(triggers=[{"trigger": "x", **row}])
        yield Case(f"record-{name}", _put("r.json", content), "expected", ("report", "r.json"))
    rate = {"value": 1e299, "n": 2**62, "low": -5, "high": 7}
    odd = [
        {
            "trigger": "\x1b[2J[red]<b>|`",
            "asr": rate,
            "base_rate": rate,
            "outcome": "\u202efails",
            "target": "](",
        },
        {"trigger": "x", "control_rate": {"highest": -1e200, "median": None}, "outcome": "inconclusive"},
        {"trigger": "y", "worst_source": {"value": 0.5, "class": 2**62, "low": -1e9}, "outcome": "fails"},
    ]
    lies = record(
        verdict="backdoored", triggers=odd, confusion="x", curve=[{"a": []}], pictures=[{}], started="\x9b"
    )
    for form in ("table", "md", "json", "jsonl"):
        argv = ("report", "r.json", "r.json", "-v", "--format", form)
        yield Case(f"record-lies-{form}", _put("r.json", lies), argv=argv, codes=ANY)


def _deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


# --- resume states ------------------------------------------------------------------------------------------


def _resume_states() -> Iterator[Case]:
    argv = ("cleanse", MODEL, "--data", IMAGES, "--test", "more", "--resume", "--preprocess", "none", "-q", *BADNETS,
            "--record", "r.json", "--recipe", "inoculate", "--set", "epochs=1", "--set", "least_steps=1")  # fmt: skip
    name = "good.clean.safetensors.resume.safetensors"
    one = {"x": torch.zeros(2)}
    states: tuple[tuple[str, bytes], ...] = (
        ("empty", b""),
        ("pickle", b"\x80\x04]." + bytes(99)),
        ("length", raw({}, b"", 2**62)),
        ("no-metadata", save(one)),
        ("not-json", save(one, {"bdclean.resume": "hello\x1b[2J\nworld"})),
        ("deep", save(one, {"bdclean.resume": "[" * 100_000})),
        ("wrong-kinds", save(one, {"bdclean.resume": json.dumps({"arguments": 7})})),
        ("other-arguments", save(one, {"bdclean.resume": _state({"seed": "\x1b[2J\n" + "x" * 100_000})})),
        ("deep-arguments", save(one, {"bdclean.resume": _state({"seed": _deep(900)})})),
        ("nan", save(one, {"bdclean.resume": _state({}).replace('"done": 0', '"done": NaN')})),
        ("huge", save(one, {"bdclean.resume": _state({}).replace('"done": 0', '"done": ' + "9" * 5000)})),
    )

    def beside(write: Callable[[Path], object]) -> Callable[[Path], object]:
        return lambda folder: (pictures_of(folder / "more", 1), write(folder))

    for kind, content in states:
        yield Case(f"resume-{kind}", beside(_put(name, content)), "resume", argv, slow=True)
    pipe = beside(lambda folder: os.mkfifo(folder / name))
    yield Case("resume-pipe", pipe, "resume", argv, slow=True)
    link = beside(lambda folder: (folder / name).symlink_to("/dev/zero"))
    yield Case("resume-dev-zero", link, "resume", argv, slow=True)


def _state(arguments: dict) -> str:
    return json.dumps(
        {
            "arguments": arguments,
            "stage": "",
            "done": 0,
            "curve": [],
            "sums": {},
            "share": 1.0,
            "good": 0,
            "newest": 0,
            "notes": {},
        }
    )
