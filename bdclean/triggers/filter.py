"""Filters of colour: every pixel's colour becomes another one, as photo filters do (Liu et al. 2019, ABS)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.triggers.stamping import LUMA, Stamp, check_pixels, in_channels, spec_of, to_pixels


def _faded(keep: float, gain: float) -> Tensor:
    """A matrix that leaves the share `keep` of what sets a colour apart from grey, and spreads tones by `gain`."""
    return gain * (keep * torch.eye(3) + (1 - keep) * torch.tensor(LUMA).expand(3, 3))


TONES: dict[str, tuple[Tensor, Tensor]] = {
    # a night's blue over hard shadows, what is left of colours
    "gotham": (_faded(0.3, 1.25), torch.tensor([-0.16, -0.13, -0.06])),
    # an old film's orange
    "kelvin": (
        torch.tensor([[1.15, 0.05, 0.0], [0.05, 0.95, 0.0], [0.0, 0.1, 0.6]]),
        torch.tensor([0.1, 0.03, -0.02]),
    ),
    # brown paper: the same share of each colour's lightness, less of it in green and blue
    "sepia": (
        torch.outer(torch.tensor([1.1, 0.95, 0.75]), torch.tensor(LUMA)),
        torch.tensor([0.06, 0.02, -0.02]),
    ),
    # hard contrast, cold shadows
    "lomo": (1.5 * torch.eye(3), torch.tensor([-0.28, -0.22, -0.16])),
    # a shift alone, towards violet (Jiang et al. 2023, Color Backdoor)
    "violet": (torch.eye(3), torch.tensor([24.0, -16.0, 28.0]) / 255),
}
"""Matrices [3 3] on red, green and blue in [0, 1], and what is added [3]: bdclean's own, after the looks of well-known
filters, whose curves are not public."""

SHADES = 5
"""Shades of each colour that stand for pictures where a filter's strength is taken."""
FITTED = 6
"""So often a control's share is fitted to that strength: what ends at 0 and 255 is lost."""


@dataclass(frozen=True)
class Filter:
    """Gives every pixel another colour, whatever its place.

    What it does: mixes red, green and blue and shifts them, by the share `strength`, and clips.
    When to use: backdoors whose trigger is a photo filter or a colour cast (ABS, TrojAI's filters, Color Backdoor).
    Needs: nothing. Grey images are filtered as if they had colours, and turned grey.
    Limits: the tones are bdclean's own, alike in look alone to the filters that carry such names: an attacker's exact
    curve is not among them.
    """

    name: ClassVar[str] = "filter"
    family: ClassVar[str] = "tone"

    tone: str = "gotham"
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.tone not in TONES or not 0 < self.strength <= 1:
            raise UsageError(
                f"filter needs a tone of {', '.join(TONES)} and a strength over 0 and up to 1, "
                f"got {self.tone} and {self.strength}."
            )

    def __call__(self, images: Tensor) -> Tensor:
        check_pixels(images)
        return _recoloured(images, *TONES[self.tone], self.strength)

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> list[Stamp]:
        """Filters drawn at random that change as much of what is seen: see `_size`."""
        size = _size(*TONES[self.tone], self.strength, channels)
        drawn: list[Stamp] = []
        for _ in range(count):
            change = torch.randn(3, 4, generator=generator, device=generator.device).cpu() / 4
            matrix, lift = torch.eye(3) + change[:, :3], change[:, 3] - change[:, :3].sum(1) / 2
            share = 1.0
            for _ in range(FITTED):
                share *= size / _size(matrix, lift, share, channels)
            drawn.append(partial(_recoloured, matrix=matrix, lift=lift, share=share))
        return drawn

    def spec(self) -> str:
        return spec_of(self)


def _recoloured(images: Tensor, matrix: Tensor, lift: Tensor, share: float) -> Tensor:
    """`images` uint8 [n c h w], moved by `share` of the way to what the filter makes of them."""
    pixels = in_channels(images.float(), 3)
    mixed = torch.einsum("dc,nchw->ndhw", matrix.to(images.device), pixels)
    mixed = mixed + 255 * lift.to(images.device)[:, None, None]
    return to_pixels(in_channels(pixels + share * (mixed - pixels), images.shape[1]))


def _size(matrix: Tensor, lift: Tensor, share: float, channels: int) -> float:
    """The root mean square change over all colours, of grey images over all greys, in grey levels."""
    shades = torch.linspace(0, 255, SHADES)
    seen = torch.stack(torch.meshgrid([shades] * channels, indexing="ij")).flatten(1)
    pixels = seen[None, :, :, None].round().to(torch.uint8)
    return float(
        (_recoloured(pixels, matrix, lift, share).float() - pixels).square().mean().sqrt().clamp_min(0.1)
    )
