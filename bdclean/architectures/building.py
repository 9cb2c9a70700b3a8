"""Building a network whose weights are about to be replaced: nothing is drawn, nothing is filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What a direct draw leaves instead: torch's trunc_normal_ draws again until every number is within its bounds, which
# memory as it was may never be.
DRAWING: dict[Callable[..., Any], tuple[str, float]] = {
    torch.Tensor.normal_: ("mean", 0.0),
    torch.Tensor.uniform_: ("from", 0.0),
    torch.Tensor.exponential_: ("", 1.0),
    torch.Tensor.bernoulli_: ("", 0.0),
}


class Undrawn(TorchFunctionMode):
    """Within it, initial weights stay as their memory was, or are one number: 600 million take a second.

    Only for networks that are loaded strictly afterwards. What is computed rather than drawn (tables of positions) is
    right, and no random number is used.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given.get("tensor", args[0] if args else None)
        if func in DRAWING:
            name, usual = DRAWING[func]
            value = given.get(name, args[1] if name and len(args) > 1 else usual)
            return args[0].fill_(value)
        return func(*args, **given)
