"""JSON values to the record's types, and back."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from pathlib import Path
from typing import Any, Union

from bdclean.errors import Refused

LONGEST_SHOWN = 80  # characters of a value in an error sentence


# --- values, types and JSON ---------------------------------------------------------------------------------


def plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy or torch scalar
        return plain_value(value.item())
    raise TypeError(f"{type(value).__name__} has no place in a record")


def cut_short(value: Any) -> str:
    """A value of a stranger's file in an error sentence."""
    shown = repr(value)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def typed(value: Any, hint: Any, where: str) -> Any:
    """Returns JSON `value` as the type `hint`; raises Refused naming `where` if it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        check_numbers(value, where)
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        for option in options[:-1]:
            try:
                return typed(value, option, where)
            except Refused:
                continue
        return typed(value, options[-1], where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _typed_dataclass(value, hint, where)
    elif origin is list:
        if isinstance(value, list):
            return [typed(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return {key: typed(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
            return value
    elif isinstance(value, hint):
        return value
    raise Refused(f"{where} is {kind_of(value)}, expected {getattr(hint, '__name__', hint)}.")


@functools.cache
def _hints(hint: type) -> dict[str, Any]:
    return typing.get_type_hints(hint)


def check_numbers(value: Any, where: str) -> None:
    """Raises Refused on a number in `value` that reports could not lay out: NaN, infinite or beyond 1e300."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_numbers(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_numbers(item, f"{where}[{index}]")
    elif isinstance(value, (int, float)) and not abs(value) < 1e300:
        raise Refused(f"{where} is not a finite number below 1e300.")


def _typed_dataclass(value: dict[str, Any], hint: Any, where: str) -> Any:
    hints = _hints(hint)
    fields = {f.name: f for f in dataclasses.fields(hint)}
    for name, f in fields.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and name not in value:
            raise Refused(f"{where}.{name} is missing.")
    return hint(**{key: typed(value[key], hints[key], f"{where}.{key}") for key in fields if key in value})
