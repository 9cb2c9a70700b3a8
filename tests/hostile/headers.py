"""safetensors files whose header lies."""

from __future__ import annotations

import gzip
import io
import json
import pickle  # noqa: TID251  (written here, never read)
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hostile.case import Case, parts, raw

HUGE = 10**4000


def cases() -> Iterator[Case]:
    """One case each; the file is always `m.safetensors`."""
    for name, content, said in (*_lengths(), *_not_safetensors(), *_json(), *_tensors(), *_names()):
        yield Case(f"header-{name}", _file(content), said)
    yield Case("header-sparse-terabyte", _terabyte, "of memory")
    for name, value, said in (
        ("nan", float("nan"), "NaN or infinite"),
        ("infinity", float("inf"), "NaN or infinite"),
        ("minus-infinity", -float("inf"), "NaN or infinite"),
    ):
        yield Case(f"weights-{name}", _file(_weights("conv1.weight", value)), said)
    yield Case("weights-negative-variance", _file(_weights("bn1.running_var", -1.0)), "negative variances")


def _file(content: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        made = content() if callable(content) else content
        (folder / "m.safetensors").write_bytes(made)

    return write


def changed(change: Callable[[dict], object], data: bytes | None = None) -> Callable[[], bytes]:
    """The good model after `change` of its header."""

    def make() -> bytes:
        table, own = parts()
        change(table)
        return raw(table, own if data is None else data)

    return make


def field(key: str, value: object, tensor: str = "conv1.weight") -> Callable[[], bytes]:
    """The good model with one field of one tensor replaced."""
    return changed(lambda table: table[tensor].update({key: value}))


def text(change: Callable[[bytes], bytes]) -> Callable[[], bytes]:
    """The good model after `change` of its header's text."""

    def make() -> bytes:
        table, data = parts()
        return raw(change(json.dumps(table).encode()), data)

    return make


def _lengths() -> Iterator[tuple[str, bytes | Callable[[], bytes], str]]:
    table, data = parts()
    whole = raw(table, data)
    yield "empty", b"", "only 0 bytes"
    yield "nine-bytes", bytes(9), "only 9 bytes"
    yield "zeros", bytes(4096), "header of 0 bytes"
    yield "length-2^64-1", raw(table, data, 2**64 - 1), "18446744073709551615 bytes"
    yield "length-2^63", raw(table, data, 2**63), "9223372036854775808 bytes"
    yield "length-99-million", raw(table, data, 99_999_999), "more than the 10,000,000"
    yield "length-of-the-file", raw(table, data, len(whole)), "truncated"
    yield "length-short", raw(table, data, 100), "broken header"
    yield "length-one-more", raw(table, data, len(whole) - len(data) - 8 + 1), "broken header"
    yield "cut-in-length", whole[:5], "only 5 bytes"
    yield "cut-in-header", whole[:500], "truncated"
    yield "cut-in-data", whole[:-1000], "truncated"
    yield "cut-last-byte", whole[:-1], "truncated"
    yield "trailing-byte", whole + b"x", "that no tensor owns"
    yield "trailing-megabyte", lambda: whole + bytes(2**20), "that no tensor owns"
    yield "trailing-zip", whole + _zip(), "that no tensor owns"


def _not_safetensors() -> Iterator[tuple[str, bytes | Callable[[], bytes], str]]:
    state = {"a": torch.ones(2)}
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save(state, stream, _use_new_zipfile_serialization=zipped)
        yield f"torch-{'zip' if zipped else 'legacy'}", stream.getvalue(), "is a pickle"
    for protocol in (0, 2, 4):
        said = "is a pickle" if protocol else "not a safetensors file"
        yield f"pickle-{protocol}", pickle.dumps({"a": [1] * 99}, protocol), said
    yield "pickle-with-a-length", raw(pickle.dumps({"a": 1}, 4)), "broken header"
    yield "zip", _zip(), "is a pickle"
    yield "gzip", gzip.compress(bytes(4096)), "gzip archive"
    yield "html", b"<!DOCTYPE html>\n<html><script>alert(1)</script></html>", "web page"
    yield "lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"
    yield "script", b"#!/bin/sh\necho owned > /tmp/owned\n", "not a safetensors file"
    yield "noise", random.Random(0).randbytes(5000), "not a safetensors file"


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    return stream.getvalue()


def _json() -> Iterator[tuple[str, bytes | Callable[[], bytes], str]]:
    yield "deep-lists", raw(b"[" * 100_000), "not JSON"
    yield "deep-tables", raw(b'{"a":' * 100_000), "not JSON"
    yield "deep-and-closed", raw(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), "broken header"
    yield "comma-bomb", lambda: raw(b"[" + b"[]," * 3_000_000 + b"[]]"), "holds more than"
    yield "comma-bomb-just-below", lambda: raw(b"[" + b"{}," * 590_000 + b"{}]"), "not a table"
    yield "astral-metadata", lambda: raw(_astral()), "holds no tensors"
    yield "utf-16", raw('{"a": 1}'.encode("utf-16")), "broken header"
    yield "byte-order-mark", text(lambda t: b"\xef\xbb\xbf" + t), "broken header"
    yield "blank-first", text(lambda t: b" " + t), "broken header"
    yield "two-documents", text(lambda t: t + b"{}"), "not JSON"
    yield "single-quotes", text(lambda t: t.replace(b'"', b"'")), "not JSON"
    yield "comment", text(lambda t: t[:-1] + b"/* */}"), "not JSON"
    yield "invalid-utf-8", text(lambda t: t.replace(b"conv1", b"conv\xff")), "not JSON"
    yield "overlong-utf-8", text(lambda t: t.replace(b"conv1", b"conv\xc0\xaf")), "not JSON"
    yield "raw-newline-in-name", text(lambda t: t.replace(b"conv1", b"con\nv1")), "not JSON"
    yield "nan-key", text(lambda t: t[:-1] + b",NaN:1}"), "not JSON"
    yield "nan", text(lambda t: t[:-1] + b',"x":NaN}'), "NaN is no number"
    yield "infinity-in-shape", text(lambda t: t.replace(b"[4, 3, 3, 3]", b"[Infinity]")), "Infinity is no"
    yield "1e999-in-shape", text(lambda t: t.replace(b"[4, 3, 3, 3]", b"[1e999]")), "too large"
    yield "nan-beside", text(lambda t: t.replace(b'"dtype"', b'"x":NaN,"dtype"', 1)), "NaN is no number"
    yield "name-twice", text(lambda t: t[:-1] + b',"conv1.weight":{}}'), "twice"
    yield "name-twice-escaped", text(lambda t: t[:-1] + b',"\\u0063onv1.weight":{}}'), "twice"
    yield "metadata-twice", text(lambda t: t[:-1] + b',"__metadata__":{}}'), "twice"
    yield "field-twice", text(lambda t: t.replace(b'"dtype"', b'"dtype":"F64","dtype"', 1)), "twice"
    yield "half-pair-in-name", text(lambda t: t.replace(b"conv1", b"conv\\ud800")), "surrogate"
    yield "half-pair-in-metadata", text(lambda t: t.replace(b"someone", b"\\udfff")), "surrogate"
    for kind, value in (("number", 1), ("list", ["x"]), ("null", None), ("table", {}), ("true", True)):
        yield f"metadata-{kind}", changed(lambda t, v=value: t.update(__metadata__={"x": v})), "texts"
    yield "metadata-is-a-list", changed(lambda t: t.update(__metadata__=[])), "texts"
    yield "metadata-is-null", changed(lambda t: t.update(__metadata__=None)), "texts"


def _astral() -> dict:
    return {"__metadata__": {"x": "y" * 9_000_000 + "\U0001f600"}}


def _many(count: int) -> bytes:
    names = ",".join(f'"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(count))
    return raw(b"{" + names.encode() + b"}")


def _tensors() -> Iterator[tuple[str, bytes | Callable[[], bytes], str]]:
    for key in ("dtype", "shape", "data_offsets"):
        yield f"no-{key}", changed(lambda t, k=key: t["conv1.weight"].pop(k)), "broken header"
        for kind, value in (("null", None), ("table", {}), ("text", "x"), ("number", 7), ("deep", _deep(60))):
            yield f"{key}-{kind}", field(key, value), "broken header"
    for kind, value in (("null", None), ("list", []), ("text", "F32"), ("number", 3), ("empty", {})):
        yield f"tensor-{kind}", changed(lambda t, v=value: t.update({"conv1.weight": v})), "broken header"
    for name, value in (("unknown", "F31"), ("lower-case", "f32"), ("list", ["F32"]), ("code", "__import__")):
        yield f"dtype-{name}", field("dtype", value), "type"
    yield "dtype-other-size", field("dtype", "F16"), "does not fill"
    yield "dtype-integer", field("dtype", "I32"), "quantised"
    yield "dtype-ansi", field("dtype", "\x1b[2J\x1b]0;owned\x07"), r"unknown type \x1b[2J\x1b]0;owned\x07"
    shapes = (
        ("negative", [-4, 3, 3, -3], "whole numbers"),
        ("float", [4.0, 3, 3, 3], "whole numbers"),
        ("true", [True] * 4, "whole numbers"),
        ("text", ["4", 3, 3, 3], "whole numbers"),
        ("null", [None], "whole numbers"),
        ("nested", [[4, 3, 3, 3]], "whole numbers"),
        ("huge", [HUGE], "63 bits"),
        ("huge-many", [HUGE] * 400, "63 bits"),
        ("2^63", [2**63 - 1, 3], "63 bits"),
        ("product-2^64", [2**32, 2**32], "63 bits"),
        ("zero-times-2^124", [0, 2**62, 2**62], "63 bits"),
        ("axes-65", [1] * 65, "65 axes"),
        ("axes-million", [1] * 1_000_000, "axes"),
        ("scalar", [], "does not fill"),
        ("other", [4, 3, 3, 2], "does not fill"),
    )
    for name, value, said in shapes:
        yield f"shape-of-{name}", field("shape", value), said
    offsets = (
        ("negative", [-8, 424], "whole numbers"),
        ("float", [0.0, 432.0], "whole numbers"),
        ("true", [False, True], "whole numbers"),
        ("reversed", [432, 0], "does not fill"),
        ("three", [0, 432, 432], "whole numbers"),
        ("one", [0], "whole numbers"),
        ("huge", [HUGE, HUGE], "63 bits"),
        ("beyond-the-file", [2**62, 2**62 + 432], "gap"),
        ("beyond-by-one", [1, 433], "broken header"),
    )
    for name, value, said in offsets:
        yield f"offsets-of-{name}", field("data_offsets", value), said
    twice = changed(lambda t: t.update(x=dict(t["conv1.weight"])))
    yield "overlap-whole", twice, "overlaps"
    yield "overlap-part", changed(lambda t: t.update(x=_entry([4], 8, 24))), "overlaps"
    yield "overlap-itself-zero-size", changed(lambda t: t.update(x=_entry([0], 4, 4))), "overlaps"
    yield "hole", changed(lambda t: t.pop("conv1.weight")), "gap"
    yield "zero-size-weight", _zero_size, "no known architecture"
    yield "a-million-tensors", lambda: _many(1_000_000), "more than the 10,000,000"
    yield "19-thousand-tensors", lambda: _many(19_000), "no known architecture"
    yield "98-thousand-tensors", lambda: _many(98_000), "more than 20,000 tensors"
    yield "no-tensors", raw({}), "holds no tensors"
    yield "metadata-alone", raw({"__metadata__": {"format": "pt"}}), "holds no tensors"


def _deep(levels: int) -> object:
    value: object = []
    for _ in range(levels):
        value = [value]
    return value


def _entry(shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def _zero_size() -> bytes:
    return raw({"conv1.weight": _entry([0, 3, 3, 3], 0, 0), "fc.weight": _entry([10, 0], 0, 0)})


def _names() -> Iterator[tuple[str, bytes | Callable[[], bytes], str]]:
    names = {
        "path": "../../../../tmp/x",
        "absolute": "/etc/passwd",
        "nul": "conv1\0.weight",
        "newline": "a\nbdclean: all is well.",
        "ansi": "\x1b[31m\x1b[2J\x1b]8;;http://evil\x07",
        "c1": "\x9b31m\x85",
        "right-to-left": "\u202egnp.txt\u2066",
        "markup": "[red]x[/red][link=http://evil]y[/link]",
        "html": "<script>alert(1)</script>",
        "format": "{0.__class__}%s%n$(true)`true`",
        "dunder": "__class__.__init__.__globals__",
        "empty": "",
        "long": "x" * 1_000_000,
        "astral": "\U0001f600\u0301\u3164",
        "dots": "." * 5000,
    }
    for name, value in names.items():
        yield f"name-{name}", raw({value: _entry([2], 0, 8)}, bytes(8)), "no known architecture"
        yield f"name-{name}-and-a-lie", raw({value: _entry([3], 0, 8)}, bytes(8)), "does not fill"


def _terabyte(folder: Path) -> None:
    table, data = parts()
    table = {f"model.{name}": entry for name, entry in table.items() if name != "__metadata__"}
    table["projector.more"] = {
        "dtype": "U8",
        "shape": [2**40],
        "data_offsets": [len(data), len(data) + 2**40],
    }
    content = raw(table, data)
    with (folder / "m.safetensors").open("wb") as file:
        file.write(content)
        file.truncate(len(content) + 2**40)


def _weights(name: str, value: float) -> Callable[[], bytes]:
    def make() -> bytes:
        table, data = parts()
        begin, end = table[name]["data_offsets"]
        tensor = torch.frombuffer(bytearray(data), dtype=torch.float32)
        tensor[begin // 4 : end // 4][0] = value
        return raw(table, tensor.numpy().tobytes() + data[len(data) // 4 * 4 :])

    return make
