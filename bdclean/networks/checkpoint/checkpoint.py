"""A stranger's checkpoint: checked, recognised, built, and written back as a drop-in replacement."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bdclean.data.decode import STRETCH
from bdclean.errors import Refused
from bdclean.files import strictjson
from bdclean.files.tensorfile import DTYPES, FLOATS, Entry, read_header, write_file
from bdclean.files.text import shown
from bdclean.files.writing import reason
from bdclean.networks.arch import COUNTER, Arch
from bdclean.networks.building import Undrawn, load
from bdclean.networks.checkpoint.claims import claimed_resize, layer_claim
from bdclean.networks.checkpoint.copies import copies
from bdclean.networks.checkpoint.second_files import second_files
from bdclean.networks.checkpoint.sources import open_source
from bdclean.networks.normalisation import Preprocess
from bdclean.networks.recognition.identify import identify
from bdclean.networks.recognition.matching import Match, Part, twins

SOURCE_KEY = "bdclean.source_sha256"
# What an output says of its network, as the config.json beside its input did: it must stand alone.
CONFIG_KEY = "bdclean.config"
# What its classes are called, in the head's order: a JSON list.
CLASSES_KEY = "bdclean.classes"
# The claims that an output keeps from its input.
CLAIM_KEYS = ("bdclean.preprocess", CONFIG_KEY, CLASSES_KEY)
# The parts of a config that say which network it is, and what its classes are called.
CONFIG_PARTS = ("architecture", "num_classes", "model_args", "global_pool", "model_type", "num_attention_heads",
                "layer_norm_eps", "hidden_act", "downsample_in_bottleneck", "downsample_in_first_stage",
                "image_size", "id2label", "label_names", "model_cfg", "vision_config")  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors, and the network that they belong to.

    `names`: the file's name for each tensor -> the network's, several to one where `parts` says which rows each is;
    `tied`: names of tensors that are copies of read ones, and stay so; `unread`: tensors that the network does not
    have, carried over as they are; `candidates`: networks whose tensors have the same names and shapes, `arch` first;
    `second`: what else the input holds that is the network again with weights of its own -> a sentence; `carried`: of
    these what is in the file itself, so that an output has it, too; `layer`: what a layer before the network does to
    pixels, which the file keeps among the unread.
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
    parts: dict[str, Part] = field(default_factory=dict, repr=False)
    tied: dict[str, str] = field(default_factory=dict, repr=False)
    paths: tuple[Path, ...] = ()
    second: dict[str, str] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    layer: Preprocess | None = None

    @staticmethod
    def read(
        path: Path | str, arch: str | None = None, allow_pickle: bool = False, kind: str = "auto"
    ) -> Checkpoint:
        """Read a file, folder or sharded index.

        `kind`: classifier; encoder, where a classifier's head stays unread; auto, a classifier where it is one. `arch`:
        a known name, or FILE.py:NAME or package.module:NAME of code that the user trusts. Headers, types and
        recognition come first, the weights last. Raises Refused, a sentence for each way in which a file can be bad.
        """
        source = open_source(Path(path), allow_pickle)
        beside = set(source.beside)
        shapes = {e.name: e.shape for e in source.entries if e.name not in beside}
        if not shapes:
            raise Refused(f"{shown(path)} holds no tensors.")
        own = _own_config(source.metadata)
        config = source.config if own is None else {**(source.config or {}), **own}
        found, notes = identify(shapes, arch, config, kind)
        match = replace(found[0], unread=found[0].unread + source.beside)
        _check_types(source.entries, match, shown(path))
        tensors, digest = source.load()
        _check_finite(tensors, match, shown(path))
        tied, more, second = copies(tensors, {e.name: e.dtype for e in source.entries}, match)
        # Files of self-supervision keep several copies by design, of which the family's rule takes one.
        carried = {} if match.arch.kind == "encoder" else second
        beside_it = second_files(Path(path), source.paths, shapes)
        return Checkpoint(
            source=Path(path),
            sha256=digest,
            tensors=tensors,
            metadata=source.metadata,
            arch=match.arch,
            names=match.names,
            unread=tuple(name for name in match.unread if name not in tied),
            format=source.format,
            candidates=tuple(m.arch for m in found),
            config=config,
            preprocessor=source.preprocessor,
            warnings=tuple(
                dict.fromkeys([*source.warnings, *notes, *more, *second.values(), *beside_it.values()])
            ),
            entries=source.entries,
            parts=match.parts,
            tied=tied,
            paths=source.paths,
            second=carried | beside_it,
            carried=carried,
            layer=layer_claim(tensors, match.unread),
        )

    def again(self, path: Path | str) -> Checkpoint:
        """What `write` made at `path`, read back as the same network; the file must have the same tensors."""
        source = open_source(Path(path), allow_pickle=False)
        if source.entries != self.entries:
            raise Refused(
                f"{shown(path)} does not hold the tensors that were written: something else writes to it."
            )
        tensors, digest = source.load()
        _check_finite(tensors, Match(self.arch, self.names, self.unread), shown(path))
        return replace(
            self, source=Path(path), sha256=digest, tensors=tensors, metadata=source.metadata, warnings=()
        )

    def build(self, device: str | torch.device = "cpu", arch: Arch | None = None) -> nn.Module:
        """The network with these weights in float32 and evaluation mode; names and shapes match exactly.

        `arch`: one of `candidates` instead of the first.
        """
        state = self.state()
        # All weights come from the file. A user's code may draw in ways of its own: aside, so that a seeded run is the
        # same with or without it.
        wanted = arch or self.arch
        with (
            torch.random.fork_rng(devices=[]),
            nullcontext() if wanted.of_user else Undrawn(),
        ):
            network = wanted.build()
        own = network.state_dict()
        twin = twins(network)
        for name in own.keys() - state.keys():
            held = next((n for n in twin.get(name, ()) if n in state), None)
            if held is not None:
                state[name] = state[held]
            elif name.endswith(COUNTER) or not own[name].is_floating_point():
                state[name] = own[name]
            else:
                raise Refused(f"{shown(self.source)} lacks {shown(name)}.")
        _check_tied(own, state, shown(self.source))
        _check_tables(own, state, shown(self.source))
        load(network, state)
        return network.float().eval().to(device)

    def state(self) -> dict[str, Tensor]:
        """The network's tensors in float32, of one or several of the file's each; whole numbers as they are."""
        pieces: dict[str, list[tuple[int, Tensor]]] = {}
        for key, name in self.names.items():
            tensor, part = self.tensors[key], self.parts.get(key)
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32)
            at = 0 if part is None else part.begin
            pieces.setdefault(name, []).append((at, tensor if part is None else tensor.reshape(part.shape)))
        return {
            name: own[0][1] if len(own) == 1 else torch.cat([t for _, t in sorted(own, key=lambda p: p[0])])
            for name, own in pieces.items()
        }

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
        out = {e.name: self.tensors[e.name] for e in self.entries if e.name not in self.names}
        for entry in self.entries:
            if entry.name in self.names:
                out[entry.name] = self._written(entry, state[self.names[entry.name]].detach().cpu())
        out |= {name: out[read] for name, read in self.tied.items()}
        return write_file(path, self.entries, self._metadata(provenance), out)

    def _written(self, entry: Entry, tensor: Tensor) -> Tensor:
        """The network's tensor, or the rows of it that `entry` is, in the file's shape and type."""
        part = self.parts.get(entry.name)
        if part is not None and tensor.ndim:
            rows = part.shape[0] if part.shape else len(tensor)
            tensor = tensor[part.begin : part.begin + rows]
        if tuple(tensor.shape) != (entry.shape if part is None else part.shape):
            raise Refused(f"{shown(entry.name)} is {list(tensor.shape)}, the file's is {list(entry.shape)}.")
        tensor, before = tensor.reshape(entry.shape), self.tensors[entry.name]
        cast = tensor.to(DTYPES[entry.dtype])
        if cast.is_floating_point() and not bool(torch.isfinite(cast).all()):
            raise Refused(
                f"{shown(entry.name)} has values that {entry.dtype} cannot hold: nothing was written."
            )
        # A number that training left alone keeps its bits, also those that float32 cannot hold.
        return torch.where(before.to(tensor.dtype) == tensor, before, cast)

    def _metadata(self, provenance: Mapping[str, str]) -> dict[str, str]:
        """The file's own metadata in its order, then provenance; that of an earlier cleansing is replaced."""
        kept = {k: v for k, v in self.metadata.items() if not k.startswith("bdclean.") or k in CLAIM_KEYS}
        given = {k if k.startswith("bdclean.") else f"bdclean.{k}": str(v) for k, v in provenance.items()}
        if _own_config(kept) is None:
            kept.pop(CONFIG_KEY, None)
            said = {k: v for k, v in (self.config or {}).items() if k in CONFIG_PARTS}
            resize = claimed_resize(self.config, self.preprocessor)
            if said or resize != STRETCH:
                said |= asdict(resize) | {"input_size": list(self.arch.input)}
                kept |= {CONFIG_KEY: json.dumps(said, sort_keys=True)}
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
        return any(os.path.samefile(out, path) for path in self.paths if path.exists())


