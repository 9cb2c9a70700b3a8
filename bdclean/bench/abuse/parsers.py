"""What reads strangers' files and texts, each made to be fuzzed: how to draw an input, and a function that tries it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import torch

from bdclean import registry
from bdclean.bench.abuse.mutations import blurred, edited, respelled, tensor_file
from bdclean.data.labels.classfile import read_class_file
from bdclean.errors import BdcleanError
from bdclean.files.tensorfile import Entry, lay_out, read_header, read_tensors
from bdclean.files.text import plain
from bdclean.files.weights import INDEX
from bdclean.networks.checkpoint.claims import claim
from bdclean.networks.checkpoint.sources import open_source
from bdclean.networks.normalisation import parse_preprocess
from bdclean.record import gate
from bdclean.record.parsing import parse_records
from bdclean.record.run import Rate, RunRecord, TriggerRow
from bdclean.report.formats import render
from bdclean.triggers.reading import read_content


class Laxer(Exception):
    """We accept a file that the reference library refuses, or read other tensors from it."""


@dataclass(frozen=True)
class Parser:
    """`share`: of 1,000 cases; `make` draws an input; `attempt` reads it, given it and an empty folder's path.

    `attempt` raises BdcleanError where the input is refused; anything else that it raises is a defect.
    """

    share: int
    make: Callable[[random.Random], bytes]
    attempt: Callable[[bytes, Path], object]


# --- safetensors --------------------------------------------------------------------------------------------


@cache
def tensors() -> dict[str, torch.Tensor]:
    """A few tensors of several types, one without elements and a scalar among them."""
    draw = torch.Generator().manual_seed(0)
    return {
        "conv1.weight": torch.randn(2, 3, 1, 1, generator=draw),
        "bn1.running_mean": torch.randn(2, generator=draw).double(),
        "bn1.num_batches_tracked": torch.tensor(7),
        "fc.weight": torch.randn(2, 2, generator=draw).half(),
        "fc.bias": torch.randn(2, generator=draw).bfloat16(),
        "mask": torch.tensor([True, False, True, True]),
        "empty": torch.empty(0, 3),
        "bytes": torch.arange(4, dtype=torch.uint8),
    }


@cache
def valid() -> tuple[dict[str, Any], bytes]:
    """Header and data of a valid file."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", "author": "x"}}
    data = b""
    for e in lay_out(tensors()):
        table[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.begin, e.end]}
        data += tensors()[e.name].reshape(-1).view(torch.uint8).numpy().tobytes()
    return table, data


def library_reads(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """Name -> type, shape and bytes as the safetensors library reads them; None where it refuses."""
    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in found}


def read_safetensors(content: bytes, folder: Path) -> None:
    """Reads a file; raises Laxer where the library would not, or reads something else."""
    path = folder / "m.safetensors"
    path.write_bytes(content)
    header = read_header(path)
    found, _ = read_tensors(path, header)
    theirs = library_reads(content)
    if theirs is None:
        raise Laxer("the safetensors library refuses this file")
    if theirs.keys() != found.keys():
        raise Laxer("the safetensors library reads other names")
    for e in header.entries:
        if theirs[e.name] != (e.dtype, list(e.shape), _content(e, found[e.name], theirs[e.name][2])):
            raise Laxer("the safetensors library reads another tensor")


def _content(entry: Entry, tensor: torch.Tensor, theirs: bytes) -> bytes:
    own = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    # Booleans other than 0 and 1 are made 1, on purpose.
    return theirs if entry.dtype == "BOOL" and own == bytes(b != 0 for b in theirs) else own


# --- other files --------------------------------------------------------------------------------------------


@cache
def shard() -> bytes:
    """The valid file."""
    table, data = valid()
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def read_index(content: bytes, folder: Path) -> None:
    """Reads a sharded index beside its shard."""
    (folder / "a.safetensors").write_bytes(shard())
    (folder / INDEX).write_bytes(content)
    open_source(folder, False).load()


def read_config(content: bytes, folder: Path) -> None:
    """Reads the JSON beside a model and what it claims; a broken one is only a lost claim."""
    (folder / "m.safetensors").write_bytes(shard())
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes(content)
    source = open_source(folder / "m.safetensors", False)
    said = claim(source.metadata, source.config, source.preprocessor)
    if said is not None and parse_preprocess(said[0].spec()).spec() != said[0].spec():
        raise AssertionError("a claim that cannot be written down")


