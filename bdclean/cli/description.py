"""What the source text of a registered class says of it, for `bdclean ls`: nothing is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdclean.errors import UsageError
from bdclean.registry import Entry, find

if TYPE_CHECKING:
    import ast


# --- what `bdclean ls` shows --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a registered dataclass, as its source text states it."""

    name: str
    type: str
    default: str | None
    note: str


@dataclasses.dataclass(frozen=True)
class Description:
    """A registered class as its source text states it: docstring, ClassVars and fields."""

    docstring: str
    constants: dict[str, Any]
    settings: tuple[Setting, ...]


def describe(table: Mapping[str, Entry], name: str, encoder: bool = False) -> Description:
    """Returns what the source text of the class called `name` says. Nothing is imported, so no torch.

    `encoder`: of a recipe that has two classes, that for encoders.
    """
    import ast
    import importlib.util

    entry = find(table, name)
    path = entry.encoder if encoder or not entry.path else entry.path
    module, _, attribute = path.partition(":")
    package, _, _ = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"the package of {name!r}, {package}, is not installed.")
    file = Path(spec.submodule_search_locations[0], *module.split(".")[1:]).with_suffix(".py")
    if not file.is_file():
        raise UsageError(f"{name!r} is not part of this installation.")
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return _describe_class(node, lines)
    raise UsageError(f"{name!r} is not part of this installation.")


def _describe_class(node: ast.ClassDef, lines: list[str]) -> Description:
    import ast

    constants: dict[str, Any] = {}
    settings: list[Setting] = []
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        kind = ast.unparse(item.annotation)
        if kind.startswith(("ClassVar", "typing.ClassVar")):
            try:
                constants[item.target.id] = ast.literal_eval(item.value) if item.value is not None else None
            except ValueError:
                constants[item.target.id] = ast.unparse(item.value) if item.value is not None else None
            continue
        # Offsets of the syntax tree count bytes; what follows the field on its line is its comment.
        after = lines[(item.end_lineno or item.lineno) - 1].encode()[item.end_col_offset or 0 :].decode()
        _, _, note = after.partition("#")
        default = None if item.value is None else ast.unparse(item.value)
        settings.append(Setting(item.target.id, kind, default, note.strip()))
    return Description(ast.get_docstring(node) or "", constants, tuple(settings))
