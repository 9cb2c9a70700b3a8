"""Building a network whose weights are about to be replaced: nothing is drawn, nothing is filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DRAWING = {
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.exponential_,
    torch.Tensor.bernoulli_,
    torch.Tensor.erfinv_,
}


class Undrawn(TorchFunctionMode):
    """Within it, initial weights stay as their memory was: a network of 600 million parameters is there in a second.

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
        if getattr(func, "__module__", None) == "torch.nn.init" or func in DRAWING:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
