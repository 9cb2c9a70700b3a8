"""Patches found by trial: small rectangles of few colours that do to images what a trigger does.

A mask that gradients fit is the least that a network answers to, which may be a part of a trigger or beside it. Place,
size and colours of a patch are little enough to be searched without gradients, on the network that has the backdoor, by
what it answers alone: the best of many draws are varied for a few rounds. bdclean's own; in kin an evolution strategy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bdclean.training.inversion import PIXELS, spread_out

Forward = Callable[[Tensor], Tensor]
"""Float images in [0, 1], [n c h w], to logits [n classes]."""

Worth = Callable[[Sequence["Patch"]], Tensor]
"""What patches are worth [patches], without what their area costs: the more, the better."""

CELLS = 32
"""Places and sides are counted in cells: so many along the image's shorter side."""
LONGEST = 8
"""The longest side of a patch, where nothing else is said."""
NEAR = 6
"""How far from what a mask covers a patch near it may lie."""
RIM = 3
"""How far from a border what is drawn at its rim may be."""
FIRST, ROUNDS, VARIED, PARENTS, FEW = 128, 10, 64, 16, 12
"""So many patches are drawn; in so many rounds so many are varied of the best PARENTS; all are judged on FEW images."""
AREA = 0.25
"""By how much more the largest patch must raise a class's probability than one of no size."""
COLOUR = 0.3
"""A mean colour that differs by as much in a channel is another one."""

Colour = tuple[float, ...]


@dataclass(frozen=True)
class Patch:
    """A rectangle of `tall` x `wide` cells, whose upper left one is at (`top`, `left`), and what they show."""

    top: int
    left: int
    tall: int
    wide: int
    colours: tuple[tuple[Colour, ...], ...]
    """As many rows and columns as the largest patch has, of which `tall` and `wide` show; channels in [0, 1]."""

    @property
    def size(self) -> float:
        """Its area as a share of the largest patch's."""
        return self.tall * self.wide / len(self.colours) ** 2

    def unlike(self, other: Patch) -> bool:
        """Whether it covers another place by half, or is of other colours."""
        across = min(self.top + self.tall, other.top + other.tall) - max(self.top, other.top)
        along = min(self.left + self.wide, other.left + other.wide) - max(self.left, other.left)
        if max(0, across) * max(0, along) < 0.5 * max(self.tall * self.wide, other.tall * other.wide):
            return True
        pairs = zip(self._colour(), other._colour(), strict=True)
        return max(abs(one - two) for one, two in pairs) > COLOUR

    def _colour(self) -> list[float]:
        """The mean of what shows, channel by channel."""
        shown = [colour for row in self.colours[: self.tall] for colour in row[: self.wide]]
        return [sum(channel) / len(shown) for channel in zip(*shown, strict=True)]

    def pack(self) -> Tensor:
        """All of it as float32 [5 + side side channels], for the resume state."""
        places = [self.top, self.left, self.tall, self.wide, len(self.colours)]
        return torch.cat([torch.tensor(places, dtype=torch.float32), torch.tensor(self.colours).flatten()])

    @staticmethod
    def unpack(packed: Tensor) -> Patch:
        """What `pack` made; its colours have a few bits less."""
        top, left, tall, wide, side = (int(value) for value in packed[:5])
        rows = packed[5:].view(side, side, -1).tolist()
        return Patch(top, left, tall, wide, tuple(tuple(map(tuple, row)) for row in rows))

    def stamp(self, pixels: Tensor) -> Tensor:
        """Copies of `pixels` [n c h w] in [0, 1] that carry it."""
        height, width = pixels.shape[2:]
        unit = _unit(height, width)
        tall, wide = min(height, self.tall * unit), min(width, self.wide * unit)
        # the last cell reaches the border, also where the unit does not divide the side
        top = height - tall if self.top + self.tall >= height // unit else self.top * unit
        left = width - wide if self.left + self.wide >= width // unit else self.left * unit
        shown = torch.tensor([row[: self.wide] for row in self.colours[: self.tall]], device=pixels.device)
        cells = shown.permute(2, 0, 1).repeat_interleave(unit, 1).repeat_interleave(unit, 2)
        out = pixels.clone()
        out[:, :, top : top + tall, left : left + wide] = cells[:, :tall, :wide]
        return out

    def on_grey(self, shape: tuple[int, ...]) -> Tensor:
        """A picture of it, float of `shape` (channels, height, width), in [0, 1]."""
        return self.stamp(torch.full((1, *shape), 0.5))[0]


