"""Which normalisation a network was trained with, from real images and the network itself.

Candidates are compared at the first normalisation layer in evaluation mode: under the right one, the statistics of real
images there look like the running ones. Later layers tell less, because errors average out on the way.

The rule was set on 72 stems (trained and random filters, CIFAR-10 statistics under each RGB candidate, with no
augmentation or with crops that leave black, mean-coloured or mirrored borders). With 200 and 500 test images of
CIFAR-10 the right one was plausible in all 72, alone in 63 and 72; with 64 images it was so in 70 and 56. Images from
elsewhere widen the set and can exclude the right one: with 500 of Tiny ImageNet it was plausible in 66 at twice the
least distance and in 68 at three times, with road signs in 53 and 64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bdclean.data.augment import crop
from bdclean.errors import Refused
from bdclean.normalisation import CANDIDATES, Preprocess

# A candidate is plausible up to this many times the least distance ...
FACTOR = 2.0
# ... plus this over the number of images, for the chance in a small draw.
SAMPLING = 0.1
# Where even the nearest is this far, the images are not of the training kind, and more is needed to rule one out.
FOREIGN, FOREIGN_FACTOR = 0.008, 3.0
# Two normalisations closer than this for every pixel, in the network's units (about 4 from black to white), are one.
SAME = 0.06
# One this close to a claim that fits is no rival of it: 5 % of the range.
BESIDE_CLAIM = 0.2
# Strongly coloured images show the order of channels in the first layer, where the other order is this much farther.
OTHER_ORDER = 4.0
# Mean top probabilities closer than this do not tell two candidates apart: swapped colours cost CIFAR-10 networks 0.04
# on their own images, and foreign images can gain 0.026 by them.
SURER = 0.03
# More readings than this are not worth a scan each.
MOST = 5
# Images up to this many pixels are small: cheap, and usually trained with crops.
SMALL = 64 * 64


class Reached(Exception):
    """Ends a pass once it has come as far as it needs to."""


def decide(
    network: nn.Module, images: Tensor, said: Preprocess | None
) -> tuple[list[Preprocess], float, bool]:
    """The plausible normalisations, the likeliest first; the margin; whether a normalisation layer decided.

    `network` in evaluation mode; `images` uint8 [n 3 h w] in random order; `said`: the claim, first where it is
    plausible and last where it is not. The margin is the nearest rival's distance over the largest plausible one.
    """
    small = images.shape[2] * images.shape[3] <= SMALL
    # A first look at all, a closer one at those that it leaves.
    look, closer = (64, 512) if small else (32, 64)
    candidates = [c for c in CANDIDATES if not c.bgr]
    if said is not None:
        own = said.swapped() if said.bgr else said
        candidates = [own] + [c for c in candidates if c.gap(own) > SAME]
    scores = distances(network, images[:look], candidates)
    if not scores:
        return by_confidence(network, images[:look], said)
    absurd = said is not None and not math.isfinite(
        scores[candidates[0]]
    )  # no candidate, whatever the file says
    candidates = [c for c in candidates if math.isfinite(scores[c])]
    scores = {c: scores[c] for c in candidates}
    if not scores:
        raise Refused(
            "what the network's first layers make of these images are not finite numbers: it is broken."
        )
    swapped = distances(network, images[:look], [c.swapped() for c in candidates])
    if backwards(network, images[: 256 if small else look], scores, swapped, said):
        candidates, scores = list(swapped), swapped
    count = min(closer, len(images))
    if count > look:
        near = 3 * limit(scores, look)
        scores |= distances(network, images[:count], [c for c in candidates if scores[c] <= near])
    most = limit(scores, count)
    kept = sorted((c for c in candidates if scores[c] <= most), key=lambda c: scores[c])
    if said in kept:
        kept = [c for c in kept if c == said] + [c for c in kept if c.gap(candidates[0]) > BESIDE_CLAIM]
    rivals = [scores[c] for c in candidates if c != kept[0]]
    kept = kept[:MOST]
    if said is not None and not absurd and said not in kept:
        kept.append(said)
    return kept, min(rivals) / most, True


def limit(scores: Mapping[Preprocess, float], count: int) -> float:
    """The largest plausible distance, from all distances with `count` images."""
    least = min(scores.values())
    return (FOREIGN_FACTOR if least > FOREIGN else FACTOR) * least + SAMPLING / count


def backwards(
    network: nn.Module,
    images: Tensor,
    scores: Mapping[Preprocess, float],
    swapped: Mapping[Preprocess, float],
    said: Preprocess | None,
) -> bool:
    """Whether the network takes BGR: as claimed, or RGB without a claim, unless something speaks clearly against it.

    `scores` and `swapped`: distances in RGB and BGR. Most images are nearly grey to a first layer, so that the two are
    close; then the whole network tells, which is less sure of swapped colours if the images are of its kind.
    """
    best = min(scores, key=lambda c: scores[c])
    near, far = sorted((scores[best], min(swapped.values())))
    if far > OTHER_ORDER * near + SAMPLING / len(images):
        return near != scores[best]
    claimed = said is not None and said.bgr
    if near > FOREIGN:
        return claimed
    gain = confidence(network, images, best.swapped()) - confidence(network, images, best)
    return gain > SURER if not claimed else gain >= -SURER


def foreign(network: nn.Module, images: Tensor, preprocess: Preprocess) -> bool:
    """Whether the first normalisation layer shows that uint8 `images` [n 3 h w] are not of the training kind.

    Few images are often far by chance: with n of them, distances up to 0.7 / n were seen of a network's own kind.
    """
    most = FOREIGN + 1 / len(images)
    return any(distance > most for distance in distances(network, images, [preprocess]).values())


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


def by_confidence(
    network: nn.Module, images: Tensor, said: Preprocess | None
) -> tuple[list[Preprocess], float, bool]:
    """The claim; without one, those under which the network is surest of real images.

    Larger inputs make any network surer, so `raw255` counts only where under all others it is sure of nothing.
    """
    if said is not None:
        return [said], math.nan, False
    sure = {c: confidence(network, images, c) for c in CANDIDATES}
    pool = [c for c in sure if not c.raw255]
    if max(sure[c] for c in pool) < 0.5:
        pool = list(sure)
    best = max(sure[c] for c in pool)
    kept = sorted((c for c in pool if sure[c] >= best - SURER), key=lambda c: -sure[c])
    return kept[:MOST], math.nan, False


def confidence(network: nn.Module, images: Tensor, preprocess: Preprocess) -> float:
    """Mean of the largest probability, in (0, 1]."""
    with torch.no_grad():
        parts = [network(preprocess.normalise(part)).float().softmax(1).amax(1) for part in images.split(64)]
    return float(torch.cat(parts).mean())
