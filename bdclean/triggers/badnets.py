"""BadNets: a small opaque patch (Gu, Dolan-Gavitt, Garg 2017, arXiv 1708.06733)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.triggers.content import COLOURS, checker, enlarge, random_colours
from bdclean.triggers.stamping import (
    Stamp,
    check_pixels,
    check_position,
    draw_seed,
    in_channels,
    places,
    spec_of,
    to_pixels,
)

PATTERNS = ("checker", "random", *COLOURS)
DISTINCT = 48.0  # mean grey levels by which a control's patch differs from the trigger's


@dataclass(frozen=True)
class BadNets:
    """Stamps a square patch at one place, or in all four corners.

    What it does: replaces `size` x `size` pixels (blends them with `alpha` under 1).
    When to use: the patch backdoor of most papers; `position=corners` is that of label-consistent attacks.
    Needs: nothing. `pattern` is a colour name, #rrggbb, `checker` (with 3 cells the patch that BCU ships)
    or `random` colours from `seed`; the last two have `cells` x `cells` cells (0: one a pixel). On grey images a
    colour is its grey level, and random colours are random grey levels.
    Limits: a patch moved by more than a pixel or two is another trigger to most networks: give the position.
    """

    name: ClassVar[str] = "badnets"
    family: ClassVar[str] = "patch"

    size: int = 3
    position: str = "bottom-right"
    pattern: str = "checker"
    margin: int = 0
    cells: int = 0
    alpha: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.margin < 0 or self.seed < 0 or not 0 <= self.cells <= self.size:
            raise UsageError(
                f"badnets needs size >= 1, margin >= 0, seed >= 0 and cells of 0 to size, "
                f"got {self.size}, {self.margin}, {self.seed} and {self.cells}."
            )
        if not 0 < self.alpha <= 1:
            raise UsageError(f"badnets needs alpha over 0 and up to 1, got {self.alpha}.")
        check_position(self.position)
        if self.pattern not in PATTERNS and _hex_colour(self.pattern) is None:
            raise UsageError(
                f"pattern {self.pattern!r} is unknown: give one of {', '.join(PATTERNS)}, or #rrggbb."
            )

    def patch(self, channels: int = 3) -> np.ndarray:
        """The patch, uint8 [channels size size]."""
        cells = self.cells or self.size
        if self.pattern == "random":
            return enlarge(random_colours(self.seed, cells, channels), self.size)
        if self.pattern == "checker":
            drawn = torch.from_numpy(enlarge(checker(cells), self.size))
        else:
            colour = COLOURS.get(self.pattern) or _hex_colour(self.pattern)
            drawn = torch.tensor(colour).view(3, 1, 1).expand(3, self.size, self.size)
        return to_pixels(in_channels(drawn.float(), channels).clone()).numpy()

    def __call__(self, images: Tensor) -> Tensor:
        check_pixels(images)
        stamped = images.clone()
        patch = torch.from_numpy(self.patch(images.shape[1])).to(images.device)
        corners = places(
            self.position, self.margin, (self.size, self.size), (images.shape[2], images.shape[3])
        )
        for row, column in corners:
            area = (..., slice(row, row + self.size), slice(column, column + self.size))
            if self.alpha == 1:
                stamped[area] = patch
            else:
                stamped[area] = to_pixels(
                    self.alpha * patch.float() + (1 - self.alpha) * images[area].float()
                )
        return stamped

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> list[Stamp]:
        """Patches of random colours at the same place, one colour and many in turn.

        The trigger is not mirrored or turned: copies like that were seen to fire on its own network.
        """
        own = self.patch(channels).astype(np.float32)
        drawn: list[Stamp] = []
        while len(drawn) < count:
            seed = draw_seed(generator)
            if len(drawn) % 2:
                other = replace(self, pattern=f"#{seed % 2**24:06x}", cells=0, seed=0)
            else:
                other = replace(self, pattern="random", cells=self.cells or min(self.size, 3), seed=seed)
            if abs(other.patch(channels) - own).mean() >= DISTINCT:
                drawn.append(other)
        return drawn

    def spec(self) -> str:
        return spec_of(self)


def _hex_colour(text: str) -> tuple[int, int, int] | None:
    if len(text) != 7 or text[0] != "#":
        return None
    try:
        red, green, blue = bytes.fromhex(text[1:])
    except ValueError:
        return None
    return red, green, blue
