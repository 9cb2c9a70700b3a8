"""Which file of a path holds a network's weights, and which bytes it is: told without torch, of any file."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

from bdclean.errors import Refused
from bdclean.files import strictjson
from bdclean.files.text import shown

INDEX = "model.safetensors.index.json"
# A model's own description is a few kB, with the names of 22,000 classes 2 MB; an index of 10,000 tensors 1 MB.
LARGEST_JSON = 10_000_000
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SHARE_OF_MEMORY = 0.8  # that one file's bytes may take


def in_folder(folder: Path) -> Path:
    """The file to read: safetensors, sharded or whole; a torch file only where no other is there."""
    if (folder / INDEX).is_file():
        return folder / INDEX
    found = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if len(found) == 1:
        return found[0]
    if folder / "model.safetensors" in found:
        return folder / "model.safetensors"
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES and p.is_file())
    if not found and len(pickles) == 1:
        return pickles[0]
    if not found and (folder / "saved_model.pb").is_file():
        raise Refused(
            f"{shown(folder)} is a TensorFlow model: convert it to a PyTorch network's safetensors file."
        )
    count = f"{len(found)} safetensors files" if found else "no safetensors file"
    if pickles and not found:
        count += f" and {len(pickles)} pickles"
    raise Refused(f"{shown(folder)} holds {count}: name the one to read.")


def digest(path: Path) -> str | None:
    """The sha256 that a checkpoint read from `path` has, whether it can be read as a network or not.

    None where `path` is no file or folder with one, or a file larger than this machine could read.
    """
    try:
        file = in_folder(path) if path.is_dir() else path
        return _index_digest(file) if file.name.endswith(".index.json") else _file_digest(file)
    except (Refused, OSError):
        return None


def _index_digest(index: Path) -> str | None:
    """That of an index's bytes and of its shards' digests; of its bytes alone where not all shards are there."""
    try:
        table = read_json(index)
        names = sorted(set(table["weight_map"].values())) if isinstance(table, dict) else []
        shards = [_file_digest(index.parent / name) for name in names if Path(name).name == name]
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        shards = [None]
    if None in shards:
        return _file_digest(index)
    return hashlib.sha256(index.read_bytes() + "".join(map(str, shards)).encode()).hexdigest()


def _file_digest(file: Path) -> str | None:
    if not file.is_file() or file.stat().st_size > most_bytes():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def most_bytes() -> float:
    """How large a file may be that is read here."""
    return SHARE_OF_MEMORY * memory()


def memory() -> float:
    """Bytes of memory that this machine has; infinite where it does not say."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_json(path: Path) -> object:
    """What a JSON file beside weights says, up to a size and depth that none has; raises NotJson or OSError."""
    with path.open("rb") as stream:  # up to the cap: some files, as in /proc, do not say how long they are
        raw = stream.read(LARGEST_JSON + 1)
    if len(raw) > LARGEST_JSON:
        raise strictjson.NotJson("too large")
    found = strictjson.parse(raw)
    if not strictjson.shallow(found):
        raise strictjson.NotJson("too deep")
    return found
