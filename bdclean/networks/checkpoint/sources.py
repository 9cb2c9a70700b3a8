"""Where a checkpoint's tensors lie: one safetensors file, a folder, a sharded index, or (when allowed) a pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bdclean.errors import Refused
from bdclean.files import strictjson
from bdclean.files.kinds import looks_like_pickle, sentence
from bdclean.files.tensorfile import Entry, Header, most_bytes, read_header, read_tensors
from bdclean.files.text import shown
from bdclean.files.writing import reason
from bdclean.networks.checkpoint.pickles import read_pickle

INDEX = "model.safetensors.index.json"
# A model's own description is a few kB, with the names of 22,000 classes 2 MB; an index of 10,000 tensors 1 MB.
LARGEST_JSON = 10_000_000
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Source:
    """Headers read and checked, weights not yet: `load` gives all tensors and the sha256 of what was read.

    `paths`: the files that they lie in; `beside`: tensors that are kept apart from the network's in a torch file.
    """

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    format: str
    load: Callable[[], tuple[dict[str, Tensor], str]]
    config: dict | None
    preprocessor: dict | None
    warnings: tuple[str, ...]
    paths: tuple[Path, ...]
    beside: tuple[str, ...] = ()


def open_source(path: Path, allow_pickle: bool) -> Source:
    """Find the file or files behind `path` and read their headers."""
    where = shown(path)
    try:
        if path.is_dir():
            path = _in_folder(path)
            where = shown(path)
        elif not path.exists():
            raise Refused(f"{where} does not exist.")
        elif not path.is_file():
            raise Refused(f"{where} is not a regular file.")
        notes: list[str] = []
        paths: tuple[Path, ...] = (path,)
        beside: tuple[str, ...] = ()
        config = _description(path.parent / "config.json", notes)
        # OpenCLIP's says the activation and the normalisation; LAION's folders have transformers' beside it.
        own = _description(path.parent / "open_clip_config.json", notes)
        config = {**own, **(config or {})} if own else config
        preprocessor = _description(path.parent / "preprocessor_config.json", notes)
        if path.name.endswith(".index.json"):
            entries, metadata, load, paths = _shards(path)
            kind = "safetensors-sharded"
        elif (known := sentence(path, where)) is not None:
            raise Refused(known)
        elif looks_like_pickle(path):
            if not allow_pickle:
                raise Refused(
                    f"{where} is a pickle and can run code when loaded: "
                    "convert it where you trust it, or pass --allow-pickle to read plain tensors only."
                )
            entries, load, more, beside = read_pickle(path)
            metadata, kind = {}, "pickle"
            notes += more
        else:
            header = read_header(path)
            entries, metadata, kind = header.entries, header.metadata, "safetensors"
            load = _loader(path, header)
    except OSError as error:
        raise Refused(f"{where} cannot be read: {reason(error)}.") from None
    return Source(entries, metadata, kind, load, config, preprocessor, tuple(notes), paths, beside)


def digest(path: Path) -> str | None:
    """The sha256 that `load` would give of what lies behind `path`, whether it can be read as a network or not.

    None where that is no file or folder with one, or a file larger than this machine could read as a network.
    """
    try:
        file = _in_folder(path) if path.is_dir() else path
        if file.name.endswith(".index.json"):
            with suppress(Refused):
                return _shards(file)[2]()[1]
        if not file.is_file() or file.stat().st_size > most_bytes():
            return None
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (Refused, OSError):
        return None


def _loader(path: Path, header: Header) -> Callable[[], tuple[dict[str, Tensor], str]]:
    def load() -> tuple[dict[str, Tensor], str]:
        try:
            return read_tensors(path, header)
        except OSError as error:
            raise Refused(f"{shown(path)} cannot be read: {reason(error)}.") from None

    return load


def _in_folder(folder: Path) -> Path:
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


def _description(path: Path, notes: list[str]) -> dict | None:
    """A JSON table beside the weights; a broken one is only a lost claim, and said so."""
    if not path.is_file():
        return None
    try:
        table = _json(path)
    except (strictjson.NotJson, OSError):
        table = None
    if not isinstance(table, dict):
        notes.append(f"{shown(path)} is not a readable JSON table and was ignored.")
        return None
    return table


def _json(path: Path) -> object:
    with path.open(
        "rb"
    ) as stream:  # read up to the cap: some files, as in /proc, do not say how long they are
        raw = stream.read(LARGEST_JSON + 1)
    if len(raw) > LARGEST_JSON:
        raise strictjson.NotJson("too large")
    found = strictjson.parse(raw)
    if not strictjson.shallow(found):
        raise strictjson.NotJson("too deep")
    return found


def _shards(
    index: Path,
) -> tuple[tuple[Entry, ...], dict[str, str], Callable[[], tuple[dict[str, Tensor], str]], tuple[Path, ...]]:
    where = shown(index)
    try:
        table = _json(index)
        files = table["weight_map"] if isinstance(table, dict) else {}
        if not files or not all(isinstance(file, str) for file in files.values()):
            raise ValueError
        names: dict[str, str] = dict(files)
    except (ValueError, KeyError, AttributeError):
        raise Refused(f"{where} is not an index of shards: it has no readable weight_map.") from None
    # A path in an index could name any file of this machine: only plain names beside it are followed.
    outside = [f for f in names.values() if Path(f).name != f or "\\" in f or f in ("", "..")]
    if outside:
        raise Refused(f"{where} names a shard that is not a file beside it: {shown(outside[0])!r}.")
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

    return tuple(entries), metadata, load, (index, *headers)
