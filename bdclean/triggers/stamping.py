"""What every trigger shares: stamping arithmetic, places, and its SPEC. uint8 in, new uint8 out.

Images are [n c h w] with c of 3 (RGB) or 1 (grey).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bdclean.errors import Refused, UsageError

Stamp = Callable[[Tensor], Tensor]

LUMA = (0.299, 0.587, 0.114)
"""What red, green and blue give to grey (ITU-R BT.601), as in Pillow's mode L."""

PLACES = ("top-left", "top-right", "bottom-left", "bottom-right", "center", "corners")


class Trigger(Protocol):
    """A frozen dataclass whose fields are the settings."""

    name: ClassVar[str]

    @property
    def family(self) -> str:
        """What kind of change it is: 'patch', 'blend', 'wave', 'delta'."""

    def __call__(self, images: Tensor) -> Tensor:
        """New uint8 images with the trigger; the argument stays as it was, a repeated call gives the same."""

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> Sequence[Stamp]:
        """`count` stamps of the same mask and strength with other content, never the trigger itself.

        `channels`: of the images that they are for; what differs in colour alone is the trigger itself on grey ones.
        """

    def spec(self) -> str:
        """The SPEC that makes this trigger again."""


def check_pixels(images: Tensor) -> None:
    """Raises TypeError unless these are uint8 [n c h w], c 1 or 3: floats may be normalised already."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise TypeError(
            f"triggers stamp uint8 [n c h w] of 1 or 3 channels, got {images.dtype} {list(images.shape)}"
        )


def in_channels(planes: Tensor, channels: int) -> Tensor:
    """Grey levels [... 1|3 h w] in `channels`: colours weighted by LUMA, grey the same in all three."""
    if planes.shape[-3] == channels:
        return planes
    if channels == 3:
        return planes.expand(*planes.shape[:-3], 3, *planes.shape[-2:])
    return torch.einsum("...chw,c->...hw", planes, planes.new_tensor(LUMA)).unsqueeze(-3)


def to_pixels(values: Tensor) -> Tensor:
    """Float grey levels -> uint8, rounded and clamped."""
    return values.round_().clamp_(0, 255).to(torch.uint8)


def overlay(images: Tensor, mask: Tensor | float, pattern: Tensor) -> Tensor:
    """mask * pattern + (1 - mask) * images; mask in [0, 1] (0 keeps the image), pattern [c h w] in grey levels."""
    check_pixels(images)
    if isinstance(mask, Tensor):
        mask = mask.to(images.device, torch.float32)
    pattern = pattern.to(images.device, torch.float32)
    return to_pixels(mask * pattern + (1 - mask) * images.float())


def add(images: Tensor, delta: Tensor) -> Tensor:
    """images + delta, delta in grey levels [c h w] or [h w]."""
    check_pixels(images)
    return to_pixels(images.float() + delta.to(images.device, torch.float32))


def check_position(position: str) -> None:
    """Raises UsageError unless `position` is a named place or X/Y in pixels."""
    if position in PLACES:
        return
    numbers = position.split("/")
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise UsageError(
            f"position {position!r} is unknown: give one of {', '.join(PLACES)}, or X/Y in pixels."
        )


def places(
    position: str, margin: int, patch: tuple[int, int], size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Top-left (row, column) of each stamp of `patch` (height, width) on images of `size`.

    `margin` pixels stay free between a stamp and the border (nothing to do with `center` and X/Y).
    """
    free = (size[0] - patch[0], size[1] - patch[1])
    if position in PLACES:
        first, last = (margin, margin), (free[0] - margin, free[1] - margin)
        named = {
            "top-left": [(first[0], first[1])],
            "top-right": [(first[0], last[1])],
            "bottom-left": [(last[0], first[1])],
            "bottom-right": [(last[0], last[1])],
            "center": [(free[0] // 2, free[1] // 2)],
        }
        named["corners"] = [named[corner][0] for corner in PLACES[:4]]
        found = named[position]
    else:
        column, row = position.split("/")
        found = [(int(row), int(column))]
    if any(not (0 <= row <= free[0] and 0 <= column <= free[1]) for row, column in found):
        raise Refused(
            f"a patch of {patch[0]} x {patch[1]} at {position} with margin {margin} does not fit "
            f"into images of {size[0]} x {size[1]}."
        )
    return found


def spec_of(trigger: Any, bare: str = "") -> str:
    """NAME:KEY=VALUE,... with the settings that differ from their defaults.

    The field `bare` goes first and without its key.
    """
    parts = [str(getattr(trigger, bare))] if bare else []
    for field in dataclasses.fields(trigger):
        value = getattr(trigger, field.name)
        if field.name != bare and value != field.default:
            text = repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
            parts.append(f"{field.name}={text}")
    return f"{trigger.name}:{','.join(parts)}" if parts else str(trigger.name)


def draw_seed(generator: torch.Generator) -> int:
    """A seed for one control."""
    return int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
