"""Settings as people type them -> the values of a dataclass's fields, by their types."""

from __future__ import annotations

import math
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union


def convert(text: str, hint: Any) -> Any:
    """Returns `text` as the type `hint`; tuples are written a/b/c. Raises ValueError saying what is expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(text, arguments, hint)
    if origin is Literal:
        for choice in arguments:
            if text == str(choice):
                return choice
        raise ValueError(f"expected {wording(hint)}")
    if origin is tuple or hint is tuple:
        return _convert_tuple(text, arguments, hint)
    if hint is bool:
        if text.lower() in ("true", "yes", "on", "1"):
            return True
        if text.lower() in ("false", "no", "off", "0"):
            return False
    elif hint is int:
        if re.fullmatch(r"[+-]?[0-9][0-9_]*", text):
            return int(text)
    elif hint is float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    elif hint in (str, Any):
        return text
    elif hint is Path:
        return Path(text)
    else:
        raise ValueError("this field cannot be set from text")
    raise ValueError(f"expected {wording(hint)}")


def _convert_union(text: str, arguments: tuple[Any, ...], hint: Any) -> Any:
    if type(None) in arguments and text.lower() in ("none", "null"):
        return None
    # A plain string takes everything, so it is asked last.
    for option in sorted((a for a in arguments if a is not type(None)), key=lambda a: a is str):
        try:
            return convert(text, option)
        except ValueError:
            continue
    raise ValueError(f"expected {wording(hint)}")


def _convert_tuple(text: str, arguments: tuple[Any, ...], hint: Any) -> tuple[Any, ...]:
    parts = text.split("/") if text else []
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(convert(part, arguments[0]) for part in parts)
    if arguments and len(parts) != len(arguments):
        raise ValueError(f"expected {wording(hint)}")
    return tuple(
        convert(part, argument)
        for part, argument in zip(parts, arguments or (str,) * len(parts), strict=True)
    )


def wording(hint: Any) -> str:
    """Returns a type in words a user knows."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else wording(a) for a in arguments)
    if origin is Literal:
        return " or ".join(str(choice) for choice in arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"{wording(arguments[0])}/..."
        return "/".join(wording(argument) for argument in arguments)
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
