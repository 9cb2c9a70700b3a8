"""Fine-pruning: the channels that clean images use least are taken out, then the network is fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.training.pruning import accuracy, in_running_order, prune_while_accurate
from bdclean.training.run import Run
from bdclean.training.supervised import fine_tune

STEPS = 20
"""Looks at the accuracy, at most: BackdoorBench takes a hundredth of the channels at a time."""
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish)


@dataclass(frozen=True)
class FinePruning:
    """Prunes the last layer's least active channels and fine-tunes (Liu, Dolan-Gavitt, Garg 2018, arXiv 1805.12185).

    Channels go in the order of their mean activation on clean images, until accuracy has fallen by `tolerance` of
    itself, as in BackdoorBench; it is that on the given labeled images, where the common code looks at the test set.
    Departures: a channel is what the layer adds, so that beside a shortcut the shortcut stays; a norm that follows
    belongs to the layer, and is where the channel is set to zero, and measured as what of it is above zero, which an
    activation lets through; of a linear layer without one its absolute output counts. STEPS looks at the accuracy.
    """

    share: float | None = None  # of the channels, in [0, 1); none: as many as accuracy allows
    tolerance: float = 0.1  # of the accuracy, relative
    epochs: float = 20
    batch_size: int = 128
    rate: float = 0.01

    def __call__(
        self,
        model: Classifier,
        layers: Sequence[str],
        labeled: ImageSet,
        run: Run,
        stage: str = "fine-pruning",
    ) -> list[dict[str, float]]:
        """Prune the last of `layers`, fine-tune all of `model` in place, and return the curve.

        `layers` name modules of `model.network` in the order in which they run. Pruned channels are zeros in the
        weights and stay so. Raises Refused where no layer is a convolution or a linear one.
        """
        with pruned(model, layers, labeled, run, self.share, self.tolerance):
            return fine_tune(model, labeled, run, stage, self.epochs, self.batch_size, self.rate)


@contextmanager
def pruned(
    model: Classifier,
    layers: Sequence[str],
    labeled: ImageSet,
    run: Run,
    share: float | None,
    tolerance: float,
) -> Iterator[int]:
    """Within it, the least active channels of the last of `layers` are zeros, however `model` is trained; how many.

    They stay zeros afterwards. For `share`, `tolerance`, `layers` and what is raised see `FinePruning`.
    """
    few = labeled.images[:2].to(run.device)
    part = last_part(model, main_path(model, layers, few), few)
    order = activity(model, part, labeled.images, run).argsort(stable=True)
    tensors = {name: t for name, t in part.named_parameters(recurse=False) if name in ("weight", "bias")}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def silence(count: int) -> None:
        for name, tensor in tensors.items():
            with torch.no_grad():
                tensor.copy_(before[name])
                tensor[order[:count]] = 0

    if share is None:
        counts = sorted({len(order) * k // STEPS for k in range(STEPS)})
        count = prune_while_accurate(counts, silence, lambda: accuracy(model, labeled, run), tolerance)
    else:
        silence(count := round(share * len(order)))
    kept = torch.ones_like(order, dtype=torch.bool)
    kept[order[:count]] = False
    for name, tensor in tensors.items():
        prune.custom_from_mask(part, name, kept.view(-1, *[1] * (tensor.ndim - 1)).expand_as(tensor))
    yield count
    for name in tensors:
        prune.remove(part, name)


def main_path(model: Classifier, layers: Sequence[str], images: Tensor) -> list[str]:
    """Those of `layers` that take what none before took, in the order in which they run.

    A block's shortcut takes the block's input, as its first layer does: one of the two is left out, and whichever it
    is, the block's last layer comes after both.
    """
    taken: list[tuple[str, Tensor]] = []

    def note(name: str, inputs: tuple[Tensor, ...]) -> None:
        if not any(before is inputs[0] for _, before in taken):
            taken.append((name, inputs[0]))

    handles = [
        model.network.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: note(name, inputs)
        )
        for name in layers
    ]
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, _ in taken]


def last_part(model: Classifier, layers: Sequence[str], images: Tensor) -> nn.Module:
    """The batch norm that runs right after the last convolution or linear layer of `layers`, or else that layer."""
    ran = in_running_order(model, images)
    modules = [model.network.get_submodule(name) for name in layers]
    able = [module for module in modules if isinstance(module, (nn.Conv2d, nn.Linear)) and module in ran]
    if not able:
        raise Refused("fine-pruning needs a convolution or a linear layer at the end, and there is none.")
    layer = able[-1]
    for following in ran[ran.index(layer) + 1 :][:1]:
        if isinstance(following, _BatchNorm) and following.affine:
            return following if following.num_features == len(layer.weight) else layer
    return layer


def activity(model: Classifier, part: nn.Module, images: Tensor, run: Run, size: int = 256) -> Tensor:
    """The mean activation of each channel of the module `part`, float32 [channels], over `images` and places.

    It is what of the output is above zero: a channel that is silent on clean images, as a backdoor's is, may lie far
    below. Where a linear layer has no activation behind it, both signs count.
    """
    sums: list[Tensor] = []
    ran = in_running_order(model, images[:2].to(run.device))
    behind = next(iter(ran[ran.index(part) + 1 :]), None)
    signed = isinstance(part, nn.Linear) and not isinstance(behind, ACTIVATIONS)

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        rows = output.detach().float()
        rows = rows.abs() if signed else rows.clamp_min(0)
        rows = rows if isinstance(module, nn.Linear) else rows.movedim(1, -1)
        sums.append(rows.flatten(0, -2).mean(0) * len(output) / len(images))

    handle = part.register_forward_hook(note)
    try:
        with torch.no_grad():
            for some in images.split(size):
                run.forward(model.eval(), some.to(run.device).float() / 255)
    finally:
        handle.remove()
    return torch.stack(sums).sum(0)