@dataclass(frozen=True)
class FoundPatch:
    """A patch found by trial, as a recipe is told a trigger: see `known.Known`. For images of `shape` (c, h, w)."""

    patch: Patch
    shape: tuple[int, int, int]

    def __call__(self, images: Tensor) -> Tensor:
        """`images` uint8 [n c h w] that carry it."""
        return (255 * self.patch.stamp(images.float() / 255)).round().to(torch.uint8)

    def controls(
        self, count: int, generator: torch.Generator, channels: int = 3
    ) -> Sequence[Callable[[Tensor], Tensor]]:
        """Its kin: moved, grown or shrunk by a little, or in part or all of other colours."""
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
        drawn = Drawn.blank(*self.shape, seed, len(self.patch.colours))
        return [replace(self, patch=drawn.varied([self.patch])) for _ in range(count)]

    def spec(self) -> str:
        patch = self.patch
        return f"a patch of {patch.tall} x {patch.wide} cells at {patch.top}, {patch.left}"


def search(
    model: Forward,
    pixels: Tensor,
    drawn: Drawn,
    target: int,
    area: float = AREA,
    rounds: int = ROUNDS,
    most: int = 12,
) -> list[tuple[Patch, float]]:
    """At most `most` patches unlike each other, with the mean probability of `target` under each, best first.

    `pixels` [n c h w] in [0, 1] are of other classes. The largest patch must raise the probability by `area` more
    than one of no size. Where the search ends is chance, and kin of a trigger fire, too: of all that were
    tried those are told that are worth at least half of the best one.
    """
    few = spread_out(pixels, FEW)
    first = [drawn.near() if k % 2 else drawn.anywhere() for k in range(FIRST)]

    def worth(patches: Sequence[Patch]) -> Tensor:
        return answers(model, few, patches)[:, target]

    return scored(model, pixels, evolved(drawn, first, worth, area, rounds, most), target)


def evolved(
    drawn: Drawn, first: Sequence[Patch], worth: Worth, area: float, rounds: int, most: int,
    tell: Callable[[int], None] = lambda done: None,
) -> list[Patch]:  # fmt: skip
    """At most `most` patches unlike each other, of `first` and of what `drawn` makes of the best ones, best first.

    They are best by `worth`, less `area` for the largest patch; told are those worth at least half of the best one.
    `tell` hears of each of the `rounds`.
    """

    def judged(patches: Sequence[Patch]) -> dict[Patch, float]:
        values = worth(patches).tolist()
        return {patch: value - area * patch.size for patch, value in zip(patches, values, strict=True)}

    tried = judged(first)
    for done in range(rounds):
        tell(done)
        parents = _ranked(tried)[:PARENTS]
        tried |= judged([drawn.varied(parents) for _ in range(VARIED)])
    chosen: list[Patch] = []
    for patch in _ranked(tried):
        good = not chosen or tried[patch] >= 0.5 * tried[chosen[0]]
        if good and len(chosen) < most and all(patch.unlike(other) for other in chosen):
            chosen.append(patch)
    return chosen


def of_others(images: Tensor, classes: Tensor, target: int, most: int, device: torch.device) -> Tensor:
    """At most `most` of `images` uint8 [n c h w] whose `classes` int64 [n] are not `target`, as floats in [0, 1].

    From all over them: a folder is read class by class.
    """
    return spread_out(images[classes != target], most).to(device).float() / 255


def _ranked(tried: dict[Patch, float]) -> list[Patch]:
    return sorted(tried, key=lambda patch: -tried[patch])


def scored(
    model: Forward, pixels: Tensor, patches: Sequence[Patch], target: int
) -> list[tuple[Patch, float]]:
    """`patches` with the mean probability of `target` on `pixels` under each, best first."""
    sent = answers(model, pixels, patches)[:, target].tolist()
    return sorted(zip(patches, sent, strict=True), key=lambda each: -each[1])


def answers(model: Forward, pixels: Tensor, patches: Sequence[Patch]) -> Tensor:
    """The mean probability of each class on `pixels` [n c h w] under each of `patches`: [patches classes]."""
    return under_each(model, pixels, patches, lambda logits: logits.softmax(2).mean(1))


