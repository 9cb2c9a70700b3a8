"""How a file is read where several networks have its tensors: shapes show no stride, activation or size.

A wrong stride, shortcut, pooling or activation shifts what reaches the layers behind it. So candidates are compared by
the statistics that batch norm kept from training, and, with labels, by accuracy. Where many labels find two as right as
one another, the one that finds them likelier is taken, and said. Where nothing tells, nothing is guessed: candidates
that people really use side by side (peers) must be clearly apart, while variants that nobody names (`Arch.unusual`:
another activation, no pool behind the stem) speak up only where they fit clearly better, and are only believed on
images of the training kind.

The rule was set on small networks of each kind trained on road signs, and given images that they were not
trained on, with and without labels, and CIFAR-10's: `python -m bdclean.bench readings` counts right, refused and wrong.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.networks.ambiguity.choosing import Choice
from bdclean.networks.ambiguity.statistics import clearly_more, layer_distance
from bdclean.networks.arch import Arch
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.networks.families import known
from bdclean.networks.recognition.variants import SIZED, keeps_resolution

# One candidate suits its weights better than another where that one's distance is this many times as large.
RATIO = 1.5
# Above this distance not even the best candidate looks like what the network was trained on.
SURPRISE = 0.5
# Up to this distance images are of the training kind (0.006 to 0.04 was seen on held-out images, 0.06 and more on
# others).
GOOD = 0.05
# Up to this side images are small: cheap, and networks for them have stems of their own.
SMALL = 64
# Labeled images that candidates which the first ones do not part are held against: 2,048 of 32 x 32.
MORE_IMAGES, MORE_PIXELS = 128, 1 << 21
# So many labeled images that leave two candidates as right as one another say that it hardly matters which it is.
MANY_LABELS = 200
# Other candidates in a record.
SHOWN = 4


@dataclass(frozen=True)
class Fit:
    """How `arch` suits its own weights on real images.

    `distance`: >= 0, mean over batch norm layers of `layer_distance`, 0 where all statistics are as in training; None
    without such layers. `right`: which images it labels correctly [n], `surprise`: the labels' mean cross-entropy, in
    nats; None without labels, and the second where some are none of its classes.
    """

    arch: Arch
    distance: float | None
    right: Tensor | None
    surprise: float | None = None


@dataclass(frozen=True)
class Reading:
    """How a file is read: the architecture that was chosen, the others with reasons, and how much worse the next is.

    `margin`: the next one's distance over the chosen one's; below 1 where it fits better but was not believed. `doubt`:
    a sentence where nothing parts the likeliest.
    """

    arch: Arch
    others: list[dict[str, Any]]
    margin: float | None
    doubt: str | None = None
    warning: str | None = None
    # Those that the images do not part from the chosen one.
    rivals: tuple[Arch, ...] = ()


def fit(checkpoint: Checkpoint, arch: Arch, choice: Choice, images: Tensor, labels: Tensor | None) -> Fit:
    """How `arch` suits the checkpoint's weights on `images`, uint8 [n c h w]."""
    model = Classifier(checkpoint.build("cpu", arch), choice.preprocess).eval()
    found: list[float] = []

    def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        x, axes = arguments[0].float(), [k for k in range(arguments[0].ndim) if k != 1]
        found.append(layer_distance(x.mean(axes), x.var(axes, unbiased=False), layer))

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.register_forward_pre_hook(hook)
    with torch.inference_mode():
        logits = model(images)
    return told_by(Fit(arch, sum(found) / len(found) if found else None, None), logits, labels)


def told_by(one: Fit, logits: Tensor, labels: Tensor | None) -> Fit:
    """`one` with what `logits` [n k] say of `labels` [n], which may be of other classes; encoders have none."""
    if labels is None:
        return one
    known = bool(((labels >= 0) & (labels < logits.shape[1])).all())
    surprise = float(F.cross_entropy(logits.float(), labels)) if known else None
    return replace(one, right=logits.argmax(1) == labels, surprise=surprise)


def better(one: Fit, other: Fit) -> bool:
    """Whether `one` clearly suits the weights more than `other`: by statistics, else by accuracy."""
    if one.distance is not None and other.distance is not None and other.distance > RATIO * one.distance:
        return not more_accurate(other, one)
    return more_accurate(one, other)


