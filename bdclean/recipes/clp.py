"""Channel Lipschitz pruning: channels that amplify far more than others of their layer are switched off."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.training.pruning import in_running_order
from bdclean.training.run import Run
from bdclean.training.students import frozen

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class CLP:
    """Channel Lipschitzness-based pruning (Zheng, Tang, Li, Liu, ECCV 2022, arXiv 2208.03111).

    What it does: bounds how much each channel of a layer and the batch norm after it can amplify, and switches off
    those channels whose bound is more than `deviations` standard deviations above the mean of their layer's.
    When to use it: without any image; to compare with it. It takes a second.
    What it needs: a network with batch norm, and no image.
    Known limits: of n channels none can be over (n - 1) / sqrt(n) deviations above the mean: a layer of 10 channels or
    fewer is never pruned at 3. Attackers who know of it stay below the bound.

    Settings are the authors' for CIFAR-10. Departures: a norm belongs to the layer of as many channels that ran last
    before it, where the authors' code takes the convolution that was registered last before it, which is another in
    networks with shortcuts; a layer may be linear, too; the norm's epsilon is counted, as in the network.
    """

    name: ClassVar[str] = "clp"
    source: ClassVar[str] = "arXiv 2208.03111"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ()

    deviations: float = 3.0  # the paper's u

    def __post_init__(self) -> None:
        if self.deviations < 0:
            raise UsageError("clp: deviations are not negative.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        student = frozen(suspect, run)
        pairs = normed_layers(student, torch.zeros_like(unlabeled.images[:1]).to(run.device))
        if not pairs:
            raise Refused(
                "clp needs layers that batch norm follows, and this network has none: use a recipe that trains."
            )
        pruned = 0
        for done, (layer, norm) in enumerate(pairs, 1):
            bounds = channel_bounds(layer, norm)
            dead = bounds > bounds.mean() + self.deviations * bounds.std()
            with torch.no_grad():
                norm.weight[dead], norm.bias[dead] = 0, 0
            pruned += int(dead.sum())
            run.tell(self.name, done, len(pairs), pruned=float(pruned))
        channels = sum(norm.num_features for _, norm in pairs)
        stages = [f"{pruned} of {channels} channels pruned"]
        return Cleansed(student, arch, [], asdict(self), stages)


def normed_layers(model: Classifier, images: Tensor) -> list[tuple[Layer, _BatchNorm]]:
    """The batch norms of `model`, each with the layer that runs last before it, if that has as many channels.

    `images` say the size of the input alone; norms without scale, shift or running statistics are left out.
    """
    pairs: dict[_BatchNorm, Layer] = {}
    layer: Layer | None = None
    for module in in_running_order(model, images):
        if isinstance(module, Layer):
            layer = module
        elif isinstance(module, _BatchNorm) and module.affine and module.running_var is not None:
            if layer is not None and len(layer.weight) == module.num_features:
                pairs.setdefault(module, layer)
    return [(layer, norm) for norm, layer in pairs.items()]


def channel_bounds(layer: Layer, norm: _BatchNorm) -> Tensor:
    """An upper bound of each channel's Lipschitz constant, float32 [channels], each at least 0.

    The largest singular value of the channel's weights as a matrix [in, height * width], as in the paper, times what
    the norm multiplies it by.
    """
    assert norm.running_var is not None
    weight = layer.weight.detach().float()
    matrices = weight.flatten(2) if weight.ndim > 2 else weight[:, None]
    gain = norm.weight.detach().float().abs() / (norm.running_var.float() + norm.eps).sqrt()
    return torch.linalg.matrix_norm(matrices, ord=2) * gain
