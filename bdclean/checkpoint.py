"""A stranger's checkpoint: checked, recognised, built, and written back as a drop-in replacement."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from bdclean.architectures.arch import Arch
from bdclean.architectures.dialects import COUNTER
from bdclean.architectures.matching import Match, shown
from bdclean.architectures.recognition import identify
from bdclean.errors import Refused
from bdclean.sources import open_source
from bdclean.tensorfile import DTYPES, FLOATS, Entry, read_header, write_file
from bdclean.writing import reason

SOURCE_KEY = "bdclean.source_sha256"
# The claims about preprocessing that an output keeps from its input.
CLAIM_KEYS = ("bdclean.preprocess",)


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors, and the network that they belong to.

    `names`: the file's name for each tensor -> the network's; `unread`: tensors that the network does not have, carried
    over as they are; `candidates`: networks whose tensors have the same names and shapes, `arch` first.
    """

    source: Path
    sha256: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    metadata: dict[str, str]
    arch: Arch
    names: dict[str, str] = field(repr=False)
    unread: tuple[str, ...]
    format: str
    candidates: tuple[Arch, ...] = ()
    config: dict | None = None
    preprocessor: dict | None = None
    warnings: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = field(default=(), repr=False)

    @staticmethod
    def read(path: Path | str, arch: str | None = None, allow_pickle: bool = False) -> Checkpoint:
        """Read a file, folder or sharded index.

        `arch`: a known name, or FILE.py:NAME or package.module:NAME of code that the user trusts. Headers, types and
        recognition come first, the weights last. Raises Refused, a sentence for each way in which a file can be bad.
        """
        source = open_source(Path(path), allow_pickle)
        shapes = {e.name: e.shape for e in source.entries}
        if not shapes:
            raise Refused(f"{shown(path)} holds no tensors.")
        found = identify(shapes, arch)
        match = found[0]
        for entry in source.entries:
            if entry.name in match.names and not entry.name.endswith(COUNTER) and entry.dtype not in FLOATS:
                raise Refused(
                    f"{shown(path)}: {shown(entry.name)} is {entry.dtype}; quantised weights are not supported, "
                    "give the float32, float16 or bfloat16 file."
                )
        tensors, digest = source.load()
        _check_finite(tensors, match, shown(path))
        return Checkpoint(
            source=Path(path),
            sha256=digest,
            tensors=tensors,
            metadata=source.metadata,
            arch=match.arch,
            names=match.names,
            unread=match.unread,
            format=source.format,
            candidates=tuple(m.arch for m in found),
            config=source.config,
            preprocessor=source.preprocessor,
            warnings=source.warnings,
            entries=source.entries,
        )

    def build(self, device: str | torch.device = "cpu", arch: Arch | None = None) -> nn.Module:
        """The network with these weights in float32 and evaluation mode; names and shapes match exactly.

        `arch`: one of `candidates` instead of the first.
        """
        state = {
            name: self.tensors[key] if name.endswith(COUNTER) else self.tensors[key].to(torch.float32)
            for key, name in self.names.items()
        }
        # The network starts with random weights: drawn aside, so that a seeded run is the same with or without it.
        with torch.random.fork_rng(devices=[]):
            network = (arch or self.arch).build()
        own = network.state_dict()
        for name in own.keys() - state.keys():
            if not name.endswith(COUNTER):
                raise Refused(f"{shown(self.source)} lacks {shown(name)}.")
            state[name] = own[name]
        _check_tied(own, state, shown(self.source))
        network.load_state_dict(state, strict=True)
        return network.float().eval().to(device)

    def write(
        self, model: nn.Module, path: Path | str, provenance: Mapping[str, str], force: bool = False
    ) -> str:
        """Write `model` (a network or a Classifier) with this file's names, order, shapes, types and metadata.

        Returns the sha256. The file appears whole or not at all, and the same weights give the same bytes.
        """
        path = Path(path)
        self.check_writable(path, force)
        network = getattr(model, "network", model)
        state = (network if isinstance(network, nn.Module) else model).state_dict()
        out: dict[str, Tensor] = {}
        for entry in self.entries:
            name = self.names.get(entry.name)
            if name is None:
                out[entry.name] = self.tensors[entry.name]
                continue
            tensor = state[name].detach().cpu()
            if tuple(tensor.shape) != entry.shape:
                raise Refused(
                    f"{shown(entry.name)} is {list(tensor.shape)}, the file's is {list(entry.shape)}."
                )
            cast = tensor.to(DTYPES[entry.dtype])
            if cast.is_floating_point() and not bool(torch.isfinite(cast).all()):
                raise Refused(
                    f"{shown(entry.name)} has values that {entry.dtype} cannot hold: nothing was written."
                )
            out[entry.name] = cast
        return write_file(path, self.entries, self._metadata(provenance), out)

    def _metadata(self, provenance: Mapping[str, str]) -> dict[str, str]:
        """The file's own metadata in its order, then provenance; that of an earlier cleansing is replaced."""
        kept = {k: v for k, v in self.metadata.items() if not k.startswith("bdclean.") or k in CLAIM_KEYS}
        given = {k if k.startswith("bdclean.") else f"bdclean.{k}": str(v) for k, v in provenance.items()}
        return kept | {SOURCE_KEY: self.sha256} | dict(sorted(given.items())) | {SOURCE_KEY: self.sha256}

    def check_writable(self, out: Path | str, force: bool = False) -> None:
        """Refuse now what would fail after the work: no folder, no permission, no room, or a file of something else."""
        out = Path(out)
        where = shown(out)
        if out.exists() and self._is_input(out):
            raise Refused(f"{where} is the input: choose another --out.")
        if out.is_dir():
            raise Refused(f"{where} is a folder: give --out a file name.")
        if not out.parent.is_dir():
            raise Refused(f"{shown(out.parent)} is not a folder: make it, or choose another --out.")
        if out.exists() and not force and made_from(out) != self.sha256:
            raise Refused(
                f"{where} exists and was not made from this input: choose another --out, or pass --force."
            )
        if not os.access(out.parent, os.W_OK | os.X_OK) or (out.exists() and not os.access(out, os.W_OK)):
            raise Refused(f"{where} cannot be written: permission denied; choose another --out.")
        needed = max((e.end for e in self.entries), default=0)
        try:
            free = shutil.disk_usage(out.parent).free
        except OSError as error:
            raise Refused(f"{where} cannot be written: {reason(error)}.") from None
        if free < needed:
            raise Refused(
                f"{where} needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free: choose another --out."
            )

    def _is_input(self, out: Path) -> bool:
        inputs = [self.source] if self.source.is_file() else list(self.source.glob("*.safetensors"))
        if self.source.name.endswith(".index.json"):
            inputs += list(self.source.parent.glob("*.safetensors"))
        return any(os.path.samefile(out, p) for p in inputs if p.exists())


def made_from(path: Path) -> str | None:
    """The sha256 of the file that an output was made from; None for any other file."""
    try:
        return read_header(path).metadata.get(SOURCE_KEY)
    except (Refused, OSError):
        return None


def _check_finite(tensors: Mapping[str, Tensor], match: Match, where: str) -> None:
    for key in match.names:
        tensor = tensors[key]
        if not tensor.is_floating_point():
            continue
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise Refused(
                f"{where}: {shown(key)} holds {bad} NaN or infinite values: the network cannot be run."
            )
        if key.endswith("running_var") and bool((tensor < 0).any()):
            raise Refused(f"{where}: {shown(key)} holds negative variances: the network cannot be run.")


def _check_tied(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Weights that the network ties must be equal in the file: loading would keep only the last of them."""
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in own.items():
        if not tensor.numel():
            continue
        twin = seen.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
        if twin != name and not torch.equal(state[twin], state[name]):
            raise Refused(
                f"{where}: the network ties {shown(twin)} and {shown(name)}, and the file's differ."
            )
