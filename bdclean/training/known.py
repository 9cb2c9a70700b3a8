"""Triggers that are known to fire on a suspect: what a student is trained under, so that it unlearns them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Known(Protocol):
    """A trigger as a recipe may see it: stamped images, its kin, and its name. All images are uint8 [n c h w]."""

    def __call__(self, images: Tensor) -> Tensor: ...

    def controls(
        self, count: int, generator: torch.Generator, channels: int = 3
    ) -> Sequence[Callable[[Tensor], Tensor]]: ...

    def spec(self) -> str: ...


def stamped(known: Sequence[Known], images: Tensor, turn: int, generator: torch.Generator) -> Tensor:
    """`images` uint8 [n c h w]: a half under the trigger of `known` whose turn it is, a half under one of its kin.

    A trigger's kin are of the same place and strength with other content, drawn by `generator` at each call: a student
    that is shown the trigger alone learns its content, and the same change in other colours still fires. Those of a
    patch that was found by trial are moved, resized or recoloured, since the trigger itself is near it. Triggers stamp
    on the CPU, where they are measured.
    """
    trigger, (first, second) = known[turn % len(known)], images.cpu().tensor_split(2)
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    # two, since those of a patch are of many colours and of one in turn
    kin = trigger.controls(2, torch.Generator().manual_seed(seed), images.shape[1])[turn // len(known) % 2]
    return torch.cat([trigger(first), kin(second)]).to(images.device)
