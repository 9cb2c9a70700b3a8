"""What a training script pickled beside its weights: named without running anything, and stood for by empty objects.

DINO's and MAE's files hold an argparse.Namespace, Lightning's omegaconf's tables, timm's and torchvision's own their
arguments. torch's unpickler builds nothing that it is not told; here it is told that each foreign name is an object
that takes whatever it is given and keeps nothing. Nothing foreign is imported or called.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from pickle import UnpicklingError  # noqa: TID251  (torch's reader raises it; nothing is unpickled)
from typing import IO, Any

from bdclean.networks.checkpoint.protocols import MAGIC, PICKLES_IN_LEGACY, data_of

__all__ = ["Stubs", "UnpicklingError", "foreign"]

# A file that names one of these means to run something, or is a whole network: refused as before, although nothing of
# it would be run.
REFUSED = re.compile(
    r"^(?:os|posix|nt|sys|subprocess|runpy|shutil|socket|importlib|ctypes|pty|code|codeop|pickle|_pickle|webbrowser|operator"
    r"|builtins|torch)(?:\.|$)"
)
PLAIN = re.compile(
    r"^(?:builtins\.(?:int|float|str|bool|bytes|list|tuple|dict|object|slice|range|frozenset|type)"
    r"|torch\.(?:optim|utils|distributed|distributions|torch_version)\..*)$"
)
# Tables that torch's unpickler lets nobody fill unless they are its own kinds.
TABLES = ("collections.defaultdict",)
MOST_NAMES = 1000


class Ignored:
    """Stands for an object of which nothing is read or built."""

    def __new__(cls, *_: object, **__: object) -> Ignored:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class IgnoredList(list):
    """Stands for a list of a kind of its own; what it holds is read."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __setstate__(self, _: object) -> None:
        pass


class IgnoredTable:
    """Stands for a table of a kind of its own (defaultdict, Lightning's AttributeDict); what it holds is read."""

    def __new__(cls, *_: object, **__: object) -> OrderedDict:  # type: ignore[misc]
        return OrderedDict()


def foreign(stream: IO[bytes]) -> list[str]:
    """Foreign classes and functions that a torch file of protocol 2 mentions; empty where it is damaged."""
    names: set[str] = set()
    try:
        if stream.read(4) != MAGIC:
            stream.seek(0)
            for _ in range(PICKLES_IN_LEGACY):
                names |= mentioned(stream)
        else:
            with zipfile.ZipFile(stream) as archive:
                inner = data_of(archive)
                if inner is not None:
                    with archive.open(inner) as member:
                        names |= mentioned(member)
    except (ValueError, OSError, KeyError, zipfile.BadZipFile, NotImplementedError, OverflowError):
        pass  # torch's own reader says what is wrong
    return sorted(n for n in names if PLAIN.match(n) or not REFUSED.match(n))[:MOST_NAMES]


def mentioned(stream: IO[bytes]) -> set[str]:
    """All global names of one pickle, read as text."""
    found = set()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL" and isinstance(argument, str):
            module, _, name = argument.partition(" ")
            # Python 2's modules, as torch's reader renames them.
            if (module, name) in NAME_MAPPING:
                module, name = NAME_MAPPING[(module, name)]
            found.add(f"{IMPORT_MAPPING.get(module, module)}.{name}")
    return found


class Stubs:
    """A class of its own for each foreign name, so that a refusal tells which one has to be a table or a list."""

    def __init__(self, names: list[str]) -> None:
        self.kinds = {n: self.made(k, IgnoredTable if n in TABLES else Ignored) for k, n in enumerate(names)}

    def made(self, number: int, kind: type) -> type:
        return type(f"ignored_{number}", (kind,), {})

    def allowed(self) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
        """What torch's unpickler is told."""
        return [(kind, name) for name, kind in self.kinds.items()]

    def corrected(self, said: str) -> bool:
        """Whether `said`, torch's refusal, was that one of them is filled like a table or a list, which it now is."""
        match = re.search(r"\bignored_(\d+)'", said)
        if match is None or int(match[1]) >= len(self.kinds):
            return False
        name = list(self.kinds)[int(match[1])]
        kind = IgnoredList if "append" in said else IgnoredTable
        if issubclass(self.kinds[name], kind):
            return False
        self.kinds[name] = self.made(int(match[1]), kind)
        return True
