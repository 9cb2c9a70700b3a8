"""Text for people: numbers with their interval and n, and strings of strangers made harmless."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bdclean.files.text import plain
from bdclean.record.gate import SCORES

if TYPE_CHECKING:
    from bdclean.record.run import Measure, Rate


NOTHING = "-"  # was not measured: never 0
# Of a network that was given a new head.
PROBED_BEFORE = (
    "before: a linear probe on the suspect's frozen features, after: the written classifier's own answers"
)


def markdown(text: object) -> str:
    """Returns `plain` text with what Markdown or HTML would read as markup escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$@])", r"\\\1", plain(text)).replace("://", ":\\//")


def percent(value: float | None, digits: int = 1) -> str:
    """Returns a share as a number of percent, without the sign."""
    return NOTHING if value is None else f"{100 * value:.{digits}f}"


def rate(found: Rate | Measure | None) -> str:
    """Returns a share in percent with its interval and n, such as `97.3 (95.1-98.6, n 500)`."""
    if found is None or found.value is None:
        return NOTHING
    if found.low is None or found.high is None:
        return f"{percent(found.value)} (n {found.n})"
    joint = " to " if found.low < 0 else "-"
    return f"{percent(found.value)} ({percent(found.low)}{joint}{percent(found.high)}, n {found.n})"


def measure(found: Measure | None) -> str:
    """Returns a measure: a share as `rate` does, a score as a plain number."""
    if found is None or found.value is None:
        return NOTHING
    if found.name in SCORES:
        return f"{found.value:.3f} (n {found.n})"
    return rate(found)


def signed(found: Measure | None) -> str:
    """Returns a measure as `measure` does, a share with its sign: `97.3 % (95.1-98.6, n 500)`."""
    shown = measure(found)
    if found is None or found.value is None or found.name in SCORES:
        return shown
    value, _, more = shown.partition(" ")
    return f"{value} % {more}"


def duration(seconds: float | None) -> str:
    """Returns a time such as `8.2 s`, `3 min 05 s` or `2 h 10 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds} s" if isinstance(seconds, int) else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def label(index: object, names: Sequence[str] | None, *, numbered: bool = True) -> str:
    """Returns a class for people: its name where it is known, with its number behind, else its number."""
    if index is None:
        return NOTHING
    if index == "next":
        return "the next class"
    if isinstance(index, int) and names and 0 <= index < len(names):
        return f"{names[index]} ({index})" if numbered else names[index]
    return f"class {index}"


def quoted(word: str) -> str:
    """Returns a word as a shell reads it back: with $'...' where it holds what cannot be shown."""
    if plain(word) == word:
        return shlex.quote(word)
    shown = "".join(
        character.replace("\\", "\\\\").replace("'", "\\'")
        if plain(character) == character
        else _bytes(character)
        for character in word
    )
    return f"$'{shown}'"


def _bytes(character: str) -> str:
    byte_of_a_name = "\udc80" <= character <= "\udcff"  # as Python reads file names that are no UTF-8
    raw = character.encode("utf-8", "surrogateescape" if byte_of_a_name else "replace")
    return "".join(f"\\x{byte:02x}" for byte in raw)
