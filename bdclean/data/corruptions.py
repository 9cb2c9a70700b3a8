"""Random harmless corruptions, by family: counterfeits of what triggers are made of.

Every function takes float images in [0, 1], [n c h w] with c 3 (RGB) or 1 (grey), and a seeded generator on their
device, and returns new images of the same shape in [0, 1]; each image gets its own random draw, or all get the same one
where the generator is `Shared`. None changes what a person would call the picture.
Sizes and shifts are given for 32 pixels and scale with the input. The design is bdclean's own; strengths cover what the
attacks in the literature use (see each line) without copying any trigger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Shared:
    """In place of a generator: one draw for all images, the same for any number of them, as a trigger is."""

    generator: Generator


Source = Generator | Shared
FILTER_WIDTH = 16
Corruption = Callable[[Tensor, Source], Tensor]


def drawn(make: Callable[..., Tensor], shape: Sequence[int], like: Tensor, source: Source) -> Tensor:
    """Random values of `shape`, whose first dimension is that of the images; `make(shape, generator, device)`."""
    if isinstance(source, Shared):
        one = make((1, *shape[1:]), generator=source.generator, device=like.device)
        return one.expand(tuple(shape))
    return make(tuple(shape), generator=source, device=like.device)


def uniform(shape: Sequence[int], low: float, high: float, like: Tensor, source: Source) -> Tensor:
    return drawn(torch.rand, shape, like, source) * (high - low) + low


def integers(shape: Sequence[int], low: int, high: int, like: Tensor, source: Source) -> Tensor:
    """Integers in [low, high)."""
    return drawn(partial(torch.randint, low, high), shape, like, source)


def rectangles(
    n: int, height: int, width: int, like: Tensor, source: Source, low: float = 1, high: float = 10
) -> Tensor:
    """Masks bool [n 1 h w], one rectangle each, sides `low` to `high` of 32 pixels; half are at a border's rim."""

    def span(length: int) -> tuple[Tensor, Tensor]:
        unit = length / 32
        side = (uniform((n,), low, high + 1, like, source).floor() * unit).round().clamp(1, length)
        start = (uniform((n,), 0, 1, like, source) * (length - side + 1)).floor()
        rim = (uniform((n,), 0, 4, like, source).floor() * unit).minimum(length - side)
        at_rim = torch.where(uniform((n,), 0, 1, like, source) < 0.5, rim, length - side - rim)
        return side, torch.stack([start, at_rim])

    tall, tops = span(height)
    wide, lefts = span(width)
    # at a border: one coordinate at its rim; in a corner: both
    kind = integers((n,), 0, 6, like, source)
    top = torch.where((kind == 1) | (kind == 3), tops[1], tops[0])
    left = torch.where((kind == 2) | (kind == 3), lefts[1], lefts[0])
    rows = torch.arange(height, device=like.device).view(1, 1, height, 1)
    columns = torch.arange(width, device=like.device).view(1, 1, 1, width)
    box = lambda t: t.view(n, 1, 1, 1)  # noqa: E731
    return (
        (rows >= box(top)) & (rows < box(top + tall)) & (columns >= box(left)) & (columns < box(left + wide))
    )


def textures(images: Tensor, source: Source) -> Tensor:
    """Content for patches, [n c h w]: a colour, noise, coarse or binary noise, black, white, other images."""
    n, c, h, w = images.shape
    colour = uniform((n, c, 1, 1), 0, 1, images, source).expand(n, c, h, w)
    noise = uniform((n, c, h, w), 0, 1, images, source)
    coarse = low_resolution((n, c, h, w), images, source)
    binary = (noise > 0.5).float()
    grey_binary = binary[:, :1].expand(n, c, h, w)
    two = torch.where(grey_binary > 0.5, colour, 1 - colour)
    extreme = (uniform((n, 1, 1, 1), 0, 1, images, source) > 0.5).float().expand(n, c, h, w)
    others = images[:1].expand_as(images) if isinstance(source, Shared) else images.roll(1, 0)
    choices = torch.stack([colour, noise, coarse, binary, grey_binary, two, extreme, others])
    return choices[integers((n,), 0, len(choices), images, source), torch.arange(n, device=images.device)]


