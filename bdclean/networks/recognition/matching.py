"""How a file's tensors compare with a network's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bdclean.files.text import shown
from bdclean.networks.arch import COUNTER, Arch, Shape

if TYPE_CHECKING:
    from torch import nn

NO_PART = " is not part of it"


@dataclass(frozen=True)
class Part:
    """Where a file's tensor lies in a network's that is made of several: at row `begin`, and there it has `shape`."""

    begin: int
    shape: Shape


@dataclass(frozen=True)
class Match:
    """A network that has a file's tensors. `names`: file name -> the network's name; `unread`: the rest.

    `parts`: the file names whose tensors are only some rows of the network's, or have another shape there.
    """

    arch: Arch
    names: dict[str, str]
    unread: tuple[str, ...]
    parts: dict[str, Part] = field(default_factory=dict)


def differences(own: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """What keeps `own` from being `expected`, a phrase a tensor; batch counters may be absent."""
    found = []
    for name in sorted(own.keys() | expected.keys()):
        if name not in expected:
            found.append(f"{shown(name)}{NO_PART}")
        elif name not in own:
            if not name.endswith(COUNTER):
                found.append(f"{name} is missing")
        elif tuple(own[name]) != tuple(expected[name]):
            found.append(f"{shown(name)} is {list(own[name])}, expected {list(expected[name])}")
    return found


def twins(network: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each name of a parameter that has several, all of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(same) for same in names.values() if len(same) > 1 for name in same}


def needed(expected: Mapping[str, Shape], own: Mapping[str, Shape], network: nn.Module) -> dict[str, Shape]:
    """What a file must hold of `expected`: of tied weights one is enough, as safetensors' save_model leaves CoaT's."""
    twin = twins(network)
    return {n: s for n, s in expected.items() if n in own or not any(t in own for t in twin.get(n, ()))}


def listed(differing: list[str]) -> str:
    """`3 differ: ...`, with the first three."""
    number = len(differing)
    return f"{number} differ{'s' if number == 1 else ''}: {'; '.join(differing[:3])}" + (
        "; ..." if number > 3 else ""
    )
