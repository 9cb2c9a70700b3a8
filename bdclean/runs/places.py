"""Where a run leaves its output and its resume state."""

from __future__ import annotations

import os
from pathlib import Path

from bdclean.errors import Refused, UsageError
from bdclean.files.weights import PICKLES


def default_output(model: Path, out: Path | None, new_head: bool = False) -> Path:
    """Returns where the cleansed model goes: `out`, else beside the model with `.clean.safetensors`.

    A folder becomes a folder, by default with `.clean`, unless `out` ends in .safetensors or the network gets a
    `new_head`: what the folder says of it holds no longer. Raises Refused on an `out` that is a folder where the model
    is a file, and where no name can be made from the model's.
    """
    if out is not None:
        if out == Path("-"):
            raise UsageError("--out - cannot be: the model is a file, standard output has the report.")
        if os.path.isdir(out) and not is_folder(out, model, new_head):
            raise Refused(f"{out} is a folder: give --out a file name.")
        if out.suffix in PICKLES:
            raise UsageError(
                f"{out}: the output is always safetensors, so give it a name that ends in .safetensors."
            )
        return out
    model = model if model.name not in ("", "..") else model.resolve()
    if os.path.isdir(model) and not new_head:
        return model.with_name(f"{model_stem(model)}.clean")
    return model.with_name(f"{model_stem(model)}.clean.safetensors")


def is_folder(place: Path, model: Path, new_head: bool) -> bool:
    """Whether what `default_output` returned is a folder that is to be written."""
    return os.path.isdir(model) and not new_head and place.suffix != ".safetensors"


def record_beside(place: Path, folder: bool) -> Path:
    """Returns where the record of an output goes: `.json` in place of a file's ending, behind a folder's name."""
    return place.with_name(f"{place.name}.json") if folder else place.with_suffix(".json")


def model_stem(model: Path) -> str:
    """Returns the model's name without the ending of its kind of file; raises Refused where it has none."""
    model = model if model.name not in ("", "..") else model.resolve()
    if not model.name:
        raise Refused(f"{model} is not a model: name a safetensors file, or a folder with one.")
    name = model.name.removesuffix(".index.json")
    for ending in (".safetensors", *PICKLES):
        if name != ending and name.endswith(ending):
            return name.removesuffix(ending)
    return name


def resume_state(output: Path) -> Path:
    """Returns where the state of a run lies that `--resume` goes on from; its readable copy ends in `.json`.

    Raises Refused where a file system could not hold that name.
    """
    state = output.with_name(f"{output.name}.resume.safetensors")
    if len(os.fsencode(state.name)) > 255:
        raise Refused(f"{output.name} is too long for a file name: choose a shorter --out.")
    return state
