"""Data parallelism under torchrun: several processes compute what one would, each its share of every pass.

Every process runs the same program with the same seeds on the same whole batches. Only passes of networks are shared
out: a process takes its share of the images, and what all give is put together again, in order, so that each has the
whole answer. Whatever a recipe makes of that, its loss too, is then the same in all, and no recipe knows of it.

Gradients: `passed` hands each share its part of the loss's gradient times the number of processes, and `average`
takes the mean over them. So weights that were used in shared passes and weights that were used in whole ones both get
the gradient of one process, and so does what was put in, such as a pattern that is learnt. Batch norm in training mode
takes the statistics of the whole batch. Dropout draws for the whole batch and keeps its share. Draws that are made
inside a fused attention are the same in every share.

With one process each function does what it is handed, and nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bdclean import ranks
from bdclean.errors import Refused

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a process waits for the others. What the first does alone (writing) takes seconds, and what they do apart
(reading images) about as long in each: it is not to be mistaken for a dead process, which is noticed at once, as its
connections close and torchrun ends the others."""
MEETING = timedelta(minutes=10)
"""How long torchrun is looked for at the start: one that was killed meanwhile would be looked for in vain."""

_store: dist.Store | None = None
_apart = False
"""Whether this process is computing its share of something: what that calls is not shared out again."""


class Lost(Refused):
    """Another process has ended: nothing that all do together can go on."""


# --- processes ----------------------------------------------------------------------------------------------


def join(device: str) -> None:
    """Meets the other processes that torchrun started, if it did. `device` is what `--device` says.

    With CUDA each takes the device of its number on its machine. Raises Refused where there are too few.
    """
    global _store
    rank = ranks.own()
    if rank.count == 1 or _store is not None:
        return
    cuda = device != "cpu" and (device != "auto" or torch.cuda.is_available())
    if cuda and rank.local >= torch.cuda.device_count():
        raise Refused(
            f"torchrun started more processes on this machine than it has CUDA devices ({torch.cuda.device_count()}): "
            "start as many as there are, or use --device cpu."
        )
    if cuda:
        torch.cuda.set_device(rank.local)
    with _lost():
        store, _, _ = next(dist.rendezvous("env://", timeout=MEETING))
        group = dist.PrefixStore("group", store)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=group, rank=rank.number, world_size=rank.count, timeout=PATIENCE
        )
    _store = store
    atexit.register(_leave)  # NCCL warns of a group that is left to end with the process


def joined() -> bool:
    """Whether this process computes together with others."""
    return _store is not None


def processes() -> int:
    return dist.get_world_size() if joined() else 1


def wait() -> None:
    """Until all processes are here: what the first has written is there for the others to read."""
    from_first(None)


def from_first(value: T) -> T:
    """The first process's `value` (tensors on the CPU): of what may differ, as what was timed does, all take one."""
    if not joined():
        return value
    held = [value]
    with _lost():
        dist.broadcast_object_list(held, src=0)
    return held[0]


def give_reason(error: BaseException, said: str, code: int) -> None:
    """Leaves why this process cannot go on, for the first one to tell, unless another one has."""
    if _store is not None and not isinstance(error, Lost):
        trace = "".join(traceback.format_exception(error))
        _store.compare_set("failed", "", json.dumps({"code": code, "said": said, "trace": trace}))


def settle(model: int, problem: str | None) -> bool:
    """Ends the work on the `model`-th file, with the kind of `problem` or None: whether the next can be begun.

    Where another process than the first failed and the first does not come to an end by itself, it waits for this one:
    then the connections are closed, and the first finds out there why.
    """
    if _store is None:
        return True
    mark = f"ended-{model}"
    if ranks.first():
        _store.set(mark, "")
        return problem != Lost.__name__
    if problem is None:
        return True
    try:
        _store.wait([mark], timedelta(seconds=ranks.GRACE))
        return problem != Lost.__name__
    except RuntimeError:
        _leave()
        return False


def _leave() -> None:
    """Closes the connections to the others."""
    with contextlib.suppress(RuntimeError, AssertionError):
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """Turns what the transport raises where another process has ended into a sentence, with its reason if it left one.

    A defect there is raised as a defect here.
    """
    try:
        yield
    except RuntimeError as error:
        count, known = ranks.own().count, {}
        with contextlib.suppress(RuntimeError):  # torchrun itself has ended
            if _store is not None and _store.check(["failed"]):
                known = json.loads(_store.get("failed"))
        if known.get("code") == 70:
            raise RuntimeError(f"in another process: {known['said']}\n{known['trace']}") from None
        why = (
            known.get("said") or f"one of the {count} processes has ended, and the others cannot go on alone."
        )
        raise Lost(why) from error


# --- shares -------------------------------------------------------------------------------------------------


