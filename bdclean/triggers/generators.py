"""Triggers that a small network draws for each image: the network, its file, and what it stamps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.errors import Refused
from bdclean.files import writing
from bdclean.files.text import shown
from bdclean.triggers.content import surrogate
from bdclean.triggers.stamping import Stamp, check_pixels, draw_seed, in_channels, spec_of, to_pixels

WIDTH = 16
"""Channels at the image's own size: 20,000 weights, a third of the arithmetic of a ResNet-18 of the same width."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_BYTES = 2**20
"""Of a generator's file, which has about 80,000."""

BATCH = 256
"""Images that are stamped at a time."""

Network = TypeVar("Network", bound=nn.Module)


class Generator(nn.Module):
    """A U-Net of two sizes that changes each pixel by at most `bound` grey levels, as it sees fit for the image.

    There is no normalisation over the batch: an image's stamp must not depend on its neighbours.
    """

    bound: Tensor

    def __init__(self, bound: float, width: int = WIDTH) -> None:
        super().__init__()
        self.register_buffer("bound", torch.tensor(float(bound)))
        self.near = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.far = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.Conv2d(3 * width, width, 3, padding=1)
        self.change = nn.Conv2d(width, 3, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Stamped images of float `pixels` [n 3 h w], both in [0, 1]."""
        near = F.relu(self.near(pixels - 0.5))
        far = F.relu(self.far(F.relu(self.down(near))))
        both = torch.cat([near, F.interpolate(far, size=near.shape[2:])], 1)
        change = self.change(F.relu(self.up(both))).tanh()
        return (pixels + self.bound / 255 * change).clamp(0, 1)


def fresh(bound: float, seed: int) -> Generator:
    """A generator with random weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Generator(bound)


def write(generator: nn.Module, path: str) -> None:
    """Write a generator as safetensors."""
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in generator.state_dict().items()}
    writing.replace(Path(path), lambda stream: stream.write(save(tensors)))


def read(path: str, generator: Network) -> Network:
    """`generator` with the tensors of a file that `write` wrote, in double precision and evaluation mode.

    It is one of the kind that the file is to hold, with any weights, and has a buffer `bound`, which lies over 0 and up
    to 255; raises Refused where the file holds another thing.
    """
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise Refused(f"trigger {path} has more than the {MAX_BYTES:,} bytes that a generator may have.")
        tensors = load_file(path)
    except OSError as error:
        raise Refused(f"trigger {path} cannot be read: {error.strerror or 'damaged'}.") from None
    except SafetensorError:
        raise Refused(f"trigger {path} is not a valid safetensors file.") from None
    for name, tensor in generator.state_dict().items():
        found = list(tensors[name].shape) if name in tensors else "missing"
        if found != list(tensor.shape):
            raise Refused(
                f"trigger {path}: {name} is {shown(found)}, expected {list(tensor.shape)}: "
                "give the file that the attack wrote."
            )
    if tensors.keys() != generator.state_dict().keys():
        raise Refused(
            f"trigger {path} holds tensors that no generator has: give the file that the attack wrote."
        )
    if any(tensor.dtype not in FLOATS for tensor in tensors.values()):
        raise Refused(f"trigger {path} holds other numbers than floats: give the file that the attack wrote.")
    if not all(bool(t.isfinite().all()) for t in tensors.values()) or not 0 < float(tensors["bound"]) <= 255:
        raise Refused(f"trigger {path} holds NaN, infinite values or a bound outside of 0 to 255.")
    generator.load_state_dict(tensors)
    return generator.double().eval().requires_grad_(False)


def stamp(images: Tensor, generator: nn.Module) -> Tensor:
    """New uint8 images as `generator` changes them; of grey ones it makes what is grey of its coloured ones.

    In double precision: in single, convolutions of batches of other sizes differ in a last bit, and now and then a
    pixel with it.
    """
    check_pixels(images)
    generator = generator.to(images.device)
    return over(images, generator)


def controls(generator: nn.Module, count: int, source: torch.Generator) -> Sequence[Stamp]:
    """Stamps that change each image as much as `generator` does, and in the same spectrum, to other shapes and colours.

    What the generator adds to an image gets other Fourier phases, the same for all images, and turned colours; on grey
    images, where turned colours would be fainter, the opposite of each.
    """
    return [partial(_other, generator=generator, seed=draw_seed(source)) for _ in range(count)]


def _other(images: Tensor, generator: nn.Module, seed: int) -> Tensor:
    check_pixels(images)
    generator = generator.to(images.device)
    turn = _turn(torch.Generator().manual_seed(seed)).to(images.device)
    if images.shape[1] == 1:
        turn = -torch.eye(3, dtype=turn.dtype, device=images.device)

    def changed(pixels: Tensor) -> Tensor:
        shapes = surrogate(generator(pixels) - pixels, torch.Generator().manual_seed(seed))
        return pixels + torch.einsum("ck,nkhw->nchw", turn, shapes.double())

    return over(images, changed)


def _turn(generator: torch.Generator) -> Tensor:
    """A map of colours, double [3 3], that keeps lengths and leaves every colour 60 degrees or more from where it was.

    It mirrors one axis and turns the plane across it: a rotation alone would leave its axis in place, and with it the
    whole of a change to one flat colour along it.
    """
    while True:
        drawn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        turn = -drawn if float(torch.linalg.det(drawn)) > 0 else drawn
        if float(turn.trace()) <= 0:  # -1 along the axis, and twice the cosine of the plane's angle
            return turn


def over(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """uint8 images of what `change` makes of their pixels as RGB, both in [0, 1]; at most BATCH at a time."""
    channels = images.shape[1]
    with torch.inference_mode():
        made = [change(in_channels(some.double() / 255, 3)) for some in images.split(BATCH)]
        return torch.cat([to_pixels(255 * in_channels(pixels, channels)) for pixels in made])


@dataclass(frozen=True)
class DrawnByNetwork:
    """A trigger whose change to an image is drawn by the generator in the file at `path`."""

    path: str

    def __post_init__(self) -> None:
        _ = self.generator  # a file that cannot be read is refused now, not in the middle of a scan

    @cached_property
    def generator(self) -> Generator:
        return read(self.path, Generator(0.0))

    def __call__(self, images: Tensor) -> Tensor:
        return stamp(images, self.generator)

    def controls(self, count: int, generator: torch.Generator, channels: int = 3) -> Sequence[Stamp]:
        """Changes as strong on each image and of the same spectrum, in other shapes and colours."""
        return controls(self.generator, count, generator)

    def spec(self) -> str:
        return spec_of(self)
