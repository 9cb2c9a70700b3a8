"""Augmentation of a whole batch at once, each image on its own; any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def crop(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each image [c h w] shifted by up to `padding` pixels either way, black where nothing was.

    The same as torchvision's RandomCrop(h, padding) image by image; 0 returns a copy.
    """
    n, _, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, n), generator=generator, device=generator.device)
    down, right = shifts.to(images.device, non_blocking=True)
    padded = functional.pad(images, (padding, padding, padding, padding))
    # A view of all (2p+1)^2 windows costs nothing; indexing it copies only the one window of each image.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(n, device=images.device), :, down, right]


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image flipped left to right with probability one half."""
    coins = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    coins = coins.to(images.device, non_blocking=True)
    return torch.where(coins[:, None, None, None], images.flip(3), images)