def read_records(content: bytes, folder: Path) -> None:
    """Reads records and shows them in every format."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return
    found = parse_records(text, "r.json")
    # laying out a table takes thirty times as long as all else
    for form in ("table", "md", "json") if len(content) % 4 == 0 else ("md", "json", "sarif"):
        shown = render([*found, *found], form, everything=True)
        # what a stranger's record says must not reach a terminal as anything but text
        if any(plain(line) != line for line in shown.split("\n")):
            raise AssertionError(f"a control character in --format {form}")


def read_names(content: bytes, folder: Path) -> None:
    """Reads class names, as lines and as JSON."""
    path = folder / ("c.json" if content[:1] in (b"[", b"{") else "c.txt")
    path.write_bytes(content)
    read_class_file(path)


def read_trigger(content: bytes, folder: Path) -> None:
    """Reads a trigger's mask, pattern or delta."""
    path = folder / "t.safetensors"
    path.write_bytes(content)
    read_content(str(path))


# --- texts of the command line ------------------------------------------------------------------------------


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def read_spec(content: bytes, folder: Path) -> None:
    """Reads a trigger's SPEC and makes the trigger; its own spec gives the same trigger again."""
    name, settings = registry.parse_spec(_text(content))
    registry.find(registry.TRIGGERS, name)
    if {"source", "grid", "generator"} & settings.keys():
        return  # it would open any path
    made = registry.configure(registry.load(registry.TRIGGERS, name), settings)
    again = registry.configure(registry.load(registry.TRIGGERS, name), registry.parse_spec(made.spec())[1])
    if again != made:
        raise AssertionError("a trigger that its own spec does not give")


def read_setting(content: bytes, folder: Path) -> None:
    """Reads --set for every recipe; at least one must take it."""
    settings = registry.parse_settings(_text(content).split("\x1f"))
    refused: BdcleanError | None = None
    taken = 0
    for name in registry.RECIPES:
        try:
            registry.configure(registry.load(registry.RECIPES, name), settings)
            taken += 1
        except BdcleanError as error:
            refused = error
    if not taken and refused is not None:
        raise refused


def read_normalisation(content: bytes, folder: Path) -> None:
    """Reads --preprocess; its own spec means the same."""
    found = parse_preprocess(_text(content))
    if parse_preprocess(found.spec()).affine() != found.affine():
        raise AssertionError("a normalisation that its own spec does not give")


def read_gate(content: bytes, folder: Path) -> None:
    """Reads --fail-on and applies it."""
    record = RunRecord("scan", triggers=[TriggerRow("x", asr=Rate(0.5, 100, 0.4, 0.6), outcome="fails")])
    gate.parse([_text(content)]).exit_code(record)


SPECS = (
    "badnets", "badnets:size=3,position=bottom-right", "badnets:size=4,pattern=random,seed=3,margin=1",
    "blend:alpha=0.1", "blend:alpha=0.2,seed=3", "sig:delta=40,frequency=6,angle=90", "file:t.png,size=3",
    "sig", "file:a:b,c.png",
)  # fmt: skip
SETTINGS = (
    "epochs=3", "lr=0.1", "least_steps=1\x1fepochs=2", "batch_size=8", "temperature=4", "augment=auto",
    "learning_rate=1e-3",
)  # fmt: skip
NORMALISATIONS = (
    "imagenet", "cifar10-bgr", "raw255,size=32/32", "mean=0.5/0.5/0.5,std=0.5/0.5/0.5", "half,size=224",
    "mean=1/2/3,std=1/1/1,scale=255,order=bgr,size=8/2048",
)  # fmt: skip
GATES = ("asr>=0.2", "clean_accuracy<0.8", "inconclusive", "never", "excess_asr>=.1", "agreement<=0.9e-1")


def _tree(*trees: Any) -> Callable[[random.Random], bytes]:
    def make(draw: random.Random) -> bytes:
        text = json.dumps(edited(draw.choice(trees), draw)).encode()
        return blurred(text, draw) if draw.random() < 0.3 else text

    return make


def _words(*texts: str) -> Callable[[random.Random], bytes]:
    return lambda draw: respelled(draw.choice(texts), draw).encode("utf-8", "surrogatepass")


