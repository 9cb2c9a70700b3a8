"""What was typed, checked before any work and before torch is imported."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from bdclean.errors import UsageError
from bdclean.files.text import closest
from bdclean.registry import DETECTORS, TRIGGERS, find, parse_spec
from bdclean.runs.options import Inputs


def check_triggers(specs: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the SPECs, each of a known trigger."""
    for spec in specs or ():
        find(TRIGGERS, parse_spec(spec)[0])
    return tuple(specs or ())


def check_detectors(names: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names, each of a known detector; whether it takes this kind of network is known with the file."""
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


def check_head(name: str) -> None:
    """Raises on anything but a head that is kept and a new one."""
    if name not in ("keep", "new"):
        raise UsageError(f"there is no --head {name!r}: give keep or new.")


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


def check_inputs(inputs: Inputs) -> None:
    """Raises on a value of the options that scan and cleanse share that no run can have."""
    for name, value, known in (
        ("kind", inputs.kind, ("auto", "classifier", "encoder")),
        ("precision", inputs.precision, ("auto", "fp32", "bf16", "fp16")),
    ):
        if value not in known:
            raise UsageError(f"there is no --{name} {value!r}: {closest(value, known)}")
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", inputs.device):
        raise UsageError(f"--device {inputs.device!r} is not known: give auto, cpu, cuda or cuda:N.")