def _sizes(total: int) -> list[int]:
    """How many of `total` things each process takes: consecutive ones, as many as the others or one more."""
    count = processes()
    return [total // count + (number < total % count) for number in range(count)]


def _mine(total: int) -> slice:
    sizes, number = _sizes(total), dist.get_rank()
    begin = sum(sizes[:number])
    return slice(begin, begin + sizes[number])


def _gathered(share: Tensor, total: int) -> Tensor:
    """The shares [k ...] of all processes, one after another: [total ...]. They travel as bytes, of one length."""
    sizes = _sizes(total)
    padded = share.new_zeros((sizes[0], *share.shape[1:]))
    padded[: len(share)] = share
    flat = padded.reshape(-1).view(torch.uint8)
    parts = [torch.empty_like(flat) for _ in sizes]
    with _lost():
        dist.all_gather(parts, flat)
    return torch.cat(
        [part.view(share.dtype).view(padded.shape)[:size] for part, size in zip(parts, sizes, strict=True)]
    )


def _everywhere(values: Tensor) -> Tensor:
    """`values` of all processes: [processes ...]."""
    return _gathered(values[None], processes())


def total(value: int) -> int:
    """The sum of `value` over the processes."""
    if not joined():
        return value
    return int(_everywhere(torch.tensor(value, device=_wire())).sum())


def _wire() -> torch.device:
    """Where tensors must be that are sent."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def shared(compute: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
    """`compute(items)` for a `compute` that gives a row, on the CPU, for each of `items` [n ...] by itself.

    What is refused in one process is refused in all. Within `compute` nothing is shared out again.
    """
    global _apart
    if not joined() or _apart or len(items) < processes():
        return compute(items)
    _apart, refused, rows = True, None, torch.zeros(0)
    try:
        rows = compute(items[_mine(len(items))])
    except Lost:
        raise
    except Refused as error:
        refused = error
    finally:
        _apart = False
    failed = _everywhere(torch.tensor(refused is not None, device=_wire()))
    if failed.any():
        said: list[Any] = [None] * processes()
        with _lost():
            dist.all_gather_object(said, str(refused) if refused is not None else None)
        raise Refused(next(each for each in said if each is not None))
    return _gathered(rows.to(_wire()), len(items)).cpu()


# --- passes and gradients -----------------------------------------------------------------------------------


def passed(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`model(images)`, [n ...] of n images: each process passes its share through the network."""
    if not joined() or len(images) < processes():
        return model(images)
    with _WholeBatch(len(images)):
        share = model(_Share.apply(images))
    return _Whole.apply(share, len(images))


def whole(share: Tensor, images: int) -> Tensor:
    """What a pass of `images` left on its way, [n ...], of which a hook saw this process's `share`."""
    if not joined() or images < processes():
        return share
    return _Whole.apply(share, images)


def average(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over all processes takes the place of each gradient."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not joined() or not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    with _lost():
        dist.all_reduce(flat)
    flat /= processes()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


class _Share(torch.autograd.Function):
    """This process's share of a batch."""

    @staticmethod
    def forward(ctx: Any, batch: Tensor) -> Tensor:
        ctx.total = len(batch)
        return batch[_mine(len(batch))].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _gathered(gradient, ctx.total) / processes()


class _Whole(torch.autograd.Function):
    """The batch of which each process has a share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, total: int) -> Tensor:
        ctx.total = total
        return _gathered(share, total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[_mine(ctx.total)] * processes(), None


class _WholeBatch(TorchFunctionMode):
    """Within it batch norm and dropout are those of the whole batch, of `total` images, whatever module calls them.

    No module is changed, so that names of states stay, and copies that are made meanwhile are copies.
    """

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total, self.mine = total, _mine(total)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is Tensor.bernoulli_ and self._is_share(args[0]):
            return args[0].copy_(self._all(args[0]).bernoulli_(*args[1:], **kwargs)[self.mine])
        return func(*args, **kwargs)

    def _is_share(self, x: Tensor) -> bool:
        return x.ndim > 0 and len(x) == self.mine.stop - self.mine.start

    def _all(self, x: Tensor) -> Tensor:
        return x.new_ones((self.total, *x.shape[1:]))

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or not self._is_share(x):
            return F.dropout(x, p, training, inplace)
        kept = F.dropout(self._all(x.detach()), p)[self.mine]
        return x.mul_(kept) if inplace else x * kept


def _batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """`F.batch_norm` on a share, with the statistics of the whole batch where it is in training mode."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    normed, mean, variance, count = _BatchNorm.apply(x, weight, bias, eps)
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = variance * count / (count - 1)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return normed


class _BatchNorm(torch.autograd.Function):
    """Batch norm of a share [k c ...] of a batch: also the batch's mean and variance [c], and how many values they are
    of in each channel. torch's own (`SyncBatchNorm`) knows CUDA alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        variance, mean = torch.var_mean(x.float(), axes, correction=0)
        own = torch.stack([mean, variance, torch.full_like(mean, x.numel() // x.shape[1])])
        means, variances, counts = _everywhere(own.double()).unbind(1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / count
        mean, variance, count = mean.float(), variance.float(), count.float()
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        x, weight, mean, scale, count = ctx.saved_tensors
        axes, shape = [a for a in range(x.ndim) if a != 1], [1, -1] + [1] * (x.ndim - 2)
        wide = gradient.float()
        normed = (x.float() - mean.view(shape)) * scale.view(shape)
        own = torch.stack([wide.sum(axes), (wide * normed).sum(axes)])
        for_bias, for_weight = own
        straight, along = (_everywhere(own).sum(0) / count).unbind(0)
        back = wide - straight.view(shape) - normed * along.view(shape)
        back = back * (scale if weight is None else scale * weight.float()).view(shape)
        needs = ctx.needs_input_grad
        return (
            back.to(x.dtype) if needs[0] else None,
            for_weight.to(weight.dtype) if needs[1] else None,
            for_bias.to(gradient.dtype if weight is None else weight.dtype) if needs[2] else None,
            None,
        )