def _own_config(metadata: Mapping[str, str]) -> dict | None:
    """The config that an earlier output carries with it."""
    text = metadata.get(CONFIG_KEY)
    try:
        table = strictjson.parse(text) if text is not None else None
    except strictjson.NotJson:
        return None
    return table if isinstance(table, dict) else None


def made_from(path: Path) -> str | None:
    """The sha256 of the file that an output was made from; None for any other file."""
    try:
        return read_header(path).metadata.get(SOURCE_KEY)
    except (Refused, OSError):
        return None


def _check_types(entries: tuple[Entry, ...], match: Match, where: str) -> None:
    """Weights must be of a type that can be trained; whole numbers may only be where the network has such."""
    odd = [e for e in entries if e.name in match.names and e.dtype not in FLOATS]
    indices: set[str] = set()
    if any(e.dtype in DTYPES and not e.name.endswith(COUNTER) for e in odd):
        with torch.device("meta"):
            own = match.arch.build().state_dict()
        indices = {name for name, tensor in own.items() if not tensor.is_floating_point()}
    for entry in odd:
        name = match.names[entry.name]
        if entry.dtype not in DTYPES or not (name.endswith(COUNTER) or name in indices):
            raise Refused(
                f"{where}: {shown(entry.name)} is {entry.dtype}; quantised weights are not supported, "
                "give the float32, float16 or bfloat16 file."
            )


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


def _check_tables(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Whole numbers that the network computes itself must be the file's: others would read outside of a table."""
    for name, tensor in own.items():
        if tensor.is_floating_point() or name.endswith(COUNTER):
            continue
        if tensor.device.type != "meta" and not torch.equal(tensor, state[name].to(tensor.dtype)):
            raise Refused(f"{where}: {shown(name)} is not the table that the network computes.")


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
