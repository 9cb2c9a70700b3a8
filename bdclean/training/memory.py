"""When memory is short: training that goes on with its activations on the host, and fewer page faults."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from bdclean.errors import Refused, out_of_memory

SHARE = 0.6
"""Of the host's memory, activations may take so much: what is only passing through needs the rest."""

LEAST, PART = 1 << 16, 1 << 28
"""Bytes: smaller tensors stay in memory, whatever there is; the disk is taken in parts of that size."""

T = TypeVar("T")
Disk = Callable[[int], Tensor]


class Roomy:
    """Calls the passes of a training step; where the device's memory does not do, again with activations on the host.

    Smaller batches, with gradients added up, would change what batch norm sees, and with it the result: measured on two
    strangers' networks, half of a batch of 128 at a time gives a gradient 29 and 67 % away from the whole batch's.
    Where activations wait for the backward pass changes no bit of it. `changing` are the tensors that a pass may change
    in place (running statistics, masks): they are put back before it is repeated. Once the memory did not do, all later
    calls keep activations on the host.
    On the host itself, whose kernel ends a process that takes too much without a word, what waits for the backward
    pass is counted and goes to disk beyond SHARE of `host`, the bytes that are free there (None on other devices).
    `disk` gives room for so many bytes, uint8 [n]. Of several processes (`alone` is not so) none repeats a step that
    the others do not.
    """

    def __init__(
        self, weights: Iterable[Tensor], changing: Iterable[Tensor], host: int | None, disk: Disk, alone: bool = True
    ) -> None:  # fmt: skip
        self.alone = alone
        self.weights, self.changing, self.host, self.disk = list(weights), list(changing), host, disk
        self.spilling = False
        self.ledger: _Ledger | None = None
        self._before: list[Tensor] = []

    def __call__(self, passes: Callable[[], T], name: str) -> T:
        """What `passes` returns. Raises Refused where that does not do either, or the step cannot be repeated."""
        if self.host is not None:
            return self._on_host(passes, name, self.host)
        if not self.alone:
            try:
                return passes()
            except torch.OutOfMemoryError:
                raise Refused(
                    f"{name} does not fit into the devices' memory: start more processes, or lower batch_size with "
                    "--set."
                ) from None
        if self.spilling:
            return self._call(passes, name)
        versions = [w._version for w in self.weights]
        self._remember()
        with contextlib.suppress(torch.OutOfMemoryError):
            return passes()
        # Only here, after the exception and its frames are gone, is their memory free again.
        if versions != [w._version for w in self.weights]:
            raise Refused(f"{name} does not fit into the device's memory: lower batch_size with --set.")
        self._restore()
        self.spilling = True
        gc.collect()
        torch.cuda.empty_cache()
        return self._call(passes, name)

    def _on_host(self, passes: Callable[[], T], name: str, free: int) -> T:
        hooks: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.ledger is None or self.ledger.spilled:  # where the first step had room, all have
            self.ledger = _Ledger(round(SHARE * free), self.weights, self._room(name, free))
            hooks = torch.autograd.graph.saved_tensors_hooks(self.ledger.keep, _given)
        try:
            with hooks:
                return passes()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise _too_large(name, free) from None

    def _room(self, name: str, free: int) -> Disk:
        def room(size: int) -> Tensor:
            try:
                return self.disk(size)
            except Refused:
                raise _too_large(name, free) from None

        return room

    def _call(self, passes: Callable[[], T], name: str) -> T:
        where = torch.autograd.graph.save_on_cpu() if self.spilling else contextlib.nullcontext()
        try:
            with where:
                return passes()
        except torch.OutOfMemoryError:
            raise Refused(
                f"{name} does not fit into the device's memory, even with its activations on the host: "
                "lower batch_size with --set, or use --device cpu."
            ) from None

    def _remember(self) -> None:
        if not self._before:
            self._before = [torch.empty_like(tensor) for tensor in self.changing]
        _copy(self._before, self.changing)

    def _restore(self) -> None:
        _copy(self.changing, self._before)


def _too_large(name: str, free: int) -> Refused:
    lower = "give it a smaller batch (--recipe NAME --set batch_size=N)"
    if name.startswith("invert-"):
        lower = "leave the inversion out (--recipe inoculate --set inversion_steps=0)"
    return Refused(
        f"{name} needs more memory than is free ({free / 2**30:.1f} GiB), and the disk has no room for it: {lower}, "
        "or use another --device."
    )


class _Ledger:
    """Counts the bytes of what waits for the backward pass, each storage once; what is more than `most` goes to disk.

    `spilled`: whether anything did.
    """

    def __init__(self, most: int, weights: Iterable[Tensor], disk: Disk):
        self.most, self.disk, self.bytes, self.spilled = most, disk, 0, False
        self.part = torch.zeros(0, dtype=torch.uint8)  # of the disk, for the next tensors
        self.held: dict[int, int] = {w.untyped_storage().data_ptr(): 1 for w in weights}  # are there anyway

    def keep(self, tensor: Tensor) -> _Kept | Tensor:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.held and self.bytes + size > self.most and size > LEAST:
            self.spilled = True
            return self._on_disk(tensor)
        self.held[place] = self.held.get(place, 0) + 1
        if self.held[place] == 1:
            self.bytes += size
        return _Kept(tensor.detach(), self)

    def _on_disk(self, tensor: Tensor) -> Tensor:
        """A copy, with its strides where it is dense."""
        size = tensor.numel() * tensor.element_size()
        if size > len(self.part):  # a file a tensor would be more files than a process may hold
            self.part = self.disk(max(size, PART))
        room, self.part = self.part[:size].view(tensor.dtype), self.part[-(-size // 64) * 64 :]
        strides = torch.empty_like(tensor, device="meta").stride()
        return room.as_strided(tensor.shape, strides, room.storage_offset()).copy_(tensor.detach())

    def release(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        self.held[place] -= 1
        if self.held[place] == 0:
            del self.held[place]
            self.bytes -= storage.nbytes()


class _Kept:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: Tensor, ledger: _Ledger):
        self.tensor, self.ledger = tensor, ledger

    def __del__(self) -> None:
        self.ledger.release(self.tensor)


def _given(kept: _Kept | Tensor) -> Tensor:
    return kept.tensor if isinstance(kept, _Kept) else kept


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    with torch.no_grad():
        if to:
            torch._foreach_copy_(to, source)


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks, rather than return them and fault them in again at every step.

    Measured on two cores with small networks: system time of a training step falls from about 8 % to nothing. Does
    nothing where the C library is another one.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
    except (OSError, AttributeError, TypeError):
        pass
