"""Adversarial neuron pruning: channels whose perturbation brings a backdoor out are switched off."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.training.loop import Batch, Measures, State, fit
from bdclean.training.pruning import accuracy, prune_while_accurate
from bdclean.training.run import Run
from bdclean.training.students import choose_augmentation

THRESHOLDS = [round(0.05 * k, 2) for k in range(19)]
"""Of masks, in [0, 1]: the authors' sweep to 0.9."""

Curve = list[dict[str, float]]
Factors = list[tuple[Tensor, Tensor]]
"""By which the scale and the shift of each norm are multiplied, [channels] each."""


@dataclass(frozen=True)
class NeuronPruning:
    """Adversarial neuron pruning (Wu, Wang, NeurIPS 2021, arXiv 2110.14430).

    A mask in [0, 1] on each channel of every batch norm learns to keep accuracy while scales and shifts are perturbed
    against it, one sign step from a random start. Channels with the smallest masks lose their scale. Settings are the
    authors' code's. Departures: the threshold is the largest of theirs with which accuracy on the given labeled images
    falls by at most `tolerance` of itself, where the code sweeps them on the test set; batches come from an endless
    stream of shuffles in place of draws with replacement.
    """

    share: float | None = None  # of all channels, in [0, 1): pruned in place of those under a threshold
    tolerance: float = 0.1  # of the accuracy, relative
    steps: int = 2000
    batch_size: int = 128
    rate: float = 0.2
    momentum: float = 0.9
    budget: float = 0.4  # of the perturbation, as a share of scales and shifts
    clean: float = 0.2  # weight of the unperturbed loss; the perturbed one has the rest

    def __call__(
        self, model: Classifier, labeled: ImageSet, run: Run, stage: str = "neuron pruning"
    ) -> Curve:
        """Prune `model` in place, and return the curve of its masks; raises Refused where it has no batch norm."""
        found, curve = self.masks(model, labeled, run, stage)
        masks = torch.cat(found)
        norms = scaled_norms(model)
        before = [norm.weight.detach().clone() for norm in norms]

        def silence(dead: Tensor) -> None:
            off = dead.split([norm.num_features for norm in norms])
            with torch.no_grad():
                for norm, weight, channels in zip(norms, before, off, strict=True):
                    norm.weight.copy_(weight.masked_fill(channels, 0))

        if self.share is None:
            prune_while_accurate(
                [-1.0, *THRESHOLDS],
                lambda threshold: silence(masks <= threshold),
                lambda: accuracy(model, labeled, run),
                self.tolerance,
            )
        else:
            place = masks.argsort(stable=True).argsort()
            silence(place < round(self.share * len(masks)))
        model.eval()
        return curve

    def masks(self, model: Classifier, labeled: ImageSet, run: Run, stage: str) -> tuple[list[Tensor], Curve]:
        """Masks [channels] of the batch norms of `model`, which is left as it was, and the curve of their training."""
        if not scaled_norms(model):
            raise Refused("adversarial neuron pruning needs batch norm, and this network has none.")
        augment = choose_augmentation(model, labeled.images, run)
        # in training mode, as the authors' code, so that its running statistics change: on a copy
        masked = copy.deepcopy(model).train().requires_grad_(False)
        norms = scaled_norms(masked)
        masks = nn.ParameterList(torch.ones_like(norm.weight) for norm in norms)

        def step(batch: Batch) -> tuple[Tensor, Measures]:
            assert batch.labels is not None
            images, labels = augment(batch.images, batch.generator).float() / 255, batch.labels

            def loss(factors: Factors) -> tuple[Tensor, Tensor]:
                with scaling(norms, factors):
                    logits = run.forward(masked, images).float()
                return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()

            with torch.no_grad():
                for mask in masks:
                    mask.clamp_(0, 1)  # what the last step left
            noise = [
                ((torch.rand(2, len(mask), generator=batch.generator, device=run.device) * 2 - 1) * self.budget)
                .requires_grad_(True)
                for mask in masks
            ]  # fmt: skip
            worse = loss([(mask.detach() + n[0], 1 + n[1]) for mask, n in zip(masks, noise, strict=True)])[0]
            slopes = torch.autograd.grad(worse, noise)
            noise = [
                (n + self.budget * slope.sign()).detach() for n, slope in zip(noise, slopes, strict=True)
            ]
            perturbed = loss([(mask + n[0], 1 + n[1]) for mask, n in zip(masks, noise, strict=True)])[0]
            plain, right = loss([(mask, torch.ones_like(mask)) for mask in masks])
            return self.clean * plain + (1 - self.clean) * perturbed, {"accuracy": right}

        optimiser = torch.optim.SGD(masks.parameters(), self.rate, momentum=self.momentum)
        curve = fit(
            step,
            State(stage, masks, optimiser, labeled.images, labeled.labels, self.batch_size, self.steps),
            run,
        )
        return [mask.detach().clamp(0, 1) for mask in masks], curve


def scaled_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of `model` that have a scale and a shift."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]


@contextmanager
def scaling(norms: Sequence[_BatchNorm], factors: Factors) -> Iterator[None]:
    """Within it, each of `norms` has its scale and its shift multiplied by the `factors`."""

    def multiplied(norm: _BatchNorm, scale: Tensor, shift: Tensor, output: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (output.ndim - 2))
        bias = norm.bias.view(shape)
        return (output - bias) * scale.view(shape) + bias * shift.view(shape)

    handles = [
        norm.register_forward_hook(lambda norm, _, output, by=by: multiplied(norm, by[0], by[1], output))
        for norm, by in zip(norms, factors, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
