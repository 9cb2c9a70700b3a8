"""What `bdclean ls` and `bdclean doctor` print, as plain text."""

from __future__ import annotations

import json
from collections.abc import Iterable

from bdclean.cli.description import describe
from bdclean.cli.measured import measured
from bdclean.errors import UsageError
from bdclean.files import text
from bdclean.files.text import closest
from bdclean.registry import DETECTORS, RECIPES, TABLES, TRIGGERS, find

# Kinds whose depth, width and class count are read off the shapes, beside the named ones.
KINDS = {
    "ResNet, ResNeXt": "any blocks, widths and classes; torchvision's, and with a 3x3 stem for small images",
    "pre-activation ResNet, WideResNet": "any depth and width",
    "VGG": "any plan, with and without batch norm",
    "ViT": "any depth, width, patch and image size, torchvision's names",
    "Swin, Swin v2, ConvNeXt, MaxViT": "any depth and width, torchvision's names",
    "RegNet, DenseNet": "any depth and width, torchvision's names, DenseNet's old ones too",
    "MobileNet, MNASNet, ShuffleNet, EfficientNet": "any width, torchvision's names",
    "ViT, ResNet, RegNet, ConvNeXt, Swin of Hugging Face": "transformers' names; ConvNeXt V2 with bdclean[timm]",
    "timm:NAME": "any classifier of timm, extra bdclean[timm]; a folder with timm's config.json needs no --arch",
    "FILE.py:NAME": "your own code, only when given with --arch; also package.module:NAME",
}
LISTS = {
    "recipes": "ways to take a backdoor out; ls recipe NAME shows one in full",
    "triggers": "what is stamped on images to look for one; ls trigger NAME",
    "detectors": "ways to look for one without a trigger; ls detector NAME",
    "architectures": "networks that are recognised",
    "schema": "of records, as JSON Schema",
}
SINGULAR = {noun: table for noun, table in TABLES.items() if noun in ("recipe", "trigger", "detector")}


def lists() -> str:
    """Returns what there is to list, a line each."""
    return _columns((f"bdclean ls {what}", line) for what, line in LISTS.items())


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
        from bdclean.record.schema import schema

        return json.dumps(schema(), indent=1) + "\n"
    if what == "architectures":
        return _architectures()
    if what not in LISTS:
        raise UsageError(f"nothing is listed as {what!r}: {closest(what, [*LISTS, *SINGULAR])}")
    table = {"recipes": RECIPES, "triggers": TRIGGERS, "detectors": DETECTORS}[what]
    return _columns((key, entry.line) for key, entry in table.items())


def _architectures() -> str:
    """Returns the named networks of the shipped fingerprint, a line each, then the kinds that are read off shapes."""
    from bdclean.networks.families.known import table

    rows = [("NAME", "SOURCE", "PARAMETERS", "INPUT", "TENSORS")]
    for known in table():
        parameters = f"{known.parameters / 1e6:.2f} M"
        rows.append((known.name, known.source, parameters, str(known.input), str(known.tensors)))
    head = "Recognised by names and shapes, with any class count (parameters are without the head):\n\n"
    return f"{head}{_columns(rows)}\nRead off the shapes:\n\n{_columns(KINDS.items())}"


def _entry(what: str, name: str) -> str:
    entry = find(SINGULAR[what], name)
    said = f"{name}: {entry.line}\n\n{_described(what, name, entry.families)}"
    if entry.path and entry.encoder not in ("", entry.path):
        said += f"\nOf encoders:\n\n{_described(what, name, (), encoder=True)}"
    return said + (_measured(name) if what == "recipe" else "")


def _measured(recipe: str) -> str:
    """What benches measured of the recipe, a table each; nothing where none did."""
    said = ""
    for source, rows in measured(recipe):
        indented = "".join(f"  {line}\n" for line in _columns(rows).splitlines())
        said += f"\nmeasured, in percent (sample_models/tables/{source}):\n{indented}"
    return said


def _described(what: str, name: str, families: tuple[str, ...], encoder: bool = False) -> str:
    found = describe(SINGULAR[what], name, encoder)
    lines = [found.docstring, ""]
    facts = {key: value for key, value in found.constants.items() if key != "name"}
    if families:
        facts["families"] = families
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
