"""Rates, always with n and an interval, and the scores made of them. Only `Predictor` runs a network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bdclean.measuring.intervals import measure, rate, wilson
from bdclean.record.run import Measure


def attack_success(stamped: Tensor, reference: Tensor, target: int | str, classes: int) -> Tensor:
    """Whether each stamped image whose reference class is not the target is predicted as the target: bool [m], m <= n.

    `target` is a class, or "next" for reference + 1 modulo `classes`.
    """
    if target == "next":
        return stamped == (reference + 1) % classes
    wanted = torch.full_like(reference, int(target))
    counted = reference != wanted
    return stamped[counted] == wanted[counted]


def accuracy(predictions: Tensor, labels: Tensor) -> list[Measure]:
    """clean_accuracy, class_mean_accuracy and worst_class_accuracy of int64 [n] predictions.

    The class mean's interval is the normal one of a stratified mean (a class of one image is taken to vary as all
    images do); the worst class's is Wilson at 0.05 over classes.
    """
    correct = predictions == labels
    present = labels.unique()
    rates = [rate(correct[labels == k]) for k in present.tolist()]
    mean = sum(r.value or 0.0 for r in rates) / max(1, len(rates))
    overall = float(correct.float().mean()) if len(correct) else 0.0
    spreads = [((r.value or 0.0) * (1 - (r.value or 0.0)), r.n) for r in rates]
    variances = [spread / (n - 1) if n > 1 else overall * (1 - overall) for spread, n in spreads]
    variance = sum(variances) / max(1, len(rates)) ** 2
    half = 1.96 * math.sqrt(variance)
    worst = min(rates, key=lambda r: r.value or 0.0)
    hits = round((worst.value or 0.0) * worst.n)
    low, high = wilson(hits, worst.n, 0.05 / max(1, len(rates)))
    return [
        measure("clean_accuracy", correct),
        Measure("class_mean_accuracy", mean, len(labels), max(0.0, mean - half), min(1.0, mean + half)),
        Measure("worst_class_accuracy", worst.value, worst.n, low, high),
    ]


def defence_effectiveness(
    accuracy_before: float, accuracy_after: float, asr_before: float, asr_after: float
) -> float:
    """DER in [0, 1] (Zhu et al. 2023): 1 removes a perfect attack at no cost in accuracy, 0.5 changes nothing."""
    return (max(0.0, asr_before - asr_after) - max(0.0, accuracy_before - accuracy_after) + 1) / 2


def balanced_score(
    accuracy_before: float, accuracy_after: float, excess_before: float, excess_after: float
) -> float | None:
    """Harmonic mean of retained accuracy and removed excess ASR, in [0, 1]; bdclean's own definition.

    `excess_*` is ASR minus the model's own floor (base rate). None where the suspect's excess is under 0.2.
    """
    if excess_before < 0.2 or accuracy_before <= 0:
        return None
    retained = min(1.0, accuracy_after / accuracy_before)
    removed = min(1.0, max(0.0, 1 - excess_after / excess_before))
    return 0.0 if retained + removed == 0 else 2 * retained * removed / (retained + removed)
