"""How far images are from a network's statistics, and how its answers compare."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bdclean.data.augment import crop
from bdclean.networks.normalisation import Preprocess

# Accuracies differ where a fair coin would part the images on which only one is right so unevenly this seldom.
ERROR_LEVEL = 0.001


# Images up to this many pixels are small: cheap, and usually trained with crops.
SMALL = 64 * 64


class Reached(Exception):
    """Ends a pass once it has come as far as it needs to."""


def distances(network: nn.Module, images: Tensor, candidates: list[Preprocess]) -> dict[Preprocess, float]:
    """Each candidate's distance from the first normalisation layer; empty where no such layer runs.

    Training often crops at random, which leaves dark or grey borders in the statistics. So small images are tried as
    they are, cropped before and cropped after normalising, and the nearest counts.
    """
    small = images.shape[2] * images.shape[3] <= SMALL
    padding = max(1, images.shape[2] // 8)

    def shifted(x: Tensor) -> Tensor:
        return crop(x, torch.Generator().manual_seed(0), padding)

    dark = shifted(images) if small else images
    found: dict[Preprocess, float] = {}
    for candidate in candidates:
        ways = [candidate.normalise(images)]
        if small:
            ways += [candidate.normalise(dark), shifted(ways[0])]
        scores = [distance(network, x) for x in ways]
        if scores[0] is None:
            return {}
        found[candidate] = min(s for s in scores if s is not None)
    return found


def distance(network: nn.Module, inputs: Tensor) -> float | None:
    """Mean over channels of KL(N(batch) || N(running)) at the first layer with running statistics.

    0 where mean and variance of `inputs` there are the running ones, unbounded above. None without such a layer.
    """
    found = first_statistics(network, inputs)
    if found is None:
        return None
    return layer_distance(*found)


def layer_distance(mean: Tensor, variance: Tensor, layer: nn.modules.batchnorm._BatchNorm) -> float:
    """Mean over channels of KL(N(mean, variance) || N(running)) at `layer`; the first two are [channels]."""
    assert layer.running_mean is not None and layer.running_var is not None
    # A channel that training left dead has no scale of its own; epsilon is the least that the layer divides by.
    running = layer.running_var.float() + layer.eps
    ratio = (variance + layer.eps) / running
    shift = (mean - layer.running_mean.float()) ** 2 / running
    return float((0.5 * (ratio - 1 - ratio.log() + shift)).mean())


def first_statistics(
    network: nn.Module, inputs: Tensor
) -> tuple[Tensor, Tensor, nn.modules.batchnorm._BatchNorm] | None:
    """Mean and variance [channels] of what reaches the first layer with running statistics, and that layer.

    The pass stops there. None where no such layer runs.
    """
    seen: list[tuple[Tensor, nn.modules.batchnorm._BatchNorm]] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        seen.append((args[0].detach(), module))
        raise Reached

    handles = [
        m.register_forward_pre_hook(hook)
        for m in network.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    if not handles:
        return None
    try:
        with torch.no_grad():
            network(inputs)
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        return None
    x, layer = seen[0]
    variance, mean = torch.var_mean(x.float(), [k for k in range(x.ndim) if k != 1], correction=0)
    return mean, variance, layer


def spread(network: nn.Module, images: Tensor, preprocess: Preprocess) -> tuple[float, float]:
    """Entropy (nats) of the network's mean answer to `images`, and how much of it tells one image from another."""
    shares = answers(network, images, preprocess)
    width = entropy(shares.mean(0))
    # Rounding makes the difference negative where all answers are the same.
    return float(width), float((width - entropy(shares).mean()).clamp_min(0))


def answers(network: nn.Module, images: Tensor, preprocess: Preprocess) -> Tensor:
    """The network's probabilities [n classes]."""
    with torch.no_grad():
        parts = [network(preprocess.normalise(part)).float().softmax(1) for part in images.split(64)]
    return torch.cat(parts)


def entropy(shares: Tensor) -> Tensor:
    """In nats, over the last axis."""
    return torch.special.entr(shares).sum(-1)


def clearly_more(one: Tensor, other: Tensor) -> bool:
    """Whether `one` is right on more of the same images (bool [n] each) than chance explains: McNemar's exact test."""
    gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
    tail = sum(math.comb(gained + lost, k) for k in range(lost + 1)) / 2 ** (gained + lost)
    return gained > lost and tail < ERROR_LEVEL


def confidence(network: nn.Module, images: Tensor, preprocess: Preprocess) -> float:
    """Mean of the largest probability, in (0, 1]."""
    return float(answers(network, images, preprocess).amax(1).mean())
