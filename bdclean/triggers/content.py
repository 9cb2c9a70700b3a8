"""What a trigger shows: patches, noise and pictures drawn from a seed, and surrogates for controls."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Cells of the 3 x 3 black and white patch that BCU and BackdoorBench ship (rows of the bottom-right corner).
CHECKER_3 = ((0, 0, 255), (0, 255, 0), (255, 0, 255))

COLOURS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
}


def checker(cells: int) -> np.ndarray:
    """Black and white cells [1 cells cells], white where a chess board counted from the bottom right is.

    With 3 cells the top-left one is black, too, as in the patch that the literature uses.
    """
    if cells == 3:
        grey = np.array(CHECKER_3, np.uint8)
    else:
        rows, columns = np.indices((cells, cells))
        grey = np.where((rows + columns) % 2 == 0, 255, 0).astype(np.uint8)
    return grey[None]


def random_colours(seed: int, cells: int, channels: int = 3) -> np.ndarray:
    """Uniform colours or grey levels, one a cell [channels cells cells]."""
    levels = np.random.default_rng(seed).integers(0, 256, (channels, cells, cells), dtype=np.int64)
    return levels.astype(np.uint8)


def enlarge(cells: np.ndarray, size: int) -> np.ndarray:
    """[c k k] cells -> [c size size] pixels, each cell a block; k need not divide size."""
    index = np.arange(size) * cells.shape[1] // size
    return cells[:, index][:, :, index]


def noise(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Uniform noise in every pixel and channel [channels h w]: the usual content of a blended attack."""
    return np.random.default_rng(seed).integers(0, 256, (channels, height, width)).astype(np.uint8)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A cartoon of soft colours and hard shapes [3 h w]: the same scene at any size.

    Stands for the pictures that blended attacks use (a cartoon cat and the like): large areas, few colours.
    """
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    corners = rng.uniform(0, 255, (2, 2, 3))
    weights = np.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x])
    scene = np.einsum("khw,kc->chw", weights, corners.reshape(4, 3))
    for _ in range(rng.integers(5, 9)):
        centre_y, centre_x = rng.uniform(0.1, 0.9, 2)
        radius_y, radius_x = rng.uniform(0.08, 0.35, 2)
        angle = rng.uniform(0, np.pi)
        colour = rng.uniform(0, 255, 3)
        along = (np.cos(angle) * (x - centre_x) + np.sin(angle) * (y - centre_y)) / radius_x
        across = (-np.sin(angle) * (x - centre_x) + np.cos(angle) * (y - centre_y)) / radius_y
        inside = along**2 + across**2 < 1 if rng.random() < 0.6 else np.maximum(abs(along), abs(across)) < 1
        scene = np.where(inside, colour[:, None, None], scene)
    return np.clip(np.round(scene), 0, 255).astype(np.uint8)


def surrogate(values: Tensor, generator: torch.Generator) -> Tensor:
    """Other content with the mean, energy and spectrum of `values` [c h w]: its Fourier phases at random.

    All channels turn by the same phases, which keeps how colours go together.
    """
    height, width = values.shape[-2:]
    white = torch.randn(height, width, generator=generator, device=generator.device).to(values.device)
    turn = torch.fft.rfft2(white)
    turn = turn / turn.abs().clamp_min(1e-12)
    turn[0, 0] = 1
    return torch.fft.irfft2(torch.fft.rfft2(values.float()) * turn, s=(height, width))
