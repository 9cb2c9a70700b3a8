"""Rates, always with n and an interval, and the scores made of them. Only `Predictor` runs a network."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor, nn

from bdclean.errors import Refused, out_of_memory
from bdclean.memory import keep_freed_memory
from bdclean.record import Measure, Rate


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 is float32 inside, on devices that would round factors to fewer bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@dataclass
class Predictor:
    """Class predictions of `model`, in float32 without TF32. Out of memory halves the batch and tries again.

    The model's weights are laid out with channels last, which is what its images are.
    """

    model: nn.Module
    device: torch.device
    batch_size: int = 250

    def __post_init__(self) -> None:
        self.model = self.model.to(memory_format=torch.channels_last)
        if self.device.type == "cpu":
            keep_freed_memory()

    def __call__(self, images: Tensor) -> Tensor:
        """`images` uint8 [n 3 h w] -> int64 [n] on the CPU. Raises Refused for answers that are no numbers."""
        # room for all answers first: each one kept between large temporaries would let the heap grow by a temporary
        found, first = torch.empty(len(images), dtype=torch.int64, device=self.device), 0
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        with torch.inference_mode(), without_tf32():
            while first < len(images):
                batch = images[first : first + self.batch_size].to(self.device)
                try:
                    logits = self.model(batch.contiguous(memory_format=torch.channels_last))
                    found[first : first + len(batch)] = logits.argmax(dim=1)
                    finite &= logits.isfinite().all()
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    if self.batch_size == 1:
                        raise Refused(
                            "out of memory with a single image: use a larger device or --device cpu."
                        ) from None
                    self.batch_size = max(1, min(self.batch_size, len(batch)) // 2)
                    continue
                first += len(batch)
        # Read back once: a device that is read after every batch waits for the next one.
        if not finite:
            raise Refused(
                "the network's answers to these images are not all finite numbers: nothing can be said of it. "
                "If its normalisation was given with --preprocess, try another."
            )
        return found.cpu()


def wilson(hits: int, n: int, level: float = 0.05) -> tuple[float | None, float | None]:
    """The two-sided Wilson score interval of `hits` in `n`, for rates that are shown; (None, None) for n = 0."""
    if n == 0:
        return None, None
    z = float(stats.norm.isf(level / 2))
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def lower_bound(hits: int, n: int, level: float) -> float:
    """The exact (Clopper-Pearson) one-sided lower bound at confidence 1 - level; 0 for n = 0."""
    return 0.0 if hits == 0 else float(stats.beta.ppf(level, hits, n - hits + 1))


@functools.lru_cache(1 << 14)  # asked for each of many classes, most of which have the same counts
def upper_bound(hits: int, n: int, level: float) -> float:
    """The exact (Clopper-Pearson) one-sided upper bound at confidence 1 - level; 1 for n = 0."""
    return 1.0 if hits == n else float(stats.beta.isf(level, hits + 1, n - hits))


def rate(hits: Tensor) -> Rate:
    """The share of true values in `hits` (bool [n]) with its 95 % Wilson interval; a null value for n = 0."""
    n, k = len(hits), int(hits.sum())
    low, high = wilson(k, n)
    return Rate(k / n if n else None, n, low, high)


def measure(name: str, hits: Tensor) -> Measure:
    found = rate(hits)
    return Measure(name, found.value, found.n, found.low, found.high)


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


def paired_difference(before: Tensor, after: Tensor, name: str) -> Measure:
    """Mean of after - before of two bool [n] outcomes on the same images, in [-1, 1], with a 95 % paired interval.

    The interval is the adjusted Wald one of Bonett and Price (2012): half an image is added to each kind of change.
    """
    n = len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    if n == 0:
        return Measure(name)
    p_gained, p_lost = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre = p_gained - p_lost
    half = 1.96 * math.sqrt((p_gained + p_lost - centre**2) / (n + 2))
    return Measure(name, (gained - lost) / n, n, max(-1.0, centre - half), min(1.0, centre + half))


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
