"""What a network sees on the way, in a pass that is made anyway: maps at its taps, and features before its head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bdclean.networks.arch import Arch


@dataclass
class Seen:
    """After a pass: `maps` [n c h w] by tap, shallow to deep; `features` [n d], what went into the head."""

    maps: dict[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None


@contextmanager
def seeing(network: nn.Module, arch: Arch) -> Iterator[Seen]:
    """Within it, every pass of `network` leaves its maps and features in the `Seen`; hooks are set once."""
    seen = Seen()

    def tap(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            seen.maps[name] = as_map(output)

        return network.get_submodule(name).register_forward_hook(hook)

    def before_head(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # A head that is a 1x1 convolution (SqueezeNet) takes maps, whose mean it would see as well.
        seen.features = inputs[0].mean((2, 3)) if inputs[0].ndim == 4 else inputs[0]

    handles = [tap(name) for name in arch.taps]
    if arch.head:
        handles.append(network.get_submodule(arch.head).register_forward_pre_hook(before_head))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def as_map(output: Tensor) -> Tensor:
    """A tap's output as [n c h w].

    Tokens [n t c] lie row by row and may follow one or two others (a class token, DeiT's distillation token), which are
    left out; if they fill no square, they become one row. Maps with channels last (Swin's) are turned.
    """
    if output.ndim == 3:
        n, t, c = output.shape
        side = math.isqrt(t)
        kept = output[:, t - side * side :] if t - side * side <= 2 else output
        h, w = (side, side) if kept.shape[1] == side * side else (1, t)
        return kept.transpose(1, 2).reshape(n, c, h, w)
    _, a, b, c = output.shape
    return output.permute(0, 3, 1, 2) if a == b != c else output