def more_accurate(one: Fit, other: Fit) -> bool:
    """Whether `one` is right more often on the same images than chance explains."""
    return one.right is not None and other.right is not None and clearly_more(one.right, other.right)


def more_surprised(one: Fit, other: Fit) -> bool:
    """Whether `one` finds the labels less likely than `other` does."""
    return one.surprise is not None and other.surprise is not None and one.surprise > other.surprise


def sample(images: Tensor, labels: Tensor | None, more: bool = False) -> tuple[Tensor, Tensor | None]:
    """A seeded draw: 256 images, 16 of large ones (a folder is read class by class, so the first would be of one).

    `more`: up to MORE_PIXELS of them, at least MORE_IMAGES.
    """
    count = 256 if images.shape[2] <= SMALL else 16
    if more:
        count = max(MORE_IMAGES, MORE_PIXELS // images[0, 0].numel())
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return images[drawn], None if labels is None else labels[drawn]


def read_off(
    checkpoint: Checkpoint, choice: Choice, images: Tensor, labels: Tensor | None, settled: bool
) -> Reading:
    """The candidate that suits its weights, or a doubt. `settled`: the user has said which it is."""
    candidates = checkpoint.candidates
    if len(candidates) < 2 or settled:
        return Reading(checkpoint.arch, [], None)
    if checkpoint.arch.kind == "encoder":
        labels = None  # no answers to hold against them
    few, few_labels = sample(images, labels)
    first = fit(checkpoint, candidates[0], choice, few, few_labels)
    # Without batch norm or labels nothing tells an activation: such variants cannot contradict the usual network.
    told = first.distance is not None or labels is not None
    tried = [first]
    for arch in candidates[1:]:
        if (arch.unusual and not told) or (images.shape[2] > SMALL and keeps_resolution(arch)):
            continue
        # With another stem some networks cannot be run at all: their windows do not fit.
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            tried.append(fit(checkpoint, arch, choice, few, few_labels))
    reading = most_fitting(tried, told)
    if reading.rivals and labels is not None:
        reading = with_more(checkpoint, choice, sample(images, labels, more=True), tried, reading, told)
    names = {row.name for row in known.table()}
    if (
        told
        or reading.doubt
        or checkpoint.arch.kind == "encoder"
        or SIZED.sub("", reading.arch.name) in names
        or not any(a.unusual for a in candidates)
    ):
        return reading
    unseen = (
        f"without batch norm and labels nothing tells whether {reading.arch.name} is the right reading or "
        f"one with another activation ({candidates[-1].name}, ...): labeled images, or --arch, would."
    )
    return replace(reading, warning=unseen)


def again(checkpoint: Checkpoint, one: Fit, choice: Choice, images: Tensor, labels: Tensor) -> Fit:
    """`one` by other labeled `images`; a few at a time, so that many fit."""
    model = Classifier(checkpoint.build("cpu", one.arch), choice.preprocess).eval()
    with torch.inference_mode():
        return told_by(one, torch.cat([model(part) for part in images.split(64)]), labels)


def with_more(
    checkpoint: Checkpoint,
    choice: Choice,
    sampled: tuple[Tensor, Tensor | None],
    tried: Sequence[Fit],
    reading: Reading,
    told: bool,
) -> Reading:
    """`reading` of `tried` again, where those that it left are right on more labeled images or not."""
    images, labels = sampled
    assert labels is not None
    left = [one for one in tried if one.arch in (reading.arch, *reading.rivals)]
    if any(
        one.right is None or len(one.right) < len(images) for one in left
    ):  # else these are the same images
        left = [again(checkpoint, one, choice, images, labels) for one in left]
    decided = likelier(left, most_fitting(left, told))
    first = next(one for one in tried if one.arch == decided.arch)
    rest = sorted((f for f in tried if f.arch not in [one.arch for one in left]), key=unlikeliness)
    others = [*decided.others, *({"name": f.arch.name, "reason": why(f, first)} for f in rest)]
    return replace(decided, others=others[:SHOWN])


def likelier(left: Sequence[Fit], reading: Reading) -> Reading:
    """`reading` of `left` without its doubt, where MANY_LABELS find its candidates as right as one another."""
    if not reading.rivals:
        return reading
    alike = [one for one in left if one.arch in (reading.arch, *reading.rivals)]
    best = min(alike, key=lambda one: math.inf if one.surprise is None else one.surprise)
    # Labels that even the best finds no likelier than chance are others than the network's.
    if best.right is None or best.surprise is None or len(best.right) < MANY_LABELS:
        return reading
    if not best.surprise < math.log(best.arch.classes):
        return reading
    others = [one for one in alike if one is not best]
    rights = " and ".join(f"{100 * accuracy(one):.1f} %" for one in others)
    warning = (
        f"{best.arch.name} is taken, which finds {len(best.right):,} labels likeliest and is right on "
        f"{100 * accuracy(best):.1f} % of them; {' and '.join(one.arch.name for one in others)} (--arch) would be on "
        f"{rights}."
    )
    listed = [{"name": one.arch.name, "reason": why(one, best)} for one in others]
    return replace(reading, arch=best.arch, others=listed, doubt=None, warning=warning, rivals=())


def most_fitting(tried: Sequence[Fit], told: bool) -> Reading:
    """The best of `tried`, the usual one first, or a doubt. `told`: whether anything could part them."""
    # Variants that nobody names stand back unless they are clearly better than all that people use.
    peers = [f for f in tried if not f.arch.unusual] or list(tried)
    unbeaten = [p for p in peers if not any(better(o, p) for o in peers)] or peers
    usual = best = min(unbeaten, key=unlikeliness)
    against = [f for f in tried if f not in peers and better(f, usual)]
    # A repair moves statistics, too, and labels are what a reading is for.
    if against and all(more_surprised(f, usual) and not more_accurate(f, usual) for f in against):
        rivals = [*against, *(f for f in peers if f is not best and not better(best, f))]
    elif against:
        best = min(against, key=unlikeliness)
        rivals = [f for f in tried if f is not best and not better(best, f)]
        # Images of another kind shift all statistics, and can favour a candidate that is wrong.
        if best.distance is not None and best.distance > GOOD and usual not in rivals:
            rivals.insert(0, usual)
    else:
        rivals = [f for f in peers if f is not best and not better(best, f)]
    others = sorted((f for f in tried if f is not best), key=lambda f: (f not in rivals, unlikeliness(f)))
    listed = [{"name": f.arch.name, "reason": why(f, best)} for f in others[:SHOWN]]
    margin = None
    if best.distance is not None and others:
        least = min(f.distance for f in others if f.distance is not None)
        margin = least / max(best.distance, 1e-9)
    doubt = warning = None
    if rivals:
        names = " and ".join([best.arch.name, *(f.arch.name for f in rivals[:3])])
        how = f"do not part them{f' (ratio {margin:.2f})' if margin is not None else ''}"
        if not told and best.arch.kind == "classifier":
            how += "; labeled images might"
        doubt = f"{names} fit these tensors alike, and the images {how}: pass --arch to say which it is."
    if best.distance is not None and best.distance > SURPRISE:
        warning = (
            f"these images do not look like what {best.arch.name} was trained on (its statistics are off by "
            f"{best.distance:.2g}): they are of another kind, or it is another architecture."
        )
    return Reading(best.arch, listed, margin, doubt, warning, tuple(f.arch for f in rivals))


def accuracy(fit: Fit) -> float:
    """Share of images labeled correctly; 0 without labels."""
    return float(fit.right.float().mean()) if fit.right is not None else 0.0


def unlikeliness(fit: Fit) -> float:
    """Least for the likeliest: the distance, else accuracy as a negative number."""
    return fit.distance if fit.distance is not None else -accuracy(fit)


def why(fit: Fit, best: Fit) -> str:
    """What a record says of another candidate."""
    parts = []
    if fit.distance is not None and best.distance is not None:
        parts.append(f"its statistics are off by {fit.distance:.3g}, the chosen one's by {best.distance:.3g}")
    if fit.right is not None and best.right is not None:
        parts.append(f"{accuracy(fit):.1%} of the labels, the chosen one {accuracy(best):.1%}")
    return "fits the same tensors; " + ("; ".join(parts) or "nothing here tells the two apart")
