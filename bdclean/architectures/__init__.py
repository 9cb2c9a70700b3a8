"""Recognition of networks by construction, and their layers from shallow to deep.

What is named here is imported when asked for, so that listing names needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bdclean.architectures.arch import Arch, Stage
    from bdclean.architectures.matching import Match
    from bdclean.architectures.recognition import identify, recognise
    from bdclean.architectures.staging import describe

__all__ = ["Arch", "Match", "Stage", "describe", "identify", "recognise"]

PLACES = {
    "Arch": "arch",
    "Stage": "arch",
    "Match": "matching",
    "identify": "recognition",
    "recognise": "recognition",
    "describe": "staging",
}


def __getattr__(name: str) -> object:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{PLACES[name]}"), name)
