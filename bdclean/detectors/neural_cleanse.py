"""Neural Cleanse as published: the smallest mask and pattern for each class, and the anomaly index of the least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.errors import Refused, UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.training.forms import Form, mask
from bdclean.training.inversion import PIXELS, Detected, chunks
from bdclean.training.loop import Batch, Measures, State, fit
from bdclean.training.run import Run

THRESHOLD = 2.0
"""The published anomaly index above which a class is flagged."""
SUCCESS, ON_AVERAGE = 0.99, 0.94
"""The success rate on a batch at which a mask counts and the weight on its size is raised, and that of the steps up to
it, without which a batch may be luck."""
WEIGHT, UP, DOWN, PATIENCE = 1e-3, 2.0, 2.0**1.5, 5
"""The weight on the mask's L1 norm at first, by how much it is raised and lowered, and after how many steps alike."""
RATE = 0.1
CONSISTENT = 1.4826
"""Makes the median absolute deviation a standard deviation, of a normal law."""
LEAST_CLASSES, LEAST_IMAGES = 3, 32


@dataclass(frozen=True)
class NeuralCleanse:
    """Fits the smallest mask and pattern that send images to each class; how far below the median is the least?

    What it does: minimises the cross-entropy towards the class plus a weight on the mask's L1 norm, the weight raised
    while 99 % of the images follow and lowered otherwise; the anomaly index is (median - least) / (1.4826 * MAD).
    When to use it: to compare with the literature, and for small patches. `inversion` looks for more forms.
    What it needs: 32 images or more, without labels; three classes or more; a minute for ten classes of a small network
    on a processor, more with every class.
    Known limits: at the published index of 2 others counted a third of clean networks as flagged (2605.04209): the
    p-value that counts is that among clean networks, of which none are shipped yet. Large, faint and moving triggers
    are not found.

    After Neural Cleanse (Wang et al. 2019, IEEE S&P), by its code's settings. Departures: all classes in one batch and
    on the same images; a fixed number of steps, after each of which the weight is turned, in place of up to a thousand
    rounds over the images with an early stop; a mask counts that sends a whole batch; masks by a sigmoid in place of a
    scaled tanh; a deviation is a hundredth of the median at least.
    """

    name: ClassVar[str] = "neural-cleanse"
    source: ClassVar[str] = "Neural Cleanse (Wang et al. 2019, IEEE S&P)"

    steps: int = 100
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError("neural-cleanse: steps and batch_size are positive.")

    def __call__(self, suspect: Classifier, arch: Arch, images: Tensor, run: Run) -> Detected:
        """One finding on `images` uint8 [n 3 h w], its anomaly index the score and the statistic.

        Raises Refused for too few images or classes, and where no two masks differ.
        """
        if arch.classes < LEAST_CLASSES:
            raise Refused(
                f"the network has {arch.classes} classes: the least mask is one among three or more."
            )
        if len(images) < LEAST_IMAGES:
            raise Refused(f"{len(images)} images are too few: give {LEAST_IMAGES} or more.")
        channels, height, width = images.shape[1:]
        form = mask(height, width, channels)
        fitted = self._fit(suspect.eval(), form, arch.classes, images, run)
        sizes = form.sizes(fitted.smallest)
        target = int(sizes.argmin())
        index = anomaly_index(sizes)
        found = Detected([self._finding(sizes, target, index)], statistic=index)
        found.pictures[f"mask of class {target} (neural-cleanse), on grey"] = form.picture(
            fitted.smallest[target]
        )
        return found

    def _fit(self, suspect: Classifier, form: Form, classes: int, images: Tensor, run: Run) -> _Fitted:
        generator = run.generator(self.name, "start")
        fitted = _Fitted(torch.randn((classes, *form.shape), generator=generator, device=run.device))
        optimiser = torch.optim.Adam(fitted.parameters(), RATE, betas=(0.5, 0.9))
        targets = torch.arange(classes, device=run.device)

        def step(batch: Batch) -> tuple[None, Measures]:
            optimiser.zero_grad()
            pixels, rate = batch.images.float() / 255, torch.zeros_like(fitted.success)
            for rows in chunks(classes, max(1, PIXELS // pixels[:, 0].numel())):
                rows = rows.to(run.device)
                changes = fitted.changes[rows]
                logits = run.forward(suspect, form.stamp(changes, pixels).flatten(0, 1)).float()
                aims = targets[rows].repeat_interleave(len(pixels))
                losses = F.cross_entropy(logits, aims, reduction="none").view(len(rows), -1).mean(1)
                # only the masks' gradients: the network's own weights get none
                (losses + fitted.weights[rows] * form.sizes(changes)).sum().backward(inputs=[fitted.changes])
                rate[rows] = (logits.argmax(1) == aims).float().view(len(rows), -1).mean(1)
            fitted.note(form.sizes(fitted.changes.detach()), rate)
            optimiser.step()
            return None, {"success": rate.mean()}

        state = State(self.name, fitted, optimiser, images, None, self.batch_size, self.steps)
        fit(step, state, run)
        return fitted

    def _finding(self, sizes: Tensor, target: int, index: float) -> dict[str, Any]:
        others = torch.cat([sizes[:target], sizes[target + 1 :]])
        return {
            "detector": self.name,
            "verdict": "outlier" if index > THRESHOLD else "no-outlier",
            "score": index,
            "threshold": THRESHOLD,
            "odd": "above",
            "reason": f"a mask of {sizes[target]:.1f} pixels sends images to class {target}, those of the other "
            f"classes have {others.min():.1f} to {others.max():.1f} (anomaly index {index:.1f})",
        }


class _Fitted(nn.Module):
    """Changes [k 1+c h w], the weight on each one's size, and the smallest that succeeded: at first the whole."""

    weights: Tensor
    success: Tensor
    turns: Tensor
    smallest: Tensor
    size: Tensor

    def __init__(self, changes: Tensor) -> None:
        super().__init__()
        classes, whole = len(changes), float(changes[0, 0].numel())
        self.changes = nn.Parameter(changes)
        self.register_buffer("weights", changes.new_full((classes,), WEIGHT))
        self.register_buffer("success", changes.new_zeros(classes))
        self.register_buffer(
            "turns", changes.new_zeros(classes)
        )  # steps of success since the last failure, or < 0
        smallest = changes.detach().clone()
        smallest[:, 0] = 20.0  # a class that nothing sends images to needs the whole picture
        self.register_buffer("smallest", smallest)
        self.register_buffer("size", changes.new_full((classes,), whole))

    def note(self, sizes: Tensor, rate: Tensor) -> None:
        """Keep what is smaller and succeeded; raise or lower the weights of those that were alike PATIENCE times."""
        self.success.lerp_(rate, 0.2)
        good = rate >= SUCCESS
        better = good & (self.success >= ON_AVERAGE) & (sizes < self.size)
        self.smallest[better], self.size[better] = self.changes.detach()[better], sizes[better]
        self.turns.copy_(torch.where(good, self.turns.clamp(min=0) + 1, self.turns.clamp(max=0) - 1))
        self.weights.mul_(torch.where(self.turns >= PATIENCE, UP, 1.0))
        self.weights.div_(torch.where(self.turns <= -PATIENCE, DOWN, 1.0))
        self.turns.mul_(self.turns.abs() < PATIENCE)


def anomaly_index(sizes: Tensor) -> float:
    """By how many deviations the least of `sizes` [k] lies below the median, at least 0.

    A deviation is at least a hundredth of the median: most classes may need the whole picture, and are then all alike.
    """
    # the mean of the two in the middle, as numpy's, where torch's median is the lower one
    middle = sizes.double().quantile(0.5)
    spread = CONSISTENT * (sizes.double() - middle).abs().quantile(0.5)
    return float((middle - sizes.min()) / spread.clamp_min(0.01 * middle))
