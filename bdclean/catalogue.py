"""What `bdclean ls` and `bdclean doctor` print, as plain text."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bdclean.errors import UsageError
from bdclean.registry import DETECTORS, RECIPES, TABLES, TRIGGERS, closest, describe
from bdclean.report import text

# Kinds whose depth, width and class count are read off the shapes, beside the named ones.
KINDS = {
    "ResNet, ResNeXt": "any number of blocks and classes; torchvision's, and with a 3x3 stem for small images",
    "pre-activation ResNet, WideResNet": "any depth and width",
    "VGG": "any plan, with and without batch norm",
    "ViT": "any depth, width, patch and image size, torchvision's names",
    "Swin, Swin v2, ConvNeXt, MaxViT": "any depth and width, torchvision's names",
    "RegNet, DenseNet": "any depth and width, torchvision's names, DenseNet's old ones too",
    "ViT, ResNet, RegNet, ConvNeXt, Swin of Hugging Face": "transformers' names; ConvNeXt V2 with bdclean[timm]",
    "timm:NAME": "any classifier of timm, extra bdclean[timm]; a folder with timm's config.json needs no --arch",
    "FILE.py:NAME": "your own code, only when given with --arch; also package.module:NAME",
}
LISTS = ("recipes", "triggers", "detectors", "architectures", "schema")
SINGULAR = {noun: table for noun, table in TABLES.items() if noun in ("recipe", "trigger", "detector")}
PACKAGES = (
    "bdclean",
    "torch",
    "torchvision",
    "timm",
    "safetensors",
    "numpy",
    "scipy",
    "pillow",
    "typer",
    "rich",
)


def listing(what: str, name: str | None = None) -> str:
    """Returns a list of names with a line each, or with `name` one entry in full; raises UsageError on neither."""
    if what in SINGULAR:
        if name is None:
            raise UsageError(f"which {what}? write: bdclean ls {what} NAME, or bdclean ls {what}s.")
        return _entry(what, name)
    if name is not None:
        raise UsageError(
            f"{what} takes no name: to see one entry, write bdclean ls {what.rstrip('s')} {name}."
        )
    if what == "schema":
        from bdclean.report.schema import schema

        return json.dumps(schema(), indent=1) + "\n"
    if what == "architectures":
        return _architectures()
    if what not in LISTS:
        raise UsageError(f"nothing is listed as {what!r}: {closest(what, [*LISTS, *SINGULAR])}")
    table = {"recipes": RECIPES, "triggers": TRIGGERS, "detectors": DETECTORS}[what]
    if not table:
        return f"no {what} in this version; the recipe inoculate reports the triggers that it inverts as findings\n"
    return _columns((key, entry.line) for key, entry in table.items())


def _architectures() -> str:
    """Returns the named networks of the shipped fingerprint, a line each, then the kinds that are read off shapes."""
    from bdclean.architectures.fingerprint import table

    rows = [("NAME", "SOURCE", "PARAMETERS", "INPUT", "TENSORS")]
    for known in table():
        parameters = f"{known.parameters / 1e6:.2f} M"
        rows.append((known.name, known.source, parameters, str(known.input), str(known.tensors)))
    head = "Recognised by names and shapes, with any class count (parameters are without the head):\n\n"
    return f"{head}{_columns(rows)}\nRead off the shapes:\n\n{_columns(KINDS.items())}"


def _entry(what: str, name: str) -> str:
    found = describe(SINGULAR[what], name)
    entry = SINGULAR[what][name]
    lines = [f"{name}: {entry.line}", "", found.docstring, ""]
    facts = {key: value for key, value in found.constants.items() if key != "name"}
    if entry.families:
        facts["families"] = entry.families
    for key, value in facts.items():
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, (tuple, list)) else value
        shown = {True: "yes", False: "no"}[shown] if isinstance(shown, bool) else shown
        lines.append(f"{key.replace('_', ' ')}: {shown}")
    option = "--set KEY=VALUE" if what == "recipe" else f"{name}:KEY=VALUE,..."
    if found.settings:
        lines += ["", f"settings ({option}):"]
        rows = [
            (s.name, s.type, "needed" if s.default is None else s.default, s.note) for s in found.settings
        ]
        lines += [f"  {line}" for line in _columns(rows).splitlines()]
    return "\n".join(lines) + "\n"


def _columns(rows: Iterable[Iterable[str]]) -> str:
    cells = [[text.plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "".join(f"{line.rstrip()}\n" for line in lines)


# --- doctor -------------------------------------------------------------------------------------------------


def doctor() -> tuple[str, bool]:
    """Returns what a bug report needs about this machine, and whether bdclean can work on it."""
    rows = [("python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [(package, _version(package)) for package in PACKAGES]
    try:
        import torch
    except Exception as error:  # a broken installation is what this command is for
        return _columns([*rows, ("problem", f"torch cannot be imported: {error}")]), False
    rows += _torch(torch)
    import shutil

    free = shutil.disk_usage(Path.cwd()).free
    rows.append(("free disk here", f"{free / 2**30:.1f} GiB"))
    return _columns(rows), True


def versions() -> dict[str, str]:
    """Returns the versions that go into a record."""
    found = {package: _version(package) for package in ("bdclean", "torch", "torchvision", "numpy")}
    return {"python": platform.python_version(), **found}


def _version(package: str) -> str:
    from importlib import metadata  # slow to import, and lists do not need it

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package == "bdclean":
            from bdclean import __version__

            return __version__
        return "not installed"


def _torch(torch: Any) -> list[tuple[str, str]]:
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        memory = properties.total_memory / 2**30
        rows.append((f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB, {bf16}"))
    if not rows:
        rows.append(("cuda", "none"))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = _cpu_flags()
    native = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    rows.append(("cpu", f"{usable} usable cores, {torch.get_num_threads()} threads, {_capability(torch)}"))
    rows.append(("cpu bf16", ", ".join(native) if native else "emulated, slower than fp32"))
    return rows


def _capability(torch: Any) -> str:
    found = getattr(torch.backends.cpu, "get_cpu_capability", None)
    return str(found()) if found is not None else platform.machine()


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
