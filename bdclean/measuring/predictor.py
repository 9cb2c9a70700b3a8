"""Predictions in float32, in batches that fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdclean.errors import Refused, Unusable, out_of_memory
from bdclean.training.memory import keep_freed_memory
from bdclean.training.parallel import shared


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 is float32 inside, on devices that would round factors to fewer bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@dataclass
class Predictor:
    """Class predictions of `model`, in float32 without TF32. Out of memory halves the batch and tries again.

    The model's weights are laid out with channels last, which is what its images are.
    """

    model: nn.Module
    device: torch.device
    batch_size: int = 250
    seen: int = 0
    """How many images ran through the model so far, in this process."""

    def __post_init__(self) -> None:
        self.model = self.model.to(memory_format=torch.channels_last)
        if self.device.type == "cpu":
            keep_freed_memory()

    def __call__(self, images: Tensor) -> Tensor:
        """`images` uint8 [n c h w] -> int64 [n] on the CPU. Raises Refused for answers that are no numbers."""
        return shared(lambda few: self._run(few, lambda logits: logits.argmax(dim=1)), images)

    def outputs(self, images: Tensor) -> Tensor:
        """`images` uint8 [n c h w] -> what the network gives, float32 [n k] on the CPU; raises like a call."""
        return shared(lambda few: self._run(few, Tensor.float), images)

    def _run(self, images: Tensor, kept: Callable[[Tensor], Tensor]) -> Tensor:
        """What is `kept` of the network's answers to each batch, all together."""
        found, first = torch.empty(0), 0
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        with torch.inference_mode(), without_tf32():
            while first < len(images):
                batch = images[first : first + self.batch_size].to(self.device)
                try:
                    answers = self.model(batch.contiguous(memory_format=torch.channels_last))
                    some = kept(answers)
                    if not first:
                        # Room for all answers first: each one kept between large temporaries would let the heap grow
                        # by a temporary.
                        with torch.inference_mode(False):
                            found = torch.empty(
                                (len(images), *some.shape[1:]), dtype=some.dtype, device=self.device
                            )
                    found[first : first + len(batch)] = some
                    finite &= answers.isfinite().all()
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    if self.batch_size == 1:
                        raise Refused(
                            "out of memory with a single image: use a larger device or --device cpu."
                        ) from None
                    self.batch_size = max(1, min(self.batch_size, len(batch)) // 2)
                    continue
                first += len(batch)
        self.seen += len(images)
        # Read back once: a device that is read after every batch waits for the next one.
        if not finite:
            raise Unusable(
                "the network's answers to these images are not all finite numbers: nothing can be said of it. "
                "If its normalisation was given with --preprocess, try another."
            )
        return found.cpu() if len(images) else torch.empty(0, dtype=torch.int64)
