"""Pruning channels for as long as accuracy holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from bdclean.data.imageset import ImageSet
from bdclean.networks.classifier import Classifier
from bdclean.training.run import Run

Amount = TypeVar("Amount", int, float)


def accuracy(model: Classifier, labeled: ImageSet, run: Run, size: int = 256) -> float:
    """The share of `labeled` that `model` is right on, in evaluation mode, in which it stays."""
    assert labeled.labels is not None
    return float((run.answers(model.eval(), labeled.images, size) == labeled.labels).float().mean())


def prune_while_accurate(
    amounts: Iterable[Amount],
    prune: Callable[[Amount], None],
    accurate: Callable[[], float],
    tolerance: float,
) -> Amount:
    """Prunes the last of the rising `amounts` before accuracy is less than 1 - `tolerance` of what it is at the first.

    `prune` prunes an amount of the network as it first was; the first of the amounts is nothing. Returns that amount.
    """
    rising = iter(amounts)
    chosen = next(rising)
    prune(chosen)
    least = (1 - tolerance) * accurate()
    for amount in rising:
        prune(amount)
        if accurate() < least:
            break
        chosen = amount
    prune(chosen)
    return chosen


def in_running_order(model: Classifier, images: Tensor) -> list[nn.Module]:
    """The modules without children of `model.network` in the order in which they run, in evaluation mode."""
    ran: list[nn.Module] = []
    leaves = [module for module in model.network.modules() if not list(module.children())]
    handles = [module.register_forward_hook(lambda module, *_: ran.append(module)) for module in leaves]
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def pruned_channels(before: nn.Module, after: nn.Module) -> int:
    """How many channels of a network's layers and norms have zeros for a weight `after` and had not `before`."""
    known = dict(before.named_parameters())
    return sum(
        int((_silent(now) & ~_silent(known[name])).sum())
        for name, now in after.named_parameters()
        if name.endswith("weight")
    )


def _silent(weight: Tensor) -> Tensor:
    """Which rows of a weight [channels ...] are zeros, bool [channels]."""
    return (weight.detach().reshape(len(weight), -1) == 0).all(1).cpu()