def low_resolution(shape: Sequence[int], like: Tensor, source: Source) -> Tensor:
    """Colour noise in [0, 1] drawn at a quarter or an eighth of the resolution and enlarged smoothly."""
    n, c, h, w = shape
    side = 4 if float(uniform((1,), 0, 1, like, source)) < 0.5 else 8
    small = uniform((n, c, max(2, h * side // 32), max(2, w * side // 32)), 0, 1, like, source)
    return F.interpolate(small, size=(h, w), mode="bicubic", align_corners=False).clamp(0, 1)


def patch(images: Tensor, source: Source) -> Tensor:
    """One to three rectangles of 1 to 10 pixels of 32, random in texture and opacity (BadNets, TrojanNN)."""
    n, _, h, w = images.shape
    out, count = images, integers((n, 1, 1, 1), 1, 4, images, source)
    opacity = torch.where(
        uniform((n, 1, 1, 1), 0, 1, images, source) < 0.7,
        1.0,
        uniform((n, 1, 1, 1), 0.3, 1, images, source),
    )
    for index in range(3):
        mask = rectangles(n, h, w, images, source) & (count > index)
        out = torch.where(mask, out + opacity * (textures(images, source) - out), out)
    return out


def blend(images: Tensor, source: Source) -> Tensor:
    """Another image, or noise, coarse noise or binary noise over the whole, at 0.05 to 0.35 (Blended)."""
    alpha = uniform((len(images), 1, 1, 1), 0.05, 0.35, images, source)
    return images + alpha * (textures(images, source) - images)


def wave(images: Tensor, source: Source) -> Tensor:
    """A sinusoid of up to 40 grey levels, 1 to 12 periods, any angle and phase, sometimes coloured (SIG)."""
    n, c, h, w = images.shape
    amplitude = uniform((n, 1, 1, 1), 5 / 255, 40 / 255, images, source)
    frequency = uniform((n, 1, 1, 1), 1, 12, images, source)
    angle = uniform((n, 1, 1, 1), 0, math.pi, images, source)
    square = torch.where(uniform((n, 1, 1, 1), 0, 1, images, source) < 0.5, 0.0, 1.0)
    angle = torch.where(
        square > 0, angle, (angle / (math.pi / 2)).round() * (math.pi / 2)
    )  # half of them along an axis
    tint = torch.where(
        uniform((n, 1, 1, 1), 0, 1, images, source) < 0.7,
        1.0,
        uniform((n, c, 1, 1), -1, 1, images, source),
    )
    rows = torch.linspace(0, 1, h, device=images.device).view(1, 1, h, 1)
    columns = torch.linspace(0, 1, w, device=images.device).view(1, 1, 1, w)
    phase = uniform((n, 1, 1, 1), 0, 2 * math.pi, images, source)
    along = torch.cos(angle) * columns + torch.sin(angle) * rows
    return (images + amplitude * tint * torch.sin(2 * math.pi * frequency * along + phase)).clamp(0, 1)


def low(images: Tensor, source: Source) -> Tensor:
    """Smooth colour noise added at up to 0.25 (low-frequency triggers)."""
    strength = uniform((len(images), 1, 1, 1), 0.05, 0.25, images, source)
    return (images + strength * (2 * low_resolution(images.shape, images, source) - 1)).clamp(0, 1)


def noise(images: Tensor, source: Source) -> Tensor:
    """Gaussian or uniform pixel noise of standard deviation up to 0.1 (additive patterns, sample-specific triggers)."""
    n = len(images)
    strength = uniform((n, 1, 1, 1), 0.01, 0.1, images, source)
    normal = drawn(torch.randn, images.shape, images, source)
    shared = uniform((n, 1, 1, 1), 0, 1, images, source) < 0.5
    return (images + strength * torch.where(shared, normal, normal.sign())).clamp(0, 1)


def identity_grid(images: Tensor) -> Tensor:
    n, _, h, w = images.shape
    theta = torch.eye(2, 3, device=images.device).expand(n, 2, 3)
    return F.affine_grid(theta, [n, 1, h, w], align_corners=False)


def displacement(n: int, knots: int, height: int, width: int, like: Tensor, source: Source) -> Tensor:
    """A smooth random field [n h w 2] with mean absolute value 1."""
    small = uniform((n, 2, knots, knots), -1, 1, like, source)
    small = small / small.abs().mean(dim=(1, 2, 3), keepdim=True)
    return F.interpolate(small, size=(height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def warp(images: Tensor, source: Source) -> Tensor:
    """An elastic warp of 0.3 to 1.2 pixels of 32 on 3 to 6 knots, or a small shift, turn and zoom (WaNet)."""
    n, _, h, w = images.shape
    knots = int(integers((1,), 3, 7, images, source))
    pixels = uniform((n, 1, 1, 1), 0.3, 1.2, images, source) * 2 / 32
    elastic = identity_grid(images) + pixels * displacement(n, knots, h, w, images, source)
    turn = uniform((n,), -0.15, 0.15, images, source)
    zoom = uniform((n,), 0.9, 1.1, images, source)
    shift = uniform((n, 2), -0.1, 0.1, images, source)
    theta = torch.stack(
        [
            zoom * turn.cos(),
            -zoom * turn.sin(),
            shift[:, 0],
            zoom * turn.sin(),
            zoom * turn.cos(),
            shift[:, 1],
        ],
        1,
    ).view(n, 2, 3)
    affine = F.affine_grid(theta, [n, 1, h, w], align_corners=False)
    grid = torch.where(uniform((n, 1, 1, 1), 0, 1, images, source) < 0.75, elastic, affine)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False).clamp(0, 1)


def tone(images: Tensor, source: Source) -> Tensor:
    """Brightness, contrast, gamma and colour balance within about a fifth (filters used as triggers)."""
    n, c, _, _ = images.shape
    gamma = uniform((n, 1, 1, 1), -0.4, 0.4, images, source).exp()
    gain = uniform((n, c, 1, 1), 0.85, 1.15, images, source)
    lift = uniform((n, 1, 1, 1), -0.08, 0.08, images, source)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    contrast = uniform((n, 1, 1, 1), 0.75, 1.25, images, source)
    return ((images.clamp(0, 1) ** gamma * gain - mean) * contrast + mean + lift).clamp(0, 1)


def quantise(images: Tensor, source: Source) -> Tensor:
    """Two to five bits a channel, half of them with random dithering (BppAttack)."""
    n = len(images)
    levels = 2.0 ** integers((n, 1, 1, 1), 2, 6, images, source) - 1
    dither = uniform(images.shape, -0.5, 0.5, images, source)
    dither = dither * (uniform((n, 1, 1, 1), 0, 1, images, source) < 0.5)
    return ((images * levels + dither).round() / levels).clamp(0, 1)


def blur(images: Tensor, source: Source) -> Tensor:
    """A small Gaussian blur, or sharpening, of random strength."""
    n, c, _, _ = images.shape
    sigma = uniform((n, 1), 0.3, 1.0, images, source)
    offsets = torch.arange(-2, 3, device=images.device).view(1, 5)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = weights / weights.sum(1, keepdim=True)
    kernel = (weights.view(n, 5, 1) * weights.view(n, 1, 5)).repeat_interleave(c, 0).view(n * c, 1, 5, 5)
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate").reshape(
        1, n * c, images.shape[2] + 4, images.shape[3] + 4
    )
    smooth = F.conv2d(padded, kernel, groups=n * c).view_as(images)
    sharpen = uniform((n, 1, 1, 1), 0, 1, images, source) < 0.3
    return torch.where(sharpen, images + (images - smooth), smooth).clamp(0, 1)


def filtered(images: Tensor, source: Source) -> Tensor:
    """Colours shifted by up to 64 grey levels as a random network of two layers sees fit (filters that are learnt).

    Of no family: an encoder's student may be shown it, a classifier's is not.
    """
    n, c, h, w = images.shape
    weights = drawn(torch.randn, (n, FILTER_WIDTH, c, 3, 3), images, source) * (4 / math.sqrt(9 * c))
    biases = drawn(torch.randn, (n, FILTER_WIDTH), images, source) / 2
    padded = F.pad(images - 0.5, (1, 1, 1, 1), mode="replicate").reshape(1, n * c, h + 2, w + 2)
    seen = F.relu(F.conv2d(padded, weights.flatten(0, 1), biases.flatten(), groups=n)).view(
        n, FILTER_WIDTH, -1
    )
    shift = drawn(torch.randn, (n, c, FILTER_WIDTH), images, source) / math.sqrt(FILTER_WIDTH) @ seen
    shift = shift + drawn(torch.randn, (n, c, 1), images, source) / 2
    shift = shift / shift.abs().mean((1, 2), keepdim=True).clamp_min(1e-3)
    bent = torch.tanh(uniform((n, 1, 1), 0, 1.5, images, source) * shift).view_as(images)
    return (images + uniform((n, 1, 1, 1), 0, 64 / 255, images, source) * bent).clamp(0, 1)


OF_FAMILY: dict[str, Corruption] = {
    "patch": patch,
    "blend": blend,
    "wave": wave,
    "low": low,
    "noise": noise,
    "warp": warp,
    "tone": tone,
    "quantise": quantise,
    "blur": blur,
}


def corrupt(images: Tensor, families: Sequence[str], source: Source) -> Tensor:
    """Each image under one of `families`, drawn at random; returns new images [n c h w] in [0, 1]."""
    which = integers((len(images),), 0, len(families), images, source)
    out = images.clone()
    for index, name in enumerate(families):
        chosen = (which == index).nonzero().squeeze(1)
        if len(chosen):
            out[chosen] = OF_FAMILY[name](images[chosen], source)
    return out
