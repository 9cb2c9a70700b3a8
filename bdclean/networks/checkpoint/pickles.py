"""Tensors of torch's own files, after --allow-pickle: read by the unpickler that builds nothing but tensors and tables.

What a training script pickled beside them is passed over (`strangers`), newer pickle protocols are read, too
(`protocols`). The network's table is read under its own
names; tensors beside it (an optimizer's, an average's) are kept under theirs.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdclean.errors import Refused
from bdclean.files.tensorfile import NAMES, Entry
from bdclean.files.text import shown
from bdclean.networks.checkpoint.protocols import NoProtocol2, opened
from bdclean.networks.checkpoint.strangers import Stubs, UnpicklingError, foreign
from bdclean.networks.recognition.dialects import BESIDE, LONGEST

# Where training scripts keep the weights inside a saved table (netC: WaNet's and Input-Aware's); averages only where
# nothing else is there.
WEIGHT_KEYS = (
    "state_dict", "model_state_dict", "net_state_dict", "model_state", "model", "net", "netC", "network", "module",
    "weights", "params", "model_raw", "state_dict_ema", "model_ema", "ema_state_dict", "ema",
)  # fmt: skip
OTHER_NAMES = {
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.uint16: "U16", torch.uint32: "U32",
    torch.uint64: "U64", torch.complex64: "C64",
}  # fmt: skip
DEEPEST = 12
# Shared weights are written once a name: at most this many times the file.
LARGEST = 8


def read_pickle(
    path: Path,
) -> tuple[tuple[Entry, ...], Callable[[], tuple[dict[str, Tensor], str]], list[str], tuple[str, ...]]:
    """Entries as they will be written, the tensors with the file's sha256, what was left out, and what lies beside.

    The last are names of tensors that are not in the weights' own table.
    """
    where = shown(path)
    size = path.stat().st_size
    _check_archive(path, size)
    loaded = _load(path)
    if isinstance(loaded, (list, tuple)) and loaded and isinstance(loaded[0], Mapping):
        # [state_dict] or (state_dict, optimizer's, ...)
        loaded = {str(k): value for k, value in enumerate(loaded)}
    if isinstance(loaded, Tensor) or not isinstance(loaded, Mapping) or not loaded:
        raise Refused(f"{where} holds no table of tensors: save the network's state_dict().")
    prefix = _weights(loaded)
    tensors: dict[str, Tensor] = {}
    left: list[str] = []
    beside: list[str] = []
    for name, value in _walk(loaded, "", left, where):
        short = name.removeprefix(prefix)
        if not name.startswith(prefix):
            beside.append(short)
        if short in tensors:
            raise Refused(f"{where} holds two tensors that would both be called {shown(short)}.")
        tensors[short] = value
    if not tensors:
        raise Refused(f"{where} holds no table of tensors: save the network's state_dict().")
    # The network's own come first.
    apart = set(beside)
    order = sorted(tensors, key=lambda n: n in apart)
    entries, held, at = [], {}, 0
    for name in order:
        entry, held[name] = _plain(name, tensors[name], at, size, where)
        entries.append(entry)
        at = entry.end
        if at > LARGEST * size:
            raise Refused(
                f"{where} holds tensors of {at:,} bytes in {size:,}: it is damaged or made to fill memory."
            )
    notes = []
    if left:
        some = ", ".join(shown(n) for n in left[:6]) + (", ..." if len(left) > 6 else "")
        notes.append(f"not tensors, so not in a safetensors file: {some}.")
    return tuple(entries), lambda: (held, _digest(path)), notes, tuple(beside)


def _check_archive(path: Path, size: int) -> None:
    """torch stores without compression: what would grow when unpacked is a bomb."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        raise Refused(f"{shown(path)} is a damaged archive: fetch it again.") from None
    if unpacked > size:
        raise Refused(
            f"{shown(path)} would unpack to {unpacked:,} bytes from {size:,}: it is not torch's own file."
        )


