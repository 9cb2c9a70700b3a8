"""A map of an encoder's features for the page: images as given and stamped, on the two axes of clean ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bdclean.measuring.pictures import chosen
from bdclean.measuring.trial import Trial
from bdclean.record.run import FeatureMap, MappedFeatures, TriggerRow
from bdclean.triggers.stamping import Trigger

SHOWN = 120
"""Images of a map, a seeded draw; each is there as given and stamped."""
FITTED = 1000
"""Clean images that the axes are fitted to, at most."""


def feature_map(
    rows: Sequence[TriggerRow], triggers: Sequence[Trigger], suspect: Trial, cleansed: Trial | None = None
) -> FeatureMap | None:
    """The map of the worst of `rows`; None for a classifier, or where no row was measured.

    Each encoder has axes of its own, since another encoder's features are other numbers; those of the cleansed one are
    turned so that its clean images lie as the suspect's do.
    """
    worst = next(iter(chosen(rows)), None)
    if suspect.encoded is None or worst is None:
        return None
    trigger = next(trigger for trigger in triggers if trigger.spec() == worst.trigger)
    drawn = torch.randperm(len(suspect.images), generator=torch.Generator().manual_seed(suspect.seed))
    models: list[MappedFeatures] = []
    seen: Tensor | None = None
    for name, trial in (("suspect", suspect), ("cleansed", cleansed)):
        if trial is None or trial.encoded is None:  # a cleansed one with a new head is no encoder any more
            continue
        clean, stamped, explained = _mapped(trial, trigger, drawn)
        if seen is None:
            seen = clean
        else:
            turn = alignment(clean, seen)
            clean, stamped = clean @ turn, stamped @ turn
        models.append(MappedFeatures(name, round(explained, 4), _rounded(clean), _rounded(stamped)))
    grouping = "labels" if suspect.labeled else "answers" if suspect.encoded.probing.labeled else "clusters"
    groups = suspect.reference[drawn[:SHOWN]].tolist()
    return FeatureMap(worst.trigger, worst.target, grouping, groups, models)


def principal_axes(features: Tensor) -> tuple[Tensor, Tensor, float]:
    """The mean of `features` [n d], the two axes [d 2] of most variance, and the share of it along them.

    The sign of an axis is arbitrary; here its largest entry is positive. Of a single feature the second axis is zero.
    """
    known = features.double()
    mean = known.mean(0)
    _, spread, directions = torch.linalg.svd(known - mean, full_matrices=False)
    axes = known.new_zeros(known.shape[1], 2)
    axes[:, : len(directions)] = directions[:2].T
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    variance = spread.square()
    return mean, axes * largest.sign(), float(variance[:2].sum() / variance.sum().clamp_min(1e-12))


def alignment(points: Tensor, onto: Tensor) -> Tensor:
    """The rotation or reflection [2 2] after which `points` [n 2] are nearest to `onto` [n 2] (Schoenemann 1966)."""
    left, _, right = torch.linalg.svd(points.T @ onto)
    return left @ right


def _mapped(trial: Trial, trigger: Trigger, drawn: Tensor) -> tuple[Tensor, Tensor, float]:
    """Places [n 2] of the first SHOWN images of `drawn`, as given and stamped, and what the axes explain."""
    assert trial.encoded is not None
    known = trial.encoded.features(trial.images)
    mean, axes, explained = principal_axes(known[drawn[:FITTED]])
    stamped = trial.encoded.features.fresh(trigger(trial.images[drawn[:SHOWN]]))
    clean = known[drawn[:SHOWN]].double()
    return (clean - mean) @ axes, (stamped.double() - mean) @ axes, explained


def _rounded(points: Tensor) -> list[list[float]]:
    return [[round(x, 4), round(y, 4)] for x, y in points.tolist()]
