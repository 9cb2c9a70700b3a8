"""WaNet: a faint smooth warp of the whole image (Nguyen and Tran 2021, arXiv 2102.10369)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bdclean.errors import Refused, UsageError
from bdclean.files.text import shown
from bdclean.triggers.content import surrogate
from bdclean.triggers.reading import read_arrays
from bdclean.triggers.stamping import Stamp, check_pixels, draw_seed, spec_of, to_pixels


@dataclass(frozen=True)
class WaNet:
    """Warps each image by one smooth field of shifts.

    What it does: moves pixels by a field on `k` x `k` points, drawn from `seed` and enlarged to the image; its mean
    absolute shift along each axis is about 0.4 of `strength` pixels, whatever the image's size.
    When to use: warping backdoors; the authors' are k 4, strength 0.5 on 32 pixels (k 8, strength 1 in others' runs).
    Needs: nothing, or `grid`, an .npz or .safetensors file with the field that an attacker drew: `noise`, [1 h w 2] at
    the image's size, right and down, of mean absolute value 1 or so.
    Limits: another field is another trigger. At strength 0.5 pixels of a flat region do not change.
    """

    name: ClassVar[str] = "wanet"
    family: ClassVar[str] = "warp"

    k: int = 4
    strength: float = 0.5
    seed: int = 0
    grid: str = ""

    def __post_init__(self) -> None:
        if not 2 <= self.k <= 64 or not 0 < self.strength <= 32 or not 0 <= self.seed < 2**63:
            raise UsageError(
                f"wanet needs k of 2 to 64, a strength over 0 and up to 32 and a seed of 0 up to 2^63, "
                f"got {self.k}, {self.strength} and {self.seed}."
            )
        if self.grid:
            _ = self.given  # a file that cannot be read is refused now, not in the middle of a scan

    @cached_property
    def given(self) -> Tensor:
        """The field of the file `grid`, float [h w 2]; raises Refused."""
        arrays = read_arrays(self.grid, ("noise",))
        if "noise" not in arrays:
            raise Refused(
                f"trigger {self.grid} has no noise: give the field that the attack drew under that name."
            )
        # whatever byte order and width it was written in
        field = torch.from_numpy(np.ascontiguousarray(arrays["noise"]).astype(np.float32))
        if field.ndim == 4 and len(field) == 1:
            field = field[0]
        if field.ndim != 3 or field.shape[-1] != 2:
            raise Refused(f"trigger {self.grid}: noise is {shown(list(field.shape))}, expected [1 h w 2].")
        if not bool(field.isfinite().all()) or not 0 < float(field.abs().max()) <= 64:
            raise Refused(f"trigger {self.grid}: noise must be finite, within -64 to 64, and not zero.")
        if bool((field == field[0, 0]).all()):
            raise Refused(
                f"trigger {self.grid}: noise is the same everywhere, which moves pictures and warps nothing."
            )
        return field

    def field(self, height: int, width: int) -> Tensor:
        """Shifts to the right and down [h w 2], in units of `strength`; Refused where `grid` has another size."""
        if not self.grid:
            return _drawn(self.seed, self.k, height, width)
        if self.given.shape[:2] != (height, width):
            raise Refused(
                f"trigger {self.grid} is for images of {self.given.shape[0]} x {self.given.shape[1]}, "
                f"these are {height} x {width}."
            )
        return self.given

    def __call__(self, images: Tensor) -> Tensor:
        check_pixels(images)
        return warp(images, self.field(images.shape[2], images.shape[3]), self.strength)

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> list[Stamp]:
        """Fields of other seeds, as strong and as smooth; for a file its surrogates, of the same spectrum."""
        seeds = [draw_seed(generator) for _ in range(count)]
        if self.grid:
            own, turned = self.given.permute(2, 0, 1), [torch.Generator().manual_seed(seed) for seed in seeds]
            fields = [surrogate(own, source).permute(1, 2, 0) for source in turned]
            return [partial(warp, field=field, strength=self.strength) for field in fields]
        # Stepping past the own seed keeps the trigger out of its controls.
        return [replace(self, seed=seed + 1 if seed == self.seed else seed) for seed in seeds]

    def spec(self) -> str:
        return spec_of(self)


def warp(images: Tensor, field: Tensor, strength: float) -> Tensor:
    """uint8 `images` [n c h w] seen through `field`, [h w 2] or one for each image [n h w 2]; the rim is held.

    `strength` / side is the shift in coordinates from -1 to 1 at a field of 1, as in the authors' code, whose images
    are square; of others each axis has its own.
    """
    n, _, height, width = images.shape
    down, right = (torch.linspace(-1, 1, length, device=images.device) for length in (height, width))
    still = torch.stack(torch.meshgrid(right, down, indexing="xy"), -1)
    shifts = still.new_tensor([strength / width, strength / height]) * field.to(images.device)
    seen = (still + shifts).clamp(-1, 1).expand(n, -1, -1, -1)
    return to_pixels(functional.grid_sample(images.float(), seen, mode="bilinear", align_corners=True))


@lru_cache(maxsize=64)
def _drawn(seed: int, k: int, height: int, width: int) -> Tensor:
    """Uniform shifts on `k` x `k` points, of mean absolute value 1, enlarged by bicubic interpolation: [h w 2]."""
    points = 2 * torch.rand(1, 2, k, k, generator=torch.Generator().manual_seed(seed)) - 1
    points = points / points.abs().mean()
    enlarged = functional.interpolate(points, size=(height, width), mode="bicubic", align_corners=True)
    return enlarged[0].permute(1, 2, 0)