def _load(path: Path) -> object:
    where = shown(path)
    try:
        with opened(path) as stream:
            stubs = Stubs(foreign(stream))
            while True:
                stream.seek(0)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        with torch.serialization.safe_globals(stubs.allowed()):
                            return torch.load(stream, map_location="cpu", weights_only=True)
                except UnpicklingError as error:
                    if not stubs.corrected(str(error)):
                        raise
    except NoProtocol2 as error:
        raise Refused(
            f"{where} holds more than plain tensors and tables ({error} of a newer pickle protocol): save the "
            "network's state_dict() with safetensors where you trust it."
        ) from None
    except MemoryError:
        raise Refused(f"{where} does not fit into memory.") from None
    except Exception as error:  # whatever a hostile pickle makes the unpickler raise
        found = re.search(r"GLOBAL ([\w.]{1,200})", str(error))
        what = f"holds more than plain tensors (a pickled {found.group(1)})" if found else "is damaged"
        raise Refused(
            f"{where} {what}: save the network's state_dict() with safetensors where you trust it."
        ) from None


def _weights(loaded: Mapping[Any, Any]) -> str:
    """The beginning of the names that the weights' own table has in the whole."""
    prefix, table = "", loaded
    if isinstance(table.get("0"), Mapping) and _any_tensor(table["0"]):
        prefix, table = "0.", table["0"]
    for _ in range(2):
        inner = next(
            (k for k in WEIGHT_KEYS if isinstance(table.get(k), Mapping) and _any_tensor(table[k])), None
        )
        # A matrix beside it may be a part of the network, unless its name is known.
        if inner is None or any(
            isinstance(v, Tensor) and v.ndim > 1 and not BESIDE.match(str(k)[:LONGEST])
            for k, v in table.items()
        ):
            break
        prefix, table = f"{prefix}{inner}.", table[inner]
    return prefix


def _any_tensor(table: Mapping[Any, Any], depth: int = 0) -> bool:
    return any(
        isinstance(v, Tensor) or (depth < 2 and isinstance(v, Mapping) and _any_tensor(v, depth + 1))
        for v in table.values()
    )


def _walk(
    value: object, name: str, left: list[str], where: str, depth: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """All tensors by the path to them; names of other values go to `left`."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if depth > DEEPEST:
        raise Refused(f"{where} holds tables within tables without end: save the network's state_dict().")
    if isinstance(value, Mapping):
        pairs = [(str(k) if isinstance(k, (str, int)) else type(k).__name__, v) for k, v in value.items()]
    elif isinstance(value, (list, tuple)) and any(isinstance(v, (Tensor, Mapping)) for v in value):
        pairs = [(str(k), v) for k, v in enumerate(value)]
    else:
        left.append(name)
        return
    for key, inner in pairs:
        yield from _walk(inner, f"{name}.{key}" if name else key, left, where, depth + 1)


def _plain(name: str, tensor: Tensor, at: int, size: int, where: str) -> tuple[Entry, Tensor]:
    """A tensor as a safetensors file holds it; one of a type without arithmetic here comes as its bytes."""
    kind = NAMES.get(tensor.dtype) or OTHER_NAMES.get(tensor.dtype)
    if kind is None or tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        form = "sparse" if tensor.layout != torch.strided else str(tensor.dtype).removeprefix("torch.")
        raise Refused(f"{where}: {shown(name)} is {form}, which a safetensors file cannot hold.")
    length = tensor.numel() * tensor.element_size()
    if length > size:
        # A view may repeat one number without end.
        raise Refused(f"{where}: {shown(name)} would be {length:,} bytes, more than the file's {size:,}.")
    held = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    if kind not in NAMES.values():
        held = held.reshape(-1).view(torch.uint8) if held.numel() else held.new_empty(0, dtype=torch.uint8)
    elif kind == "BOOL":
        held = held.to(torch.uint8)
    return Entry(name, kind, tuple(tensor.shape), at, at + length), held


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for piece in iter(lambda: stream.read(1 << 24), b""):
            digest.update(piece)
    return digest.hexdigest()