@cache
def whole_record() -> dict[str, Any]:
    """A record in which most fields are set."""
    rate = {"value": 0.5, "n": 100, "low": 0.4, "high": 0.6}
    row = {
        "trigger": "badnets", "family": "patch", "seen_family": True, "target": 3, "target_source": "given",
        "images": 100, "asr": rate, "base_rate": rate, "control_rate": {"median": 0.1, "highest": 0.2, "count": 19},
        "robust_accuracy": rate, "worst_source": {"class": 1, **rate}, "outcome": "fails", "reason": "one source alone",
    }  # fmt: skip
    measure = {"name": "clean_accuracy", **rate}
    side = {"verdict": "backdoored", "measures": [measure], "triggers": [row]}
    checkpoint = {
        "path": "m.safetensors", "sha256": "0" * 64, "format": "safetensors", "architecture": "resnet20", "classes": 10,
        "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "parameters": 1000, "unread": ["x"],
        "preprocess": "half", "preprocess_margin": 2.0, "alternatives": [{"name": "a", "reason": "b"}],
    }  # fmt: skip
    data = {
        "path": "d",
        "images": 9,
        "labeled": True,
        "unreadable": [{"path": "p", "reason": "r"}],
        "classes": ["a"],
    }
    return {
        "schema": "bdclean.run/1", "command": "cleanse", "verdict": "backdoored", "outcome": "ran",
        "started": "2025-01-01T00:00:00+00:00", "seconds": 7.5, "seed": 0, "versions": {"bdclean": "1"},
        "device": "cpu", "checkpoint": checkpoint, "data": data, "threshold": 0.2, "measures": [measure],
        "triggers": [row],
        "findings": [{"detector": "d", "verdict": "fires", "score": 1.0, "reason": "r"}],
        "pictures": [{"role": "given", "png_base64": "AAAA", "before": 1, "after": 2}], "confusion": [
            {"model": "suspect", "trigger": "badnets", "target": 0, "counts": [[1, 2], [3, 4]]}
        ],
        "calibration": [{"detector": "d", "kind": "k", "score": 1.0, "scores": [0.5, 2.0], "p_value": 0.5}],
        "skipped": [{"what": "a", "reason": "b"}], "warnings": ["w"], "advice": "more images",
        "recipe": {"name": "bcu", "source": "s", "settings": {"a": 1}, "stages": ["x"], "families": ["patch"]},
        "before": side, "after": side, "curve": [{"step": 1, "loss": 0.5}], "output": {"path": "o", "sha256": "0"},
        "problem": None, "accepted": {"reason": "r", "expires": "2020-01-01"},
    }  # fmt: skip


def parsers() -> dict[str, Parser]:
    """Every reader by name; shares add up to 1,000."""
    table, data = valid()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors(), "a.safetensors")}
    timm = {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "input_size": [3, 32, 32], "crop_pct": 0.9}}  # fmt: skip
    face = {"model_type": "resnet", "id2label": {"0": "a"}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
            "size": {"shortest_edge": 224}, "do_rescale": True, "rescale_factor": 0.0039}  # fmt: skip
    record = whole_record()
    report = {"schema": "bdclean.report/1", "runs": [record]}
    names = (["cat", "dog", "cow"], {"0": "cat", "1": "dog"})
    delta = {"delta": {"dtype": "F32", "shape": [3, 4, 4], "data_offsets": [0, 192]}}
    small = b"\x00\x00\x80\x3e" * 48
    return {
        "header": Parser(640, lambda draw: tensor_file(table, data, draw), read_safetensors),
        "sharded index": Parser(60, _tree(index), read_index),
        "config.json": Parser(60, _tree(timm, face), read_config),
        "record": Parser(30, _tree(record, report), read_records),
        "class names": Parser(40, _tree(*names), read_names),
        "trigger file": Parser(30, lambda draw: tensor_file(delta, small, draw), read_trigger),
        "--trigger": Parser(50, _words(*SPECS), read_spec),
        "--set": Parser(30, _words(*SETTINGS), read_setting),
        "--preprocess": Parser(30, _words(*NORMALISATIONS), read_normalisation),
        "--fail-on": Parser(30, _words(*GATES), read_gate),
    }
