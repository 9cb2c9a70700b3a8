"""JSON from strangers: refused before it can cost more memory or time than its size allows.

Python's own reader takes more than JSON (NaN, numbers of any size, names given twice, halves of surrogate pairs), and
makes 60 bytes and more of every value, so that 10 MB of `[],[],` would take half a gigabyte.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from bdclean.files.text import decoded

DEEPEST = 64  # levels: far more than any file here needs, far fewer than Python's stack holds
MOST_VALUES = 1_000_000  # values in one document; Python's take 60 to 100 bytes each
LARGEST = 2**63 - 1  # of whole numbers: what other readers of such files can hold

HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
LARGE_OR_NEGATIVE = re.compile(r"[0-9]{19}|-0")


class NotJson(ValueError):
    """Why a text is not JSON that can be used; the message is a phrase such as `a name occurs twice`."""


def parse(raw: bytes | str, most: int = MOST_VALUES, halves: bool = False) -> Any:
    """The value that `raw` says; raises NotJson. `most`: values (items, names and brackets) that it may hold.

    `halves` allows halves of surrogate pairs, which is how Python writes file names that are not UTF-8.
    """
    try:
        text = raw if isinstance(raw, str) else decoded(raw)
    except UnicodeDecodeError:
        raise NotJson("it is not JSON") from None
    # Counted in the text, also inside of quotes: an upper bound, before anything is made of it.
    if sum(text.count(sign) for sign in ",[{") > most:
        raise NotJson(f"it holds more than {most:,} values")
    try:
        found = json.loads(
            text,
            object_pairs_hook=_once,
            parse_int=_whole if LARGE_OR_NEGATIVE.search(text) else None,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except NotJson:
        raise
    except (ValueError, RecursionError):
        raise NotJson("it is not JSON") from None
    if not halves and HALF_PAIR.search(text) and _half_pair(found):
        raise NotJson("a text holds half of a surrogate pair")
    return found


def shallow(value: Any, deepest: int = DEEPEST) -> bool:
    """Whether a parsed value is nested at most `deepest` deep, so that printing or copying it cannot fail."""
    level = [value]
    for _ in range(deepest):
        level = [
            item
            for value in level
            if isinstance(value, (dict, list))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return True
    return False


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise NotJson("a name occurs twice")
    return table


def _whole(text: str) -> int | float:
    if text == "-0":
        return -0.0  # as other readers do
    if len(text) > 20 or not -LARGEST <= int(text) <= LARGEST:
        raise NotJson("a whole number is beyond 63 bits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise NotJson("a number is too large")
    return number


def _no_constant(text: str) -> Any:
    raise NotJson(f"{text} is no number in JSON")


def _half_pair(value: Any) -> bool:
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += found.keys()
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
        elif isinstance(found, str):
            try:
                found.encode("utf-8")
            except UnicodeEncodeError:
                return True
    return False
