"""What a recipe may know of the run it is part of."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bdclean.progress import Tell, quiet
from bdclean.training import parallel
from bdclean.training.resume import Saved


@dataclass(frozen=True)
class Precision:
    """How networks are trained: `bf16` runs forward passes under bfloat16 autocast; weights stay float32."""

    bf16: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        return ("bf16" if self.bf16 else "fp32") + ("+channels_last" if self.channels_last else "")

    @staticmethod
    def parse(name: str) -> Precision:
        return Precision("bf16" in name, "channels_last" in name)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    def layout(self, images: Tensor) -> Tensor:
        return (
            images.contiguous(memory_format=torch.channels_last)
            if self.channels_last
            else images.contiguous()
        )


def seed_for(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on all `parts`, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass
class Run:
    """What a recipe may know of the run it is part of: never a trigger, a target class or a held-out image."""

    device: torch.device
    precision: Precision
    seed: int
    tell: Tell = quiet
    saved: Saved | None = None
    within: str = ""
    """Stands before the names of stages, generators and kept tensors, so that a part can be done again."""
    together: bool = False
    """Whether passes are shared out among the processes of torchrun: see `parallel`."""

    def under(self, name: str) -> Run:
        """The same run for a part of it that does again, under another `name`, what was done before."""
        return replace(self, within=f"{self.within}{name}-")

    def generator(self, *parts: object) -> torch.Generator:
        """A generator on the run's device, seeded with the run's seed and `parts`."""
        within = (self.within,) if self.within else ()
        return torch.Generator(self.device).manual_seed(seed_for(self.seed, *within, *parts))

    def forward(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Logits of `model` on float `pixels` [n c h w], in the run's precision and memory layout."""
        with self.precision.autocast(self.device):
            images = self.precision.layout(pixels)
            return parallel.passed(model, images) if self.together else model(images)

    def whole(self, share: Tensor, images: int) -> Tensor:
        """What `forward` of so many `images` left on its way, [n ...], of which a hook saw this process's `share`."""
        return parallel.whole(share, images) if self.together else share

    def answers(self, model: nn.Module, images: Tensor, size: int = 256) -> Tensor:
        """The classes that `model` gives `images` uint8 [n c h w], `size` at a time: int64 [n] on the CPU."""
        with torch.no_grad():
            parts = (part.to(self.device).float() / 255 for part in images.split(size))
            return torch.cat([self.forward(model, part).argmax(1).cpu() for part in parts])

    def agreed(self, made: Tensor) -> Tensor:
        """`made`; of several processes all get the first one's: what their rounding parts could lead them apart."""
        return parallel.from_first(made.detach().cpu()).to(made.device) if self.together else made

    def keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of that name from the resume state, else `make()`, kept in the resume state from now on."""
        if self.saved is None:
            return self.agreed(make())
        name = self.within + name
        if name not in self.saved.kept:
            self.saved.kept[name] = self.agreed(make().detach())
        return self.saved.kept[name].to(self.device)


def probe_precision(
    model: nn.Module, images: Tensor, device: torch.device, wanted: str = "auto"
) -> Precision:
    """The precision in which a training step of `model` is fastest, checked against float32.

    Times a forward and a backward pass of `images` (uint8 [n c h w], at most 64 are used) in float32 and in bfloat16
    autocast with channels_last, twice each. bfloat16 is taken where it needs less than 0.9 of the time and its logits
    agree with float32's (relative error under 0.1). `wanted` other than auto is obeyed (`fp16` is measured as bf16).
    """
    if wanted == "fp32":
        return Precision()
    if wanted in ("bf16", "fp16"):
        return Precision(bf16=True, channels_last=True)
    images = images[:64].to(device)
    seconds: dict[Precision, float] = {}
    logits: dict[Precision, Tensor] = {}
    for precision in (Precision(), Precision(bf16=True, channels_last=True)):
        copied = copy.deepcopy(model).to(device).eval()
        if precision.channels_last:
            copied = copied.to(memory_format=torch.channels_last)
        times = []
        for _ in range(3):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            try:
                with precision.autocast(device):
                    out = copied(precision.layout(images.float() / 255))
                out.float().logsumexp(1).sum().backward()
            except (RuntimeError, NotImplementedError):
                return Precision()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        seconds[precision], logits[precision] = min(times[1:]), out.detach().float()
    exact, quick = Precision(), Precision(bf16=True, channels_last=True)
    error = (logits[quick] - logits[exact]).norm() / logits[exact].norm().clamp_min(1e-6)
    return quick if seconds[quick] < 0.9 * seconds[exact] and error < 0.1 else exact
