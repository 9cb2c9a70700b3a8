"""A folder that is given is a folder that is written: weights under their name, and what describes them beside."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from bdclean.errors import Refused
from bdclean.files import strictjson
from bdclean.files.text import shown
from bdclean.files.weights import in_folder, read_json
from bdclean.files.writing import replace, sweep
from bdclean.networks.checkpoint.checkpoint import Checkpoint, made_from

WEIGHTS = "model.safetensors"
"""Of shards and pickles, which are written as one safetensors file; others keep their name."""


def weights_in(place: Path, model: Path) -> Path:
    """Where in the folder `place` the cleansed weights of the folder `model` go."""
    name = in_folder(model).name
    return place / (name if name.endswith(".safetensors") else WEIGHTS)


def check_folder(place: Path, checkpoint: Checkpoint, force: bool) -> None:
    """Refuses now a folder that cannot be written, is the input, or holds what no earlier run has put there.

    What killed runs left half-written in it is deleted.
    """
    model = checkpoint.source
    if not os.path.lexists(place):
        checkpoint.check_writable(place, force)
        return
    if not place.is_dir():
        raise Refused(f"{shown(place)} is no folder, and the model is one: choose another --out.")
    if os.path.samefile(place, model):
        raise Refused(f"{shown(place)} is the input: choose another --out.")
    weights = weights_in(place, model)
    ours = {weights.name, *(file.name for file in descriptions(model))}
    for name in ours:
        sweep(place / name)
    others = sorted(set(os.listdir(place)) - ours)
    if not force and (others or (weights.exists() and made_from(weights) != checkpoint.sha256)):
        raise Refused(
            f"{shown(place)} exists and was not made from this input: choose another --out, or pass --force."
        )
    checkpoint.check_writable(weights, force)


def descriptions(model: Path) -> list[Path]:
    """The JSON files of the folder `model` that say what its weights are: config.json and its like, no index of shards.

    A link counts where it stays in the folder, or leads to the blobs of Hugging Face's cache beside it: a stranger's
    folder must not carry other files of this machine into an output.
    """
    folder = model.resolve()
    homes = [folder, *(above / "blobs" for above in folder.parents[1:2])]
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".index.json") or not any(
            path.resolve().is_relative_to(home) for home in homes
        ):
            continue
        with contextlib.suppress(strictjson.NotJson, OSError):
            read_json(path)
            found.append(path)
    return found


def copy_descriptions(model: Path, place: Path) -> None:
    """Makes the folder `place` with the `descriptions` of `model`; weights come last, so that it is no model before."""
    place.mkdir(exist_ok=True)
    for path in descriptions(model):
        raw = path.read_bytes()
        replace(place / path.name, lambda stream, raw=raw: stream.write(raw))  # type: ignore[misc]


def discard(place: Path, model: Path) -> None:
    """Takes away what `copy_descriptions` made, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        for path in descriptions(model):
            (place / path.name).unlink(missing_ok=True)
        place.rmdir()
