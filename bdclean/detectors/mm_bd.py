"""MM-BD: does some class reach a far larger margin than the others, whatever the input? (Wang et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bdclean.errors import Refused, UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.training.inversion import PIXELS, Detected, chunks
from bdclean.training.loop import Batch, Measures, State, fit
from bdclean.training.run import Run

LEVEL = 0.05
"""The published threshold of the p-value."""
LEAST_CLASSES, MOST_CLASSES = 3, 200
"""Of two classes neither margin is one among others; of many the search takes minutes."""
RATE = 0.1
"""Adam's learning rate, of pixels in [0, 1], in the first step; it falls to a tenth."""


@dataclass(frozen=True)
class MMBD:
    """Searches, for each class, the input with the largest margin over all other classes, and tells the odd one out.

    What it does: climbs the margin of each class from noise, within the range of pixels; an order statistic tells how
    odd the largest of the classes' margins is under an exponential law fitted to the others.
    When to use it: first, for any kind of trigger: it needs no form of it.
    What it needs: no images; three classes or more, 200 at most; seconds for ten classes of a small network.
    Known limits: margins of clean networks differ between classes as well, so that the published level cries wolf: the
    p-value that counts is that among clean networks. A backdoor of every class, or one that was hidden from it, is not
    found.

    After MM-BD (Wang et al. 2024, IEEE S&P, arXiv 2205.06900). Departures: Adam from `starts` points for `steps` steps
    in place of gradient descent with momentum until it no longer rises from many more; all classes in one batch; the
    exponential law begins at the least of the other margins.
    """

    name: ClassVar[str] = "mm-bd"
    source: ClassVar[str] = "MM-BD (Wang et al. 2024, arXiv 2205.06900)"

    starts: int = 4
    steps: int = 60

    def __post_init__(self) -> None:
        if self.starts < 1 or self.steps < 1:
            raise UsageError("mm-bd: starts and steps are positive.")

    def __call__(self, suspect: Classifier, arch: Arch, images: Tensor, run: Run) -> Detected:
        """One finding; of `images` uint8 [n c h w] nothing but their shape is used.

        Its statistic is -log10 of the order statistic's p-value. Raises Refused for too few or too many classes.
        """
        if not LEAST_CLASSES <= arch.classes <= MOST_CLASSES:
            raise Refused(
                f"the network has {arch.classes} classes: mm-bd compares {LEAST_CLASSES} to {MOST_CLASSES} of them."
            )
        margins = self._margins(suspect.eval(), arch.classes, images.shape[1:], run)
        if not margins.isfinite().all():
            raise Refused("the network's largest margins are not all finite numbers.")
        target = int(margins.argmax())
        exponent = order_statistic(margins)
        return Detected([self._finding(margins, target, exponent)], statistic=exponent)

    def _margins(self, suspect: Classifier, classes: int, shape: tuple[int, ...], run: Run) -> Tensor:
        """The largest margin of each class that was met, in logits [classes]."""
        drawn = (classes * self.starts, *shape)
        points = _Points(torch.rand(drawn, generator=run.generator(self.name), device=run.device), classes)
        targets = torch.arange(classes, device=run.device).repeat_interleave(self.starts)
        optimiser = torch.optim.Adam(points.parameters(), RATE)
        at_once = max(1, PIXELS // math.prod(shape[1:]))

        def step(batch: Batch) -> tuple[None, Measures]:
            optimiser.zero_grad()
            reached = points.best.new_empty(len(targets))
            for rows in chunks(len(targets), at_once):
                rows = rows.to(run.device)
                margin = margins_of(run.forward(suspect, points.pixels[rows]).float(), targets[rows])
                # only the pixels' gradients: the network's own weights get none
                (-margin.sum()).backward(inputs=[points.pixels])
                reached[rows] = margin.detach()
            points.note(reached)
            optimiser.step()
            with torch.no_grad():
                points.pixels.clamp_(0, 1)
            return None, {"margin": reached.mean()}

        # `fit` shows images, of which this search needs none
        state = State(
            self.name, points, optimiser, torch.zeros((1, 3, 1, 1), dtype=torch.uint8), None, 1, self.steps,
            lambda at: RATE * (1 - 0.9 * at / self.steps),
        )  # fmt: skip
        fit(step, state, run)
        return points.best

    def _finding(self, margins: Tensor, target: int, exponent: float) -> dict[str, Any]:
        others = torch.cat([margins[:target], margins[target + 1 :]])
        return {
            "detector": self.name,
            "verdict": "outlier" if exponent > -math.log10(LEVEL) else "no-outlier",
            "score": exponent,
            "threshold": -math.log10(LEVEL),
            "odd": "above",
            "reason": f"the largest margin of class {target} is {margins[target]:.1f}, those of the others "
            f"{others.min():.1f} to {others.max():.1f} (-log10 of the order statistic's p-value {exponent:.2f})",
        }


class _Points(nn.Module):
    """The inputs that climb, float [classes*starts c h w] in [0, 1], and the best margin of each class so far."""

    best: Tensor

    def __init__(self, pixels: Tensor, classes: int) -> None:
        super().__init__()
        self.pixels = nn.Parameter(pixels)
        self.register_buffer("best", pixels.new_full((classes,), torch.finfo(pixels.dtype).min))

    def note(self, reached: Tensor) -> None:
        torch.maximum(self.best, reached.view(len(self.best), -1).amax(1), out=self.best)


def margins_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Logit of the target less the largest other one, [n], of `logits` [n classes] and `targets` [n]."""
    own = logits.gather(1, targets[:, None]).squeeze(1)
    return own - logits.scatter(1, targets[:, None], -math.inf).amax(1)


def order_statistic(margins: Tensor) -> float:
    """-log10 of the chance that the largest of so many margins [k >= 3] is this large, in [0, inf).

    All but the largest are taken for draws of an exponential law that begins at the least of them.
    """
    ordered = margins.double().sort().values
    others = ordered[:-1]
    mean = float((others - others[0]).mean())
    if mean <= 0:
        return 0.0
    # P(the largest of k <= x) = F(x)^k, and 1 - F(x) = exp(-rate): where that is small, k exp(-rate) without rounding
    rate = float(ordered[-1] - others[0]) / mean
    if rate > 30:
        return (rate - math.log(len(ordered))) / math.log(10)
    return max(0.0, -math.log10(-math.expm1(len(ordered) * math.log1p(-math.exp(-rate)))))
