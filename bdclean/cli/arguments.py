"""What was typed, checked before any work and before torch is imported."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bdclean.errors import Refused, UsageError
from bdclean.files.text import closest
from bdclean.registry import DETECTORS, TRIGGERS, find, parse_spec

if TYPE_CHECKING:
    from bdclean.runs.options import Inputs


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
    from bdclean.runs.options import Inputs

    names = {field.name for field in dataclasses.fields(Inputs)} & set(options)
    values = {name: options[name] for name in names}
    return Inputs(**values, pictures=not options["no_pictures"], argv=tuple(sys.argv))
