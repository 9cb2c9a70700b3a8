"""The record's JSON Schema, for `bdclean ls schema`."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Union

from bdclean.record.run import OUTCOMES, SCHEMA, VERDICTS, RunRecord


def schema() -> dict[str, Any]:
    """Returns the record's JSON Schema (draft 2020-12), derived from its dataclasses."""
    definitions: dict[str, Any] = {}
    top = _of(RunRecord, definitions)
    body = definitions.pop(top["$ref"].rsplit("/", 1)[1])
    del body["properties"]["extra"]
    body["properties"] = {"schema": {"const": SCHEMA}, **body["properties"]}
    body["properties"]["verdict"] = {"enum": list(VERDICTS)}
    body["properties"]["outcome"] = {"enum": list(OUTCOMES)}
    body["required"] = ["schema", *body["required"]]
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, "$id": SCHEMA, **body, "$defs": definitions}


def _of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(argument, definitions) for argument in arguments]}
    if origin is list:
        return {"type": "array", "items": _of(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1], definitions)}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}
            hints = typing.get_type_hints(hint)
            needed = [
                f.name
                for f in dataclasses.fields(hint)
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            ]
            definitions[hint.__name__] = {
                "type": "object",
                "description": (hint.__doc__ or "").split("\n")[0],
                "properties": {name: _of(kind, definitions) for name, kind in hints.items()},
                "required": needed,
            }
        return {"$ref": f"#/$defs/{hint.__name__}"}
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    return {"type": names[hint]}
