"""Text of strangers: read whole, and made safe to show."""

from __future__ import annotations

import codecs
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Iterable

from bdclean.errors import Refused

LONGEST_NAME = 300
"""Characters of a stranger's name in a sentence."""
LARGEST_TEXT = 256_000_000
"""Bytes of records at once: a run with pictures has under 1 MB."""
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def plain(text: object) -> str:
    """Returns `text` on one line, every control, format or surrogate character written as an escape.

    Paths, class names and metadata come from strangers: unescaped they could move the cursor, set colours,
    swap the reading order or start a table row.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(_escaped(character) for character in line)


def shown(name: object) -> str:
    """Returns a stranger's name for a sentence: `plain`, and cut where it is very long."""
    text = str(name)
    return plain(text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 3] + "...")


def no_path(text: str) -> str | None:
    """Why a path that was given names nothing that can be opened, as the end of a sentence; None where it may.

    An empty one would be the working directory, meant by a script whose variable was never set.
    """
    if not text.strip():
        return "it is empty: is a variable unset?"
    if re.match(r"[a-z][a-z0-9+.-]+:/{1,2}[^/]", text, re.IGNORECASE):
        return f"{shown(text)} is a URL: bdclean fetches nothing, download it first."
    return None


def _escaped(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] != "C" and category not in ("Zl", "Zp"):
        return character
    return character.encode("unicode_escape").decode("ascii")


def read_text(path: str, expected: str = "a record of bdclean's") -> str:
    """Returns the text of a file or pipe, or of standard input for `-`, as far as records can be large."""
    try:
        raw = sys.stdin.buffer.read(LARGEST_TEXT + 1) if path == "-" else _bytes(path, expected)
        if len(raw) > LARGEST_TEXT:
            raise Refused(f"{path} has more than {LARGEST_TEXT // 10**6} MB: expected {expected}.")
        return decoded(raw)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise Refused(f"{path} is not text: expected {expected}.") from None


def decoded(raw: bytes, errors: str = "strict") -> str:
    """Returns the text of a file by its byte order mark, which is no part of it; UTF-8 where it has none.

    Windows' shells redirect as UTF-16 and its editors save with marks. Raises UnicodeDecodeError as bytes.decode does.
    """
    for mark, encoding in MARKS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding, errors)
    return raw.decode("utf-8", errors)


def _bytes(path: str, expected: str) -> bytes:
    # Without O_NONBLOCK, to open a pipe that nobody writes to would wait forever; a shell's <(...) has its writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        kind = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISFIFO(kind):
            raise Refused(f"{path} is neither a file nor a pipe: expected {expected}.")
        if hasattr(os, "set_blocking"):
            os.set_blocking(file.fileno(), True)
        return file.read(LARGEST_TEXT + 1)


def closest(name: str, known: Iterable[str]) -> str:
    """Returns the ending of an error sentence: the names nearest to `name`, or all of them."""
    from difflib import get_close_matches

    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(names)}." if names else "there is none yet."
