"""How many blocks a file's names count up."""

from __future__ import annotations

import re
from collections.abc import Iterable


def numbered(names: Iterable[str], pattern: str, start: int = 0) -> int:
    """How many numbers `pattern`'s group takes where names begin so; 0 unless they run from `start` without gaps."""
    match = re.compile(pattern).match
    found = {int(m.group(1)) for m in map(match, names) if m}
    return len(found) if found == set(range(start, start + len(found))) else 0