def under_each(
    model: Forward, pixels: Tensor, patches: Sequence[Patch], told: Callable[[Tensor], Tensor]
) -> Tensor:
    """What is `told` of the outputs of `model` on `pixels` [n c h w] under each of `patches`: [patches ...].

    `told` gets the outputs of some of the patches at a time, [k n d].
    """
    at_once = max(1, PIXELS // (len(pixels) * pixels[0, 0].numel()))
    parts: list[Tensor] = []
    with torch.no_grad():
        for first in range(0, len(patches), at_once):
            part = patches[first : first + at_once]
            outputs = model(torch.cat([patch.stamp(pixels) for patch in part])).float()
            parts.append(told(outputs.view(len(part), len(pixels), -1)))
    return torch.cat(parts)


class Drawn:
    """Draws patches in the colours that a mask's pattern has where it covers most, and in those of full channels.

    `mask` [h w] and `pattern` [c h w] are an inverted trigger's; `blank` ones are those of none. No side has more cells
    than `longest`.
    """

    @classmethod
    def blank(cls, channels: int, height: int, width: int, seed: int, longest: int = LONGEST) -> Drawn:
        colours = torch.rand((channels, height, width), generator=torch.Generator().manual_seed(seed))
        return cls(torch.ones(height, width), colours, seed, longest)

    def __init__(self, mask: Tensor, pattern: Tensor, seed: int, longest: int = LONGEST):
        self.draw, self.longest = random.Random(seed), longest
        height, width = mask.shape
        self.unit = _unit(height, width)
        self.rows, self.columns = max(1, height // self.unit), max(1, width // self.unit)
        generator = torch.Generator().manual_seed(seed)
        cells = torch.multinomial(mask.flatten().float().cpu(), 256, True, generator=generator)
        self.cells = [divmod(cell, width) for cell in cells.tolist()]
        self.colours = [tuple(colour) for colour in pattern.flatten(1).T[cells.to(pattern.device)].tolist()]

    def near(self) -> Patch:
        """One about what the mask covers, most often a square."""
        row, column = self.draw.choice(self.cells)
        tall = self.draw.randint(1, self.longest)
        wide = tall if self.draw.random() < 0.7 else self.draw.randint(1, self.longest)
        top = row // self.unit - tall // 2 + self.draw.randint(-NEAR, NEAR)
        left = column // self.unit - wide // 2 + self.draw.randint(-NEAR, NEAR)
        return self._within(Patch(top, left, tall, wide, self.coloured()))

    def anywhere(self) -> Patch:
        """A square, every other one at a border's rim or in a corner, where triggers often are."""
        side, kind = self.draw.randint(1, self.longest), self.draw.randrange(6)
        top, left = self.draw.randrange(self.rows), self.draw.randrange(self.columns)
        if kind in (1, 3):
            top = self._rim(self.rows - side)
        if kind in (2, 3):
            left = self._rim(self.columns - side)
        return self._within(Patch(top, left, side, side, self.coloured()))

    def _rim(self, last: int) -> int:
        """A place within RIM of the first or the `last` one."""
        off = self.draw.randint(0, RIM)
        return off if self.draw.random() < 0.5 else last - off

    def one(self, patches: Sequence[Patch]) -> Patch:
        return self.draw.choice(patches)

    def varied(self, patches: Sequence[Patch]) -> Patch:
        """One of `patches` moved, grown or shrunk by a little, or in part or all of other colours."""
        draw, patch = self.draw, self.one(patches)
        kind = draw.randrange(4)
        if kind == 0:
            patch = replace(patch, top=patch.top + draw.randint(-2, 2), left=patch.left + draw.randint(-2, 2))
        elif kind == 1:
            taller, wider = draw.randint(-1, 1), draw.randint(-1, 1)
            patch = replace(
                patch, tall=patch.tall + taller, wide=patch.wide + wider,
                top=patch.top - draw.randrange(2) * taller, left=patch.left - draw.randrange(2) * wider,
            )  # fmt: skip
        elif kind == 2:
            patch = replace(patch, colours=self.coloured())
        else:
            cells = [list(row) for row in patch.colours]
            cells[draw.randrange(patch.tall)][draw.randrange(patch.wide)] = self._colour()
            patch = replace(patch, colours=tuple(map(tuple, cells)))
        return self._within(patch)

    def _within(self, patch: Patch) -> Patch:
        tall = max(1, min(self.longest, patch.tall, self.rows))
        wide = max(1, min(self.longest, patch.wide, self.columns))
        top, left = max(0, min(self.rows - tall, patch.top)), max(0, min(self.columns - wide, patch.left))
        return replace(patch, top=top, left=left, tall=tall, wide=wide)

    def _colour(self) -> Colour:
        if self.draw.random() < 0.5:
            return self.draw.choice(self.colours)
        return tuple(float(self.draw.randrange(2)) for _ in self.colours[0])

    def coloured(self) -> tuple[tuple[Colour, ...], ...]:
        """Cells of one colour, of two in a checker, or each of its own."""
        kind, one, two = self.draw.random(), self._colour(), self._colour()
        if kind > 0.75:
            return tuple(tuple(self._colour() for _ in range(self.longest)) for _ in range(self.longest))
        other = two if kind > 0.5 else one
        return tuple(
            tuple(other if (y + x) % 2 else one for x in range(self.longest)) for y in range(self.longest)
        )


def _unit(height: int, width: int) -> int:
    return max(1, round(min(height, width) / CELLS))
