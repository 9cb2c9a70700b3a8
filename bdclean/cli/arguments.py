"""What was typed, checked before any work and before torch is imported."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from bdclean import ranks
from bdclean.cli.console import warn
from bdclean.cli.description import describe
from bdclean.errors import Refused, UsageError
from bdclean.files.text import closest, decoded, no_path, shown
from bdclean.registry import DETECTORS, RECIPES, TRIGGERS, find, parse_spec
from bdclean.runs.options import SEQUELA, Inputs

RECOMMENDED = "inoculate"
"""The recipe that is named first where several have a setting."""


def check_triggers(specs: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the SPECs, each of a known trigger."""
    for spec in specs or ():
        check_given("trigger", spec)
        find(TRIGGERS, parse_spec(spec)[0])
    return tuple(specs or ())


def check_recipe(name: str, settings: Mapping[str, str]) -> None:
    """Raises on a recipe that is not there, and on settings for one that has none: others have them."""
    find(RECIPES, name)
    if not settings or _settings(name):
        return
    key, value = next(iter(settings.items()))
    having = [each for each in RECIPES if key in _settings(each)]
    if not having:
        raise UsageError(
            f"{name} has no settings of its own, and no recipe has {key!r}: see bdclean ls recipe NAME."
        )
    raise UsageError(
        f"{name} has no settings of its own: name the recipe that they are for, as in --recipe "
        f"{having[0] if RECOMMENDED not in having else RECOMMENDED} --set {key}={value} "
        f"({', '.join(having)} have {key!r})."
    )


def _settings(name: str) -> set[str]:
    """What may be set of a recipe, for classifiers or for encoders."""
    entry = RECIPES[name]
    sides = [encoder for encoder, path in ((False, entry.path), (True, entry.encoder)) if path]
    return {setting.name for side in sides for setting in describe(RECIPES, name, side).settings}


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


def check_sequela(inputs: Inputs, *, of_two: bool) -> None:
    """Raises UsageError on a part of `--sequela` that there is not, and on images of members without it or missing.

    `of_two`: there are two networks, the suspect and its output.
    """
    for name in inputs.sequela:
        if name not in SEQUELA:
            raise UsageError(f"there is no --sequela {name!r}: {closest(name, SEQUELA)}")
    if "path" in inputs.sequela and not of_two:
        raise UsageError("--sequela path leads from a suspect to its output: bdclean cleanse measures it.")
    given = [path for path in (inputs.members, inputs.non_members) if path is not None]
    if "membership" in inputs.sequela and len(given) < 2:
        raise UsageError("--sequela membership needs --members PATH and --non-members PATH.")
    if given and "membership" not in inputs.sequela:
        raise UsageError("--members and --non-members are for --sequela membership.")


def expand_models(models: Sequence[str]) -> list[str]:
    """Returns the paths, those of standard input in the place of `-`; one that is given again is left out, and said.

    Raises UsageError where there is none, and on one that names nothing.
    """
    paths: list[str] = []
    for model in models:
        if model == "-" and ranks.own().count > 1:
            raise UsageError(
                "several processes cannot share standard input: under torchrun, name the models."
            )
        paths += _listed(sys.stdin.buffer.read()) if model == "-" else [model]
    if not paths:
        raise UsageError("no model: standard input names none.")
    check_paths("MODEL", paths)
    for path, count in Counter(paths).items():
        if count > 1:
            warn(f"{shown(path)} is named {count} times and looked at once.")
    return list(dict.fromkeys(paths))


def _listed(raw: bytes) -> list[str]:
    """The paths of a list: one a line, or each before a null, as `find -print0` writes them.

    Spaces around a path, empty lines and comments (#) are left out, unless a file has just that name.
    """
    text = decoded(raw, "surrogateescape")
    if "\0" in text:
        return [path for path in text.split("\0") if path]
    paths = []
    for line in re.split(r"\r\n|\n|\r", text):
        if line.strip() and os.path.lexists(line):
            paths.append(line)
        elif line.strip() and not line.lstrip().startswith("#"):
            paths.append(line.strip())
    return paths


def check_paths(name: str, paths: Sequence[str]) -> None:
    """Raises UsageError on a path of the argument `name` that is empty or a URL."""
    for path in paths:
        if (why := no_path(path)) is not None:
            raise UsageError(f"{name} {path!r}: {why}")


def check_given(name: str, value: str) -> None:
    """Raises UsageError where an option was given nothing."""
    if not value.strip():
        raise UsageError(f"--{name} is empty: is a variable unset?")


def check_there(model: str, inputs: Inputs, triggers: Sequence[str]) -> None:
    """Refuses, before torch is imported, what is not there: the model, images, what is said about them, triggers.

    Images may be a part of an archive (ARCHIVE/PART) or shards (NAME-{000..123}.tar), which reading will find or not.
    """
    if not os.path.lexists(model):
        raise Refused(f"{shown(model)} does not exist.")
    for path in (inputs.data, inputs.test, inputs.labeled, inputs.members, inputs.non_members):
        if path is not None and not _leads_somewhere(path):
            raise Refused(
                f"{shown(path)} does not exist: give a folder of images, a .tar, .tar.gz, .npz or .parquet."
            )
    for name, path in (("classes", inputs.classes), ("reference", inputs.reference)):
        if path is not None and not os.path.lexists(path):
            raise Refused(f"--{name} {shown(path)} does not exist.")
    for spec in triggers:
        name, settings = parse_spec(spec)
        if name == "file" and not os.path.lexists(settings["path"]):
            raise Refused(
                f"trigger {shown(settings['path'])} is not a file: give a picture, .npz or .safetensors."
            )
    code = (inputs.arch or "").rpartition(":")[0]
    if code.endswith(".py") and not os.path.isfile(code):
        raise UsageError(f"--arch: {shown(code)} does not exist.")


def _leads_somewhere(path: Path) -> bool:
    """Whether `path` or a file on the way to it exists, or it stands for several."""
    return "{" in path.name or os.path.lexists(path) or any(map(os.path.isfile, path.parents))


def check_inputs(inputs: Inputs) -> None:
    """Raises on a value of the options that scan and cleanse share that no run can have."""
    for name, value, known in (
        ("kind", inputs.kind, ("auto", "classifier", "encoder")),
        ("precision", inputs.precision, ("auto", "fp32", "bf16", "fp16")),
    ):
        if value not in known:
            raise UsageError(f"there is no --{name} {value!r}: {closest(value, known)}")
    check_given("preprocess", inputs.preprocess)
    if inputs.arch is not None:
        check_given("arch", inputs.arch)
    if inputs.seed >= 2**63:
        raise UsageError(f"--seed {inputs.seed} is too large: give less than 2^63.")
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", inputs.device):
        raise UsageError(f"--device {inputs.device!r} is not known: give auto, cpu, cuda or cuda:N.")
    if inputs.device.startswith("cuda:") and ranks.own().count > 1:
        raise UsageError(
            f"--device {inputs.device} is one device, and torchrun gives each process its own: give cuda."
        )
