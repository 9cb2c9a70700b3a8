"""Where a checkpoint's tensors lie: one safetensors file, a folder, a sharded index, or (when allowed) a pickle."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bdclean.architectures.matching import shown
from bdclean.errors import Refused
from bdclean.tensorfile import (
    NAMES,
    Entry,
    Header,
    lay_out,
    looks_like_pickle,
    read_header,
    read_tensors,
)
from bdclean.writing import reason

INDEX = "model.safetensors.index.json"
# A model's own description is a few kB; an index of the largest models a few MB.
LARGEST_JSON = 20_000_000
# Where training scripts keep the weights inside a saved table.
WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "net", "weights", "params")


@dataclass(frozen=True)
class Source:
    """Headers read and checked, weights not yet: `load` gives all tensors and the sha256 of what was read."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    format: str
    load: Callable[[], tuple[dict[str, Tensor], str]]
    config: dict | None
    preprocessor: dict | None
    warnings: tuple[str, ...]


def open_source(path: Path, allow_pickle: bool) -> Source:
    """Find the file or files behind `path` and read their headers."""
    where = shown(path)
    try:
        if path.is_dir():
            path = _in_folder(path)
        elif not path.exists():
            raise Refused(f"{where} does not exist.")
        elif not path.is_file():
            raise Refused(f"{where} is not a regular file.")
        notes: list[str] = []
        config = _description(path.parent / "config.json", notes)
        preprocessor = _description(path.parent / "preprocessor_config.json", notes)
        if path.name.endswith(".index.json"):
            entries, metadata, load = _shards(path)
            kind = "safetensors-sharded"
        elif looks_like_pickle(path):
            if not allow_pickle:
                raise Refused(
                    f"{where} is a pickle and can run code when loaded: "
                    "convert it where you trust it, or pass --allow-pickle to read plain tensors only."
                )
            entries, metadata, load = _pickle(path)
            kind = "pickle"
        else:
            header = read_header(path)
            entries, metadata, kind = header.entries, header.metadata, "safetensors"
            load = _loader(path, header)
    except OSError as error:
        raise Refused(f"{where} cannot be read: {reason(error)}.") from None
    return Source(entries, metadata, kind, load, config, preprocessor, tuple(notes))


def _loader(path: Path, header: Header) -> Callable[[], tuple[dict[str, Tensor], str]]:
    def load() -> tuple[dict[str, Tensor], str]:
        try:
            return read_tensors(path, header)
        except OSError as error:
            raise Refused(f"{shown(path)} cannot be read: {reason(error)}.") from None

    return load


def _in_folder(folder: Path) -> Path:
    if (folder / INDEX).is_file():
        return folder / INDEX
    found = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if len(found) == 1:
        return found[0]
    if folder / "model.safetensors" in found:
        return folder / "model.safetensors"
    count = f"{len(found)} safetensors files" if found else "no safetensors file"
    raise Refused(f"{shown(folder)} holds {count}: name the one to read.")


def _description(path: Path, notes: list[str]) -> dict | None:
    """A JSON table beside the weights; a broken one is only a lost claim, and said so."""
    if not path.is_file():
        return None
    try:
        table = _json(path)
    except (ValueError, RecursionError, OSError):
        table = None
    if not isinstance(table, dict):
        notes.append(f"{shown(path)} is not a readable JSON table and was ignored.")
        return None
    return table


def _json(path: Path) -> object:
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError("too large")
    return json.loads(path.read_bytes().decode("utf-8"))


def _shards(
    index: Path,
) -> tuple[tuple[Entry, ...], dict[str, str], Callable[[], tuple[dict[str, Tensor], str]]]:
    where = shown(index)
    try:
        table = _json(index)
        files = table["weight_map"] if isinstance(table, dict) else {}
        names = {str(k): str(v) for k, v in files.items()}
    except (ValueError, RecursionError, KeyError, AttributeError):
        raise Refused(f"{where} is not an index of shards: it has no readable weight_map.") from None
    # A path in an index could name any file of this machine: only plain names beside it are followed.
    outside = [f for f in names.values() if Path(f).name != f or "\\" in f or f in ("", "..")]
    if outside or not names:
        raise Refused(
            f"{where} names a shard that is not a file beside it: {shown(outside[0] if outside else '')!r}."
        )
    headers: dict[Path, Header] = {}
    for shard in sorted(set(names.values())):
        path = index.parent / shard
        if not path.is_file():
            raise Refused(f"{where} names the shard {shown(shard)}, which is not there.")
        headers[path] = read_header(path)
    entries: list[Entry] = []
    metadata: dict[str, str] = {}
    at = 0
    for path, header in headers.items():
        metadata |= header.metadata
        for e in header.entries:
            if names.get(e.name) != path.name:
                raise Refused(f"{where} does not say that {shown(path.name)} holds {shown(e.name)}.")
            entries.append(Entry(e.name, e.dtype, e.shape, at, at + e.end - e.begin))
            at += e.end - e.begin
    missing = names.keys() - {e.name for e in entries}
    if missing:
        raise Refused(f"{where} names {shown(min(missing))}, which no shard holds.")

    def load() -> tuple[dict[str, Tensor], str]:
        digest = hashlib.sha256(index.read_bytes())
        tensors: dict[str, Tensor] = {}
        for path, header in headers.items():
            some, own = _loader(path, header)()
            tensors |= some
            digest.update(own.encode())
        return tensors, digest.hexdigest()

    return tuple(entries), metadata, load


def _pickle(
    path: Path,
) -> tuple[tuple[Entry, ...], dict[str, str], Callable[[], tuple[dict[str, Tensor], str]]]:
    """Plain tensors of a torch file, read with the unpickler that builds nothing else."""
    where = shown(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever a hostile pickle makes the unpickler raise
        raise Refused(
            f"{where} holds more than plain tensors, or is damaged: convert it where you trust it."
        ) from None
    table = loaded
    for key in WEIGHT_KEYS:
        if isinstance(table, Mapping) and isinstance(table.get(key), Mapping):
            table = table[key]
            break
    if not isinstance(table, Mapping) or not table:
        raise Refused(f"{where} holds no table of tensors: save the network's state_dict.")
    for name, value in table.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.dtype not in NAMES:
            raise Refused(f"{where}: {shown(name)} is not a plain tensor: save the network's state_dict.")
    tensors = {name: value.detach().contiguous().clone() for name, value in table.items()}
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for piece in iter(lambda: stream.read(1 << 24), b""):
            digest.update(piece)
    return lay_out(tensors), {}, lambda: (tensors, digest.hexdigest())
