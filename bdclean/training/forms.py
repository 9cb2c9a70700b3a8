"""Forms of change fitted to a network: masks, what is added to a picture, stripes, warps, and filters of colour."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.data.corruptions import identity_grid

WINDOWS, FEW_WINDOWS, WHOLE = 3, 2, 3
"""Masks start in so many windows along an axis, half the picture wide, in two where there are more than MANY classes,
and so many cover the whole picture, for triggers that are spread over it."""


MANY = 48


SIDE = 8
"""The side of what is enlarged to something smooth."""


KNOTS = 8
"""Points along an axis between which a warp is smooth: WaNet has 4 to 8."""


SHADES = 5
"""Shades of each channel: all colours of them stand for those of pictures."""


ADDED = {"pattern": "a pattern", "smooth": "something smooth"}
"""Kinds of what is added to a picture, in words."""


@dataclass(frozen=True)
class Form:
    """A kind of change with parameters [k ...], one row a class, and what steers its fit."""

    name: str
    family: str
    """The family of `corruptions` that it belongs to."""
    shape: tuple[int, ...]
    """Of one row of parameters."""
    start: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    """Parameters [k s ...] that s starts of each of k classes begin with, and the kind of each start, int64 [s]."""
    stamp: Callable[[Tensor, Tensor], Tensor]
    """Parameters [k ...] and pixels [n c h w] in [0, 1] to changed pixels [k n c h w] in [0, 1]."""
    sizes: Callable[[Tensor], Tensor]
    """Parameters [k ...] to sizes [k]."""
    picture: Callable[[Tensor], Tensor]
    """One row of parameters to a picture, float [c h w] in [0, 1]."""
    said: str
    """A size in words."""
    steps: float
    """How many it needs, as a share of a mask's."""
    rate: float
    last_rate: float
    """Adam's learning rate in the first and the last step."""
    push: float
    """A sign step, when it is refitted."""
    reach: float
    """Parameters beyond it are brought back before that."""
    weight: float
    """The first weight on the size."""
    goal: float
    least: float
    """The success rate under which a change is never unusually small."""
    small: float
    """The share of the median size under which a change is unusually small."""
    together: int | None = None
    """How many classes go on after the first round; where it is not said, inversion.TOGETHER."""
    parts: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    """Of masks: parameters [k ...] to opacities [k 1 h w] and patterns [k c h w], in [0, 1]."""


SMALL = 0.3
"""Of masks and of what is added.

Over the three forms of seven networks the smallest of a class without a trigger was 0.45; the triggers of ten classes
(blends of noise and of a picture, stripes, smooth, checker, white, quantised) were at 0.28 or less in one form at
least.
"""


SMALL_WARP = 0.7
"""Of warps: two triggers' (WaNet, 98 and 71 %) were at 0.36 and 0.63. Of 14 networks without one there was none that
sends most images in eleven, in the others the smallest was at 0.77 to 1.03."""


SMALL_FILTER = 0.45
"""Of filters of colour: three triggers were at 0.22 to 0.37. Of six networks without one, three of road signs, whose
colours mean most, the smallest were at 0.52 to 0.77; of 40 small ones 37 were over the limit, three of the six of
road signs at 0.35 to 0.39. The limit is not lower, as what is missed stays in the network; what a class that is named
for nothing costs was not measured there."""


