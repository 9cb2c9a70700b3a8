"""What was typed, checked before any work and before torch is imported."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdclean.errors import Refused, UsageError
from bdclean.registry import DETECTORS, TRIGGERS, closest, find, parse_spec

if TYPE_CHECKING:
    from bdclean.inputs import Inputs

LARGEST_TEXT = 256_000_000  # bytes of records at once: a run with pictures has under 1 MB


def check_triggers(specs: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the SPECs, each of a known trigger."""
    for spec in specs or ():
        find(TRIGGERS, parse_spec(spec)[0])
    return tuple(specs or ())


def check_detectors(names: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names, each of a known detector."""
    for name in names or ():
        find(DETECTORS, name)
    return tuple(names or ())


def check_target(text: str) -> str:
    """Returns `auto`, `each`, `next` or a class number as it was given."""
    if text not in ("auto", "each", "next") and not re.fullmatch(r"[0-9]{1,9}", text):
        raise UsageError(
            f"--target {text!r} is not known: give auto, each, next, or a class as a number from 0."
        )
    return text


def expand_models(models: Sequence[str]) -> list[str]:
    """Returns the paths, those of standard input in the place of `-`."""
    paths: list[str] = []
    for model in models:
        if model == "-":
            paths += [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line.strip()]
        else:
            paths.append(model)
    if not paths:
        raise UsageError("no model: standard input names none.")
    return paths


def read_text(path: str) -> str:
    """Returns the text of a file or pipe, or of standard input for `-`, as far as records can be large."""
    try:
        raw = sys.stdin.buffer.read(LARGEST_TEXT + 1) if path == "-" else _bytes(path)
        if len(raw) > LARGEST_TEXT:
            raise Refused(f"{path} has more than {LARGEST_TEXT // 10**6} MB: expected records of bdclean's.")
        return raw.decode("utf-8")
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise Refused(f"{path} is not text: expected a record of bdclean's.") from None


def _bytes(path: str) -> bytes:
    # Without O_NONBLOCK, to open a pipe that nobody writes to would wait forever; a shell's <(...) has its writer.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        kind = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISFIFO(kind):
            raise Refused(f"{path} is neither a file nor a pipe: expected a record of bdclean's.")
        if hasattr(os, "set_blocking"):
            os.set_blocking(file.fileno(), True)
        return file.read(LARGEST_TEXT + 1)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises on a value of the options that scan and cleanse share that no run can have."""
    if options["kind"] == "encoder":
        raise Refused("encoders cannot be worked on by this version: only classifiers can.")
    for name, known in (("kind", ("auto", "classifier")), ("precision", ("auto", "fp32", "bf16", "fp16"))):
        if options[name] not in known:
            raise UsageError(f"there is no --{name} {options[name]!r}: {closest(options[name], known)}")
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", options["device"]):
        raise UsageError(f"--device {options['device']!r} is not known: give auto, cpu, cuda or cuda:N.")


def make_inputs(options: Mapping[str, Any]) -> Inputs:
    """Returns the options that scan and cleanse share. This is where torch is imported."""
    from bdclean.inputs import Inputs

    names = {field.name for field in dataclasses.fields(Inputs)} & set(options)
    values = {name: options[name] for name in names}
    return Inputs(**values, pictures=not options["no_pictures"], argv=tuple(sys.argv))


PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def default_output(model: Path, out: Path | None) -> Path:
    """Returns where the cleansed model goes: `out`, else beside the model with `.clean.safetensors`.

    Raises Refused on an `out` that is a folder, and where no name can be made from the model's.
    """
    if out is not None:
        if os.path.isdir(out):
            raise Refused(f"{out} is a folder: give --out a file name.")
        if out.suffix in PICKLES:
            raise UsageError(
                f"{out}: the output is always safetensors, so give it a name that ends in .safetensors."
            )
        return out
    model = model if model.name not in ("", "..") else model.resolve()
    if not model.name:
        raise Refused(f"{model} is not a model: name a safetensors file, or a folder with one.")
    name = model.name.removesuffix(".index.json")
    for ending in (".safetensors", *PICKLES):
        if name != ending and name.endswith(ending):
            name = name.removesuffix(ending)
            break
    return model.with_name(f"{name}.clean.safetensors")


def resume_state(output: Path) -> Path:
    """Returns where the state of a run lies that `--resume` goes on from; its readable copy ends in `.json`.

    Raises Refused where a file system could not hold that name.
    """
    state = output.with_name(f"{output.name}.resume.safetensors")
    if len(os.fsencode(state.name)) > 255:
        raise Refused(f"{output.name} is too long for a file name: choose a shorter --out.")
    return state
