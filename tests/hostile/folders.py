"""Sharded indexes, folders, links, pipes and devices in the place of a model, and configurations that lie."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile.case import IMAGES, MODEL, Case, parts

INDEX = "model.safetensors.index.json"
FOLDER = ("scan", "m", "--data", IMAGES, "-q")
ANY = (0, 1, 3)


def cases() -> Iterator[Case]:
    """Indexes, then places, then configurations."""
    yield from _indexes()
    yield from _places()
    yield from _configurations()


def _sharded(folder: Path, change: Callable[[dict, Path], object]) -> None:
    """The good model as one shard with an index, after `change` of the index."""
    home = folder / "m"
    home.mkdir()
    (home / "s.safetensors").write_bytes((folder / MODEL).read_bytes())
    table, _ = parts()
    index = {"metadata": {}, "weight_map": {n: "s.safetensors" for n in table if n != "__metadata__"}}
    made = change(index, home)
    if not (home / INDEX).exists():
        (home / INDEX).write_bytes(made if isinstance(made, bytes) else json.dumps(index).encode())


def _shard(name: str) -> Callable[[Path], object]:
    def change(index: dict, home: Path) -> None:
        index["weight_map"]["conv1.weight"] = name

    return lambda folder: _sharded(folder, change)


def _index(content: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda folder: _sharded(folder, lambda *_: content() if callable(content) else content)


def _indexes() -> Iterator[Case]:
    outside = (
        ("parent", "../s.safetensors"),
        ("absolute", "/etc/passwd"),
        ("backslash", "..\\s.safetensors"),
        ("below", "a/s.safetensors"),
        ("empty", ""),
        ("dot", "."),
        ("dots", ".."),
        ("newline", "../\nbdclean: fine.\x1b[2J"),
        ("long-path", "../" * 5000),
    )
    for name, shard in outside:
        yield Case(f"index-shard-{name}", _shard(shard), "not a file beside it", FOLDER)
    for name, shard in (
        ("missing", "t.safetensors"),
        ("nul", "s\0.safetensors"),
        ("half-pair", "\ud800"),
        ("ansi", "\x1b[31mx"),
        ("right-to-left", "\u202exyz"),
        ("long", "x" * 5000),
    ):
        yield Case(f"index-shard-{name}", _shard(shard), "", FOLDER)
    yield Case("index-shard-itself", _shard(INDEX), "not a safetensors file", FOLDER)
    for name, value in (("list", []), ("null", None), ("text", "x"), ("number", 3), ("empty", {})):
        yield Case(f"index-map-{name}", _index(json.dumps({"weight_map": value}).encode()), "", FOLDER)
    for name, value in (("list", ["s"]), ("null", None), ("number", 7), ("table", {})):
        content = json.dumps({"weight_map": {"conv1.weight": value}}).encode()
        yield Case(f"index-shard-is-{name}", _index(content), "no readable weight_map", FOLDER)
    for name, text in (
        ("not-json", b"hello"),
        ("list", b"[]"),
        ("nan", b'{"weight_map":{"a":"s.safetensors"},"x":NaN}'),
        ("twice", b'{"weight_map":{"a":"s.safetensors","a":"t.safetensors"}}'),
        ("deep", b'{"weight_map":' + b'{"a":' * 5000),
        ("deep-beside", b'{"weight_map":{"a":"s.safetensors"},"x":' + b"[" * 300 + b"]" * 300 + b"}"),
        ("half-pair", b'{"weight_map":{"\\udc00":"s.safetensors"}}'),
        ("empty-file", b""),
        ("not-utf-8", b"\xff\xfe{}"),
    ):
        yield Case(f"index-{name}", _index(text), "not an index of shards", FOLDER)
    bomb = lambda: b'{"weight_map":[' + b"[]," * 3_000_000 + b"[]]}"  # noqa: E731
    yield Case("index-comma-bomb", _index(bomb), "not an index of shards", FOLDER)
    large = lambda: b'{"weight_map":{"a":"' + b"s" * 12_000_000 + b'"}}'  # noqa: E731
    yield Case("index-large", _index(large), "not an index of shards", FOLDER)
    yield Case("index-unheld", _unheld, "which no shard holds", FOLDER)
    yield Case("index-unnamed", _unnamed, "does not say that", FOLDER)
    kinds = {
        "folder": lambda path: path.mkdir(),
        "pipe": lambda path: os.mkfifo(path),
        "link-to-zero": lambda path: path.symlink_to("/dev/zero"),
        "link-loop": lambda path: path.symlink_to(path.name),
        "link-to-nothing": lambda path: path.symlink_to("nowhere"),
    }
    for name, make in kinds.items():

        def change(index: dict, home: Path, make: Callable[[Path], object] = make) -> None:
            (home / "s.safetensors").unlink()
            make(home / "s.safetensors")

        yield Case(f"index-shard-{name}", lambda folder, c=change: _sharded(folder, c), "", FOLDER)


def _unheld(folder: Path) -> None:
    _sharded(folder, lambda index, home: index["weight_map"].update({"\x1b[31mmore": "s.safetensors"}))


def _unnamed(folder: Path) -> None:
    _sharded(folder, lambda index, home: index["weight_map"].pop("conv1.weight"))


def _places() -> Iterator[Case]:
    def at(name: str) -> tuple[str, ...]:
        return ("scan", name, "--data", IMAGES, "-q")

    for device in ("zero", "null", "full", "stdin", "tty", "fd/0"):
        yield Case(f"model-dev-{device.replace('/', '-')}", lambda folder: None, "", at(f"/dev/{device}"))
    yield Case("model-proc", lambda folder: None, "", at("/proc/self/environ"))
    makers = {
        "pipe": lambda path: os.mkfifo(path),
        "socket": _socket,
        "link-loop": lambda path: path.symlink_to(path.name),
        "link-to-nothing": lambda path: path.symlink_to("nowhere"),
        "link-to-zero": lambda path: path.symlink_to("/dev/zero"),
        "folder": lambda path: path.mkdir(),
        "folder-of-folders": lambda path: (path / "model.safetensors").mkdir(parents=True),
    }
    for name, make in makers.items():
        yield Case(f"model-{name}", lambda folder, make=make: make(folder / "m.safetensors"))
    yield Case("model-two-in-a-folder", _two, "name the one to read", FOLDER)
    odd = "\x1b[2Jm\n\u202e[red].safetensors"
    yield Case("model-odd-name-missing", lambda folder: None, "does not exist", at(odd))
    yield Case("model-odd-name", lambda folder: (folder / odd).write_bytes(b"x" * 99), "", at(odd))
    yield Case("model-long-name", lambda folder: None, "", at("x" * 5000))
    yield Case("model-latin-1-name", lambda folder: None, "does not exist", at(os.fsdecode(b"caf\xe9")))
    for kind in ("zero", "full"):
        yield Case(f"images-dev-{kind}", lambda f: None, "", ("scan", MODEL, "--data", f"/dev/{kind}", "-q"))
    images = ("scan", MODEL, "--data", "d", "-q")
    yield Case("images-pipe", lambda folder: os.mkfifo(folder / "d"), "", images)
    yield Case("images-link-loop", lambda folder: (folder / "d").symlink_to("d"), "", images)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 108 characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _two(folder: Path) -> None:
    (folder / "m").mkdir()
    for name in "ab":
        (folder / "m" / f"{name}.safetensors").write_bytes((folder / MODEL).read_bytes())


def _configurations() -> Iterator[Case]:
    """Beside a good model: what they claim is lost or doubted, and the run goes on."""
    normal = {"mean": [0.5] * 3, "std": [0.5] * 3}
    lies: dict[str, object] = {
        "deep": b'{"a":' * 3000 + b"1" + b"}" * 3000,
        "deep-readable": b'{"a":' * 500 + b"1" + b"}" * 500,
        "huge": b'{"a":"' + b"x" * 12_000_000 + b'"}',
        "comma-bomb": b"[" + b"[]," * 3_000_000 + b"[]]",
        "nan": b'{"mean":[NaN,NaN,NaN],"std":[Infinity,1,1]}',
        "not-json": b"import os; os.system('true')",
        "list": b"[]",
        "huge-integers": {"mean": [10**400] * 3, "std": [10**400] * 3},
        "large-floats": {"mean": [1e308] * 3, "std": [1e-308] * 3},
        "zero-std": {**normal, "std": [0, 0, 0]},
        "negative-std": {**normal, "std": [-1, -1, -1]},
        "texts": {"mean": ["__import__('os').system('true')"] * 3, "std": "0.5"},
        "tables": {"mean": {"a": 1}, "std": {}},
        "true": {"mean": True, "std": True},
        "long-lists": {"mean": [0.5] * 100_000, "std": [0.5] * 100_000},
        "code": {"architecture": "__import__('os').system('true')", "auto_map": {"x": "evil--code.Model"}},
        "architectures-are-numbers": {"architectures": [1, None, {}], "model_type": [], "num_labels": "many"},
        "labels-lie": {"id2label": {"x": [], "-1": None, "9" * 99: "\x1b[2J"}, "num_classes": -3},
        "size-huge": {**normal, "input_size": [3, 10**9, 10**9], "size": {"height": 10**18, "width": -1}},
        "size-odd": {**normal, "crop_size": "224", "do_center_crop": True, "size": {"shortest_edge": "x"}},
        "nested-lies": {"pretrained_cfg": {"mean": [[0.5]], "std": None, "input_size": "3,224,224"}},
        "trust-remote-code": {"auto_map": {"AutoModel": "../../x.py"}, "trust_remote_code": True},
        "ansi": {"\x1b[2J": "\x1b]0;owned\x07", "model_type": "[red]x"},
    }
    for name, value in lies.items():

        def write(folder: Path, value: object = value) -> None:
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            (folder / "config.json").write_bytes(content)
            (folder / "preprocessor_config.json").write_bytes(content)

        argv = ("scan", MODEL, "--data", IMAGES, "--trigger", "badnets", "-q")
        # A size that is claimed is held against others.
        slow = name not in ("deep", "huge-integers")
        yield Case(f"config-{name}", write, argv=argv, codes=ANY, slow=slow)
    argv = ("scan", MODEL, "--data", IMAGES, "--trigger", "badnets", "-q")
    link = lambda folder: (folder / "config.json").symlink_to("/dev/zero")  # noqa: E731
    yield Case("config-dev-zero", link, argv=argv, codes=ANY, slow=True)
    yield Case("config-pipe", lambda folder: os.mkfifo(folder / "config.json"), argv=argv, codes=ANY)
