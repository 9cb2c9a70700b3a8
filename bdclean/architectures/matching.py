"""How a file's tensors compare with a network's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bdclean.architectures.arch import Arch, Shape
from bdclean.architectures.dialects import COUNTER

# A stranger's names are shown in terminals and records: cut and stripped of control characters.
LONGEST_NAME = 120


@dataclass(frozen=True)
class Match:
    """A network that has a file's tensors. `names`: file name -> the network's name; `unread`: the rest."""

    arch: Arch
    names: dict[str, str]
    unread: tuple[str, ...]


def differences(own: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """What keeps `own` from being `expected`, a phrase a tensor; batch counters may be absent."""
    found = []
    for name in sorted(own.keys() | expected.keys()):
        if name not in expected:
            found.append(f"{shown(name)} is not part of it")
        elif name not in own:
            if not name.endswith(COUNTER):
                found.append(f"{name} is missing")
        elif tuple(own[name]) != tuple(expected[name]):
            found.append(f"{shown(name)} is {list(own[name])}, expected {list(expected[name])}")
    return found


def shown(name: str) -> str:
    """A stranger's name, safe to print."""
    clean = "".join(c if c.isprintable() else "?" for c in name)
    return clean if len(clean) <= LONGEST_NAME else clean[: LONGEST_NAME - 3] + "..."
