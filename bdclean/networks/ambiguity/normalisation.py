"""Which normalisation a network was trained with, from real images and the network itself.

Candidates are compared at the first normalisation layer in evaluation mode: under the right one, the statistics of real
images there look like the running ones. Later layers tell less, because errors average out on the way. Between those
that it leaves labels tell, where there are.

The rule was set on 72 stems (trained and random filters, CIFAR-10 statistics under each RGB candidate, with no
augmentation or with crops that leave black, mean-coloured or mirrored borders). With 200 and 500 test images of
CIFAR-10 the right one was plausible in all 72, alone in 63 and 72; with 64 images it was so in 70 and 56. Images from
elsewhere widen the set and can exclude the right one: with 500 of Tiny ImageNet it was plausible in 66 at twice the
least distance and in 68 at three times, with road signs in 53 and 64.

Without such a layer labels tell, else the network's answers: under the right normalisation they are spread over the
most classes. With 14 small networks without batch norm (VGGs and ViTs, trained on CIFAR-10 and road signs under five
normalisations), two draws of 128 images of their own kind each, the right one or one close to it was plausible in 28 of
28 and first in 25; with images of the other kind in 14 and 4. How sure a network is of its answers, in place of that,
kept it in 12 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from bdclean.data.labels.folders import labels_plausible
from bdclean.errors import Refused
from bdclean.networks.ambiguity.statistics import SMALL, answers, clearly_more, confidence, distances, spread
from bdclean.networks.normalisation import Preprocess, candidates_of

# A candidate is plausible up to this many times the least distance ...
FACTOR = 2.0
# ... plus this over the number of images, for the chance in a small draw.
SAMPLING = 0.1
# Where even the nearest is this far, the images are not of the training kind, and more is needed to rule one out.
FOREIGN, FOREIGN_FACTOR = 0.008, 3.0
# Two normalisations closer than this for every pixel, in the network's units (about 4 from black to white), are one.
SAME = 0.06
# One this close to another that fits is no rival of it: 6 % of the range. CIFAR-10's and CIFAR-100's are 0.22 apart: of
# 36 small networks (bench small-networks) they left four open, whose answers under both were the same on 87 to 98 % of
# the images.
BESIDE = 0.25
# Strongly coloured images show the order of channels in the first layer, where the other order is this much farther.
OTHER_ORDER = 4.0
# Mean top probabilities closer than this do not tell two candidates apart: swapped colours cost CIFAR-10 networks 0.04
# on their own images, and foreign images can gain 0.026 by them.
SURER = 0.03
# Without a normalisation layer: a candidate is plausible up to so much less entropy (nats) of the mean answer than the
# largest, if its answers tell one image from another at least by this share of what the most telling one's do.
SPREAD, TELLING = 0.15, 0.25


LAYER, LABELS, ANSWERS, NOTHING = "first normalisation layer", "labels", "spread of answers", "no evidence"
# More readings than this are not worth a scan each.
MOST = 5


def decide(
    network: nn.Module,
    images: Tensor,
    said: Preprocess | None,
    labels: Tensor | None = None,
    probabilities: bool = True,
) -> tuple[list[Preprocess], float, str]:
    """The plausible normalisations, the likeliest first; the margin; what decided: LAYER, LABELS, ANSWERS or NOTHING.

    `network` in evaluation mode; `images` uint8 [n c h w] in random order with their `labels` [n], if known; `said`:
    the claim, first where it is plausible and last where it is not. The margin is the nearest rival's distance over the
    largest plausible one, NaN without a normalisation layer. `probabilities`: false for an encoder, whose answers say
    nothing of pixels.
    """
    small = images.shape[2] * images.shape[3] <= SMALL
    # A first look at all, a closer one at those that it leaves.
    look, closer = (64, 512) if small else (32, 64)
    candidates = [c for c in candidates_of(images.shape[1]) if not c.bgr]
    if said is not None:
        own = said.swapped() if said.bgr else said
        candidates = [own] + [c for c in candidates if c.gap(own) > SAME]
    scores = distances(network, images[:look], candidates)
    if not scores:
        if not probabilities:
            return (
                ([said] if said is not None else apart(list(candidates_of(images.shape[1])))),
                math.nan,
                NOTHING,
            )
        return without_layer(network, images, said, labels)
    absurd = said is not None and not math.isfinite(
        scores[candidates[0]]
    )  # no candidate, whatever the file says
    candidates = [c for c in candidates if math.isfinite(scores[c])]
    scores = {c: scores[c] for c in candidates}
    if not scores:
        raise Refused(
            "what the network's first layers make of these images are not finite numbers: it is broken."
        )
    if images.shape[1] == 3:
        swapped = distances(network, images[:look], [c.swapped() for c in candidates])
        if backwards(network, images[: 256 if small else look], scores, swapped, said, probabilities):
            candidates, scores = list(swapped), swapped
    count = min(closer, len(images))
    if count > look:
        near = 3 * limit(scores, look)
        scores |= distances(network, images[:count], [c for c in candidates if scores[c] <= near])
    most = limit(scores, count)
    kept = sorted((c for c in candidates if scores[c] <= most), key=lambda c: scores[c])
    if said in kept:
        kept = [c for c in kept if c == said] + [c for c in kept if c.gap(candidates[0]) > BESIDE]
    rivals = [scores[c] for c in candidates if c != kept[0]]
    kept = kept[:MOST]
    if said is not None and not absurd and said not in kept:
        kept.append(said)
    if len(kept) > 1 and labels is not None and probabilities:
        told = by_labels(network, images, labels, kept, said)
        if told is not None and len(told) < len(kept):
            return told, min(rivals) / most, LABELS
    return kept, min(rivals) / most, LAYER


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
    probabilities: bool = True,
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
    if near > FOREIGN or not probabilities:
        return claimed
    gain = confidence(network, images, best.swapped()) - confidence(network, images, best)
    return gain > SURER if not claimed else gain >= -SURER


def without_layer(
    network: nn.Module, images: Tensor, said: Preprocess | None, labels: Tensor | None
) -> tuple[list[Preprocess], float, str]:
    """As `decide`, of a network without a normalisation layer that remembers: by labels, else the claim, else answers.

    A claim that labels speak clearly against is last of the plausible; labels on which the network does no better than
    chance tell nothing.
    """
    candidates = list(candidates_of(images.shape[1]))
    if said is not None:
        candidates = [said] + [c for c in candidates if c.gap(said) > BESIDE]
    kept = None if labels is None else by_labels(network, images, labels, candidates, said)
    if kept is not None:
        return kept, math.nan, LABELS
    if said is not None:
        return [said], math.nan, ANSWERS
    return by_answers(network, images[: looked_at(images)[0]], candidates), math.nan, ANSWERS


def looked_at(images: Tensor) -> tuple[int, int]:
    """How many of `images` [n c h w] a first look and a closer one take, without a normalisation layer."""
    return (128, 2048) if images.shape[2] * images.shape[3] <= SMALL else (32, 128)


def by_labels(
    network: nn.Module, images: Tensor, labels: Tensor, candidates: list[Preprocess], said: Preprocess | None
) -> list[Preprocess] | None:
    """The candidates that are not clearly less accurate than the best, which is first; None where labels tell nothing.

    A few of those that a first look leaves are tried on more images. The claim `said` is alone where it is as good as
    the best, and last where it is not.
    """
    left = candidates
    for count in looked_at(images):
        known = labels[:count]
        said_of = {c: answers(network, images[:count], c) for c in left}
        right = {c: said_of[c].argmax(1) == known for c in left}
        ranked = sorted(left, key=lambda c: -int(right[c].sum()))
        best = ranked[0]
        telling = labels_plausible(said_of[best].argmax(1), known, said_of[best].shape[1])
        if telling:
            ranked = [c for c in ranked if not clearly_more(right[best], right[c])]
        # With a claim the question is only whether another is better.
        left = apart(ranked) if said is None else [said, *(c for c in ranked if c != said)][: MOST - 1]
        if len(images) <= count:
            break
    if not telling:
        return None
    if said is None:
        return left
    return [said] if said in ranked else [*apart(ranked)[: MOST - 1], said]


def by_answers(network: nn.Module, images: Tensor, candidates: list[Preprocess]) -> list[Preprocess]:
    """The candidates under which the network's answers to `images` are spread over the most classes."""
    found = {c: spread(network, images, c) for c in candidates}
    most = max((told for _, told in found.values() if math.isfinite(told)), default=math.nan)
    wide = {c: width for c, (width, told) in found.items() if told >= TELLING * most}
    if not wide:
        raise Refused("the network's answers to these images are not finite numbers: it is broken.")
    least = max(wide.values()) - SPREAD
    return apart(sorted((c for c in wide if wide[c] >= least), key=lambda c: -wide[c]))


def apart(candidates: list[Preprocess]) -> list[Preprocess]:
    """The first MOST of `candidates` that are not close to one before them."""
    kept: list[Preprocess] = []
    for candidate in candidates:
        if all(candidate.gap(other) > BESIDE for other in kept):
            kept.append(candidate)
    return kept[:MOST]
