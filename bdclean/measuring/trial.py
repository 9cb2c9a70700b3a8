"""A trial: one model, the images it is measured on, and the reference classes its answers are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bdclean.measuring.folding import folded
from bdclean.measuring.intervals import upper_bound
from bdclean.measuring.predictor import Predictor
from bdclean.measuring.probe import Encoded
from bdclean.networks.classifier import Classifier
from bdclean.progress import Tell, quiet
from bdclean.training.parallel import shared
from bdclean.triggers.stamping import Stamp

PROBED = 2
"""Images that a folded network is checked with."""


def make_predictor(
    model: Classifier, device: torch.device, batch_size: int | None, images: Tensor
) -> Predictor:
    """Predictions of `model`, whose batch norms are folded away where that does not change its answers to `images`."""
    # 64 on a processor: what flows through a small network then stays in its caches (measured: 64 is best or as good
    # as any size, at 32 and at 224 pixels), and a large network needs little memory.
    size = batch_size or (1000 if device.type == "cuda" else 64)
    return Predictor(folded(model, images[:PROBED]), device, size)


LEVEL = 0.05


STAMPED_AT_ONCE = 1000
STAMPED_PIXELS = 1 << 22
"""Images, and pixels of them, that are stamped at once: a float picture takes twelve bytes a pixel, several times."""


SCREENED, SCREENED_OUT, SAME_IMAGES = "screening", "screened out", "same images"
LEAST_SCREENED = 200
"""Under this many images there is no screening, and everything is corrected over triggers and classes instead."""
MOST_TELLING = 300
"""So many images of each class are asked for at most, whatever the threshold."""
LEAST_SOURCE = 10
"""A source class with fewer images gets no rate of its own."""
MOVED_IMAGES, MOVED_BY, LEAST_STEADY = 100, 16, 0.6
"""Answers to so many images are asked again with the picture moved by a sixteenth of its side. Of 57 trained networks,
some for 60 steps, 0.74 and more stay; of seven with random filters and a fitted head 0.49 at most (tables/rule.md)."""


Target = int | str
"""A class, or "next": label + 1, all-to-all."""


Predict = Callable[[Tensor], Tensor]
"""Images uint8 [n c h w] -> classes int64 [n] on the CPU."""


@dataclass(frozen=True)
class Trial:
    """One model, the images it is measured on, and the reference classes that its answers are held against.

    `reference` are labels, or the suspect's clean predictions (`labeled` false); `clean` are this model's own clean
    predictions; both int64 [n]. `own_reference`: the reference is this very model's, so base rates say nothing.
    """

    predict: Predict
    images: Tensor
    reference: Tensor
    clean: Tensor
    classes: int
    labeled: bool
    own_reference: bool
    threshold: float
    seed: int
    tell: Tell = quiet
    readings: int = 1
    """How many normalisations are tried, of which the worst counts: what is tried is corrected for them, too."""
    encoded: Encoded | None = None
    """Of an encoder: its features, and the probes on them, of which `predict` is the first."""
    staying: float = 1.0
    """The share of its answers that stay when pictures move a little (see `staying_share`)."""
    counted: bool = True
    """Whether its answers are of a kind that was counted on networks without a backdoor: a classifier's or those of an
    encoder's first probe."""
    answers: dict[Stamp, dict[int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What is predicted under controls, by image: triggers of one mask and strength share theirs."""
    controls: dict[str, Sequence[Stamp]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The controls of triggers by their SPEC: those of a file are drawn once, and asked once for all its classes."""

    @property
    def steady(self) -> bool:
        """Whether most answers stay when pictures move a little: of a network that has hardly learnt its task they do
        not, and small patches change them as well."""
        return self.staying >= LEAST_STEADY


def staying_share(predict: Predict, images: Tensor, clean: Tensor) -> float:
    """The share of the answers `clean`, int64 [n], that stay when images uint8 [n c h w] move left and up, in [0, 1].

    By a sixteenth of their side, their far edges repeated. Asked of a seeded draw of MOVED_IMAGES, of all classes.
    """
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:MOVED_IMAGES]
    some, moved = images[drawn], []
    for side in (2, 3):
        by, size = max(1, some.shape[side] // MOVED_BY), some.shape[side]
        moved.append(predict(some.index_select(side, torch.arange(by, size + by).clamp(max=size - 1))))
    return float((torch.stack(moved) == clean[drawn]).float().mean())


def halves(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two seeded random halves of the indices 0..n-1: one for screening, one for measuring."""
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return shuffled[: n // 2], shuffled[n // 2 :]


def stamped_predictions(trial: Trial, stamp: Stamp, chosen: Tensor) -> Tensor:
    """Predictions, int64 [n], on the images `chosen` under `stamp`: a few at a time, for stamping takes many times
    the memory of the images, which may be more than fit."""
    if not len(chosen):
        return torch.zeros(0, dtype=torch.int64)

    def predicted(chosen: Tensor) -> Tensor:
        return torch.cat([trial.predict(stamped) for stamped in _stamped(trial, stamp, chosen)])

    # What an encoder's features remember must be the same in every process: they share out passes alone.
    return shared(predicted, chosen) if trial.encoded is None else predicted(chosen)


def stamped_features(trial: Trial, stamp: Stamp, chosen: Tensor) -> Tensor:
    """Features of length one, float32 [n d], of the images `chosen` of an encoder's trial under `stamp`."""
    assert trial.encoded is not None
    return torch.cat([trial.encoded.features(stamped) for stamped in _stamped(trial, stamp, chosen)])


def _stamped(trial: Trial, stamp: Stamp, chosen: Tensor) -> Iterator[Tensor]:
    few = max(1, min(STAMPED_AT_ONCE, STAMPED_PIXELS // trial.images[0, 0].numel()))
    return (stamp(trial.images[part]) for part in chosen.split(few))


def control_predictions(trial: Trial, control: Stamp, chosen: Tensor) -> Tensor:
    """The same, remembered: what a control does to an image is asked once, whatever triggers it stands beside."""
    known, wanted = trial.answers.setdefault(control, {}), chosen.tolist()
    missing = torch.tensor([k for k in wanted if k not in known], dtype=torch.int64)
    known.update(zip(missing.tolist(), stamped_predictions(trial, control, missing).tolist(), strict=True))
    return torch.tensor([known[k] for k in wanted], dtype=torch.int64)


def telling_images(threshold: float) -> int:
    """So many images of a class, all of which stay, say at LEVEL that under `threshold` of the class move."""
    return next((n for n in range(1, MOST_TELLING) if upper_bound(0, n, LEVEL) < threshold), MOST_TELLING)


def ranks(reference: Tensor) -> Tensor:
    """Of each image, how many of its class come before it: int64 [n]."""
    order = reference.argsort(stable=True)
    sizes = torch.bincount(reference)
    first = (sizes.cumsum(0) - sizes)[reference[order]]
    return torch.empty_like(order).index_copy(0, order, torch.arange(len(order)) - first)
