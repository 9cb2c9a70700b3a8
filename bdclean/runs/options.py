"""What scan and cleanse are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Inputs:
    """The options that scan and cleanse share, as typed."""

    data: Path | None = None
    test: Path | None = None
    labeled: Path | None = None
    classes: Path | None = None
    arch: str | None = None
    kind: str = "auto"
    preprocess: str = "auto"
    reference: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    batch_size: int | None = None
    limit: int = 2000
    seed: int = 0
    strict: bool = False
    allow_pickle: bool = False
    pictures: bool = True
    sequela: tuple[str, ...] = ()
    members: Path | None = None
    non_members: Path | None = None
    argv: tuple[str, ...] = ()


SEQUELA = ("membership", "reinjection", "retuning", "reactivation", "path")
"""What may be asked of a network after a repair."""


CSV = Literal["must", "may", "not"]
