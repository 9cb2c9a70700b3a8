"""Building a network whose weights are about to be replaced: nothing is drawn that would be thrown away.

The meta device with `load_state_dict(assign=True)` in its place was measured (torch 2.14, timm 1.0.31). 109 of 111
named networks (two are too large to draw) and small ones of every family keep all their buffers, because all that they
compute is in their files. Of 84 of timm's, 13 keep buffers without values: BEiT, ConViT, CoAtNet, CSATv2,
EfficientFormer V2, EfficientViT-M, EVA02, LeViT (two), MaxViT (two), Swin and Swin v2; five of them then answer with
other numbers and raise nothing. User code with a tensor of its own raises. Nor would anything computed be there for
`Checkpoint.build` to hold a file's tables against, or to put where a file has none (Hugging Face's newer Swins, batch
counters).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Undrawn(TorchFunctionMode):
    """Within it, `torch.nn.init` leaves weights as their memory was: a large network is there sooner.

    Only for networks that are loaded strictly afterwards. What is computed rather than drawn (tables of positions) is
    right. Tensors' own methods draw as ever: torch's truncated normal law draws again until all values are in range,
    and would never end on memory that nothing fills.
    """

    def __enter__(self) -> Undrawn:
        # The one function of `torch.nn.init` for transformers' weights is no override point: it is put aside by name.
        self.drawing = nn.init.trunc_normal_
        nn.init.trunc_normal_ = untouched
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        nn.init.trunc_normal_ = self.drawing

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def load(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts the tensors of a file into `network`; raises RuntimeError unless names and shapes match exactly.

    A state_dict carries a version number of every module beside the tensors, which a safetensors file has no room for.
    Modules that changed take none for an old one, torchvision's MNASNet for a fault: the file counts as written by the
    code at hand, and names and shapes say whether it was.
    """
    versioned = OrderedDict(state)
    versioned._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    network.load_state_dict(versioned, strict=True)


def untouched(tensor: Tensor, *_: object, **__: object) -> Tensor:
    """`tensor`, as it is."""
    return tensor