def blended(pixels: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
    """`pixels` with `patterns` laid over them, as opaque as `masks` say, all in [0, 1]."""
    return (1 - masks) * pixels + masks * patterns


def mask(height: int, width: int, channels: int = 3) -> Form:
    """A soft mask and a pattern as logits [k 1+c h w]; its size is the mask's L1 norm, in pixels."""

    def halves(parameters: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.sigmoid(parameters)
        return both[:, :1], both[:, 1:]

    def stamp(parameters: Tensor, pixels: Tensor) -> Tensor:
        masks, patterns = halves(parameters)
        return blended(pixels, masks[:, None], patterns[:, None])

    def start(classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Masks of about 0.73 in a window of half the sides and almost nothing beside it, or of about 0.5 everywhere;
        patterns that are far from grey."""
        along = WINDOWS if classes <= MANY else FEW_WINDOWS
        rows = _noise((classes, along**2 + WHOLE, 1 + channels, height, width), generator)
        rows[:, :, 1:] *= 3
        tall, wide = max(1, height // 2), max(1, width // 2)
        for k in range(along**2):
            top, left = (
                round(at * (whole - part) / (along - 1))
                for at, whole, part in ((k // along, height, tall), (k % along, width, wide))
            )
            rows[:, k, 0] -= 5
            rows[:, k, 0, top : top + tall, left : left + wide] += 6
        return rows, torch.tensor([0] * along**2 + [1] * WHOLE)

    return Form(
        "mask", "patch", (1 + channels, height, width), start, stamp,
        sizes=lambda parameters: halves(parameters)[0].sum(dim=(1, 2, 3)),
        picture=lambda row: stamp(row[None], row.new_full((1, channels, height, width), 0.5))[0, 0],
        said="a mask of {:.1f} pixels",
        steps=1.0, rate=0.3, last_rate=0.2, push=0.2, reach=6.9,
        weight=1e-2 * 1024 / (height * width),  # ten times Neural Cleanse's first weight: there are fewer steps
        goal=0.95, least=0.8, small=SMALL, parts=halves,
    )  # fmt: skip


def added(height: int, width: int, kind: str, channels: int = 3) -> Form:
    """Something added to every picture; its size is its root mean square, in grey levels of 255.

    Kinds: `pattern` [k c h w]; `smooth` [k c SIDE SIDE], enlarged. The fewer parameters, the more a class without a
    trigger needs, and the clearer a trigger of that kind stands out. (A row and a column repeated, for stripes, did
    not tell: 0.42 of the median for the stripes' class, and for one without a trigger.)
    """
    shapes = {"pattern": (channels, height, width), "smooth": (channels, SIDE, SIDE)}

    def field(parameters: Tensor) -> Tensor:
        if kind == "smooth":
            return F.interpolate(parameters, size=(height, width), mode="bicubic", align_corners=False)
        return parameters

    def picture(row: Tensor) -> Tensor:
        one = field(row[None])[0]
        return 0.5 + 0.5 * one / one.abs().max().clamp_min(1e-6)

    def start(classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return 0.035 * _noise((classes, 2, *shapes[kind]), generator), torch.zeros(2, dtype=torch.int64)

    return Form(
        kind, {"pattern": "noise", "smooth": "low"}[kind], shapes[kind], start,
        stamp=lambda parameters, pixels: (pixels + field(parameters)[:, None]).clamp(0, 1),
        # the floor keeps the root's gradient finite where nothing is added
        sizes=lambda parameters: 255 * field(parameters).pow(2).mean(dim=(1, 2, 3)).clamp_min(1e-12).sqrt(),
        picture=picture,
        said=f"{ADDED[kind]} of {{:.1f}} grey levels added to the picture",
        steps=0.6, rate=0.02, last_rate=0.002, push=0.006, reach=1.0, weight=0.02,
        goal=0.85, least=0.6, small=SMALL,
    )  # fmt: skip


def warped(height: int, width: int, channels: int = 3) -> Form:
    """A smooth warp, displacements of KNOTS x KNOTS points [k 2 KNOTS KNOTS] in pixels of 32; its size is their root
    mean square over the picture."""

    def field(parameters: Tensor) -> Tensor:
        return F.interpolate(parameters, size=(height, width), mode="bicubic", align_corners=True)

    def stamp(parameters: Tensor, pixels: Tensor) -> Tensor:
        k, n = len(parameters), len(pixels)
        moved = identity_grid(pixels[:1]) + field(parameters * 2 / 32).permute(0, 2, 3, 1)
        seen = F.grid_sample(
            pixels.repeat(k, 1, 1, 1), moved.repeat_interleave(n, 0), padding_mode="reflection", align_corners=False
        )  # fmt: skip
        return seen.view(k, *pixels.shape).clamp(0, 1)

    def picture(row: Tensor) -> Tensor:
        """Displacements to the right in red, down in green."""
        one = field(row[None])[0]
        one = 0.5 + 0.5 * one / one.abs().max().clamp_min(1e-6)
        return one.mean(0, keepdim=True) if channels == 1 else torch.cat([one, torch.full_like(one[:1], 0.5)])

    def start(classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return 0.1 * _noise((classes, 2, 2, KNOTS, KNOTS), generator), torch.zeros(2, dtype=torch.int64)

    return Form(
        "warp", "warp", (2, KNOTS, KNOTS), start, stamp,
        sizes=lambda parameters: field(parameters).pow(2).mean(dim=(1, 2, 3)).clamp_min(1e-12).sqrt(),
        picture=picture,
        said="a warp of {:.2f} pixels of 32",
        steps=0.6, rate=0.2, last_rate=0.02, push=0.05, reach=4.0, weight=0.05,
        goal=0.85, least=0.85, small=SMALL_WARP,
    )  # fmt: skip


def recoloured(height: int, width: int, channels: int = 3) -> Form:
    """A filter of colour, the same for every pixel: each channel is given some of every channel, a constant, and a
    bend of its own tones, [k c c+2]; its size is the root mean square over all colours, in grey levels of 255.
    """
    shades = torch.linspace(0, 1, SHADES)
    colours = torch.stack(torch.meshgrid(*[shades] * channels, indexing="ij")).flatten(1)[None]  # [1 c m]

    def change(parameters: Tensor, pixels: Tensor) -> Tensor:
        """What is added to pixels [n c m]: [k n c m]."""
        mixed = torch.einsum("kdc,ncm->kndm", parameters[:, :, :channels], pixels)
        lift, bend = (parameters[:, None, :, channels + i, None] for i in (0, 1))
        return mixed + lift + bend * 4 * (pixels * (1 - pixels))[None]

    def stamp(parameters: Tensor, pixels: Tensor) -> Tensor:
        flat = pixels.flatten(2)
        return (flat + change(parameters, flat)).clamp(0, 1).view(len(parameters), *pixels.shape)

    def sizes(parameters: Tensor) -> Tensor:
        added = change(parameters, colours.to(parameters.device))
        return 255 * added.pow(2).mean(dim=(1, 2, 3)).clamp_min(1e-12).sqrt()

    def picture(row: Tensor) -> Tensor:
        """All tones of grey from left to right, above a rainbow where there are colours, under the filter."""
        across = torch.linspace(0, 1, width, device=row.device)
        grey = across.expand(channels, height, width)
        if channels == 1:
            return stamp(row[None], grey[None])[0, 0]
        hues = torch.stack(
            [(6 * across - 3).abs() - 1, 2 - (6 * across - 2).abs(), 2 - (6 * across - 4).abs()]
        )
        below = torch.arange(height, device=row.device)[None, :, None] >= height // 2
        return stamp(row[None], torch.where(below, hues.clamp(0, 1)[:, None], grey)[None])[0, 0]

    def start(classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return 0.05 * _noise((classes, 2, channels, channels + 2), generator), torch.zeros(
            2, dtype=torch.int64
        )

    return Form(
        "filter", "tone", (channels, channels + 2), start, stamp, sizes, picture,
        said="a filter of colour of {:.1f} grey levels",
        steps=0.6, rate=0.05, last_rate=0.005, push=0.01, reach=1.0, weight=0.02,
        goal=0.85, least=0.7, small=SMALL_FILTER,
    )  # fmt: skip


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in [-1, 1]."""
    return torch.rand(shape, generator=generator, device=generator.device) * 2 - 1


STRIPES = 20 / 255


PERIODS = range(1, 13)


def striped(height: int, width: int, channels: int = 3) -> tuple[Form, Tensor, list[str]]:
    """Sinusoids of 20 grey levels along one axis, [m c h w], as parameters of their form, and each in words."""
    fields, words = [], []
    for periods in PERIODS:
        for phase in range(4):
            for axis, length in (("width", width), ("height", height)):
                wave = torch.sin(2 * torch.pi * (periods * torch.linspace(0, 1, length) + phase / 4))
                lines = wave[None, None, :] if axis == "width" else wave[None, :, None]
                fields.append(STRIPES * lines.expand(channels, height, width))
                words.append(f"{periods} periods along the {axis}")
    form = dataclasses.replace(added(height, width, "pattern", channels), name="stripes", family="wave")
    return form, torch.stack(fields), words
