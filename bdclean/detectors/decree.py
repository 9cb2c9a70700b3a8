"""DECREE: the smallest mask and pattern that pull the features of all images together (Feng et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.errors import Refused, UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.training.forms import mask
from bdclean.training.inversion import Detected
from bdclean.training.loop import Batch, Measures, State, fit
from bdclean.training.run import Run

THRESHOLD = 0.1
"""Below it others call an encoder backdoored; the authors' code prints the norm alone."""
PULLED = 0.99
"""The mean cosine of two images' features from which the authors call a mask successful."""
WEIGHT, LEAST_WEIGHT, TIMES, PATIENCE = 1e-3, 1e-5, 5.0, 5
"""The weight on the mask's norm at first and at least, by how much it is changed, and after how many steps alike."""
RATES = ((0.6, 0.5), (0.85, 0.1), (1.0, 0.05))
"""Adam's rate until each share of the steps."""
LEAST_IMAGES = 100


@dataclass(frozen=True)
class Decree:
    """Fits the smallest mask and pattern that pull all features together, and tells its norm: a weak sign.

    What it does: minimises minus the mean cosine of two stamped images' features, plus a weight on the mask's L1 norm.
    PL1 is the norm of the smallest successful mask as a share of the whole picture's, in [0, 1].
    When to use it: to compare with the literature. `inversion` tells more.
    What it needs: 100 images or more, without labels; minutes on a processor.
    Known limits: weak. Clean encoders were found below the published threshold of 0.1 as well, here and by others, and
    attacks above it: the norm never decides a verdict.

    After DECREE (Feng et al. 2023, arXiv 2303.15180), by its code's settings for CIFAR-10. Departures: a fixed number
    of steps with the rates at shares of them, and no early stop; masks by a sigmoid in place of a scaled tanh.
    """

    name: ClassVar[str] = "decree"
    source: ClassVar[str] = "DECREE (Feng et al. 2023, arXiv 2303.15180)"

    steps: int = 400
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2:
            raise UsageError("decree: steps are positive, batch_size at least 2.")

    def __call__(self, suspect: Classifier, arch: Arch, images: Tensor, run: Run) -> Detected:
        """A finding on `images` uint8 [n c h w] with PL1 as its score, None where no mask is successful.

        Raises Refused for fewer than LEAST_IMAGES.
        """
        if len(images) < LEAST_IMAGES:
            raise Refused(f"{len(images)} images are too few: give {LEAST_IMAGES} or more.")
        fitted = self._fit(suspect.eval(), images, run)
        channels, height, width = images.shape[1:]
        size, found = float(fitted.size), Detected()
        if size > height * width:
            found.findings.append(_finding(None, size, self.steps))
            return found
        found.findings.append(_finding(size / (height * width), size, self.steps))
        found.pictures["mask that pulls all features together (decree), on grey"] = mask(
            height, width, channels
        ).picture(fitted.smallest[0])
        return found

    def _fit(self, suspect: Classifier, images: Tensor, run: Run) -> _Fitted:
        channels, height, width = images.shape[1:]
        form, generator = mask(height, width, channels), run.generator("decree", "start")
        fitted = _Fitted(torch.randn((1, *form.shape), generator=generator, device=run.device))
        optimiser = torch.optim.Adam(fitted.parameters(), RATES[0][1], betas=(0.5, 0.9))

        def step(batch: Batch) -> tuple[Tensor, Measures]:
            stamped = form.stamp(fitted.change, batch.images.float() / 255)[0]
            features = run.forward(suspect, stamped).float().flatten(1)
            if not features.isfinite().all():
                raise Refused("the encoder's features of stamped images are not all finite numbers.")
            cosine, size = pairwise_cosine(features), form.sizes(fitted.change)[0]
            # a mask is the same in all channels, and the norm is over them
            loss = fitted.weight * channels * size - cosine
            fitted.note(cosine.detach(), size.detach())
            return loss, {"cosine": cosine.detach(), "pixels": size.detach()}

        def rate(step: int) -> float:
            return next(value for share, value in RATES if step <= share * self.steps)

        state = State("decree", fitted, optimiser, images, None, self.batch_size, self.steps, rate)
        fit(step, state, run)
        return fitted


class _Fitted(nn.Module):
    """The change [1 1+c h w], the weight on its norm, and the smallest one so far that was successful."""

    weight: Tensor
    turns: Tensor
    smallest: Tensor
    size: Tensor

    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(change)
        self.register_buffer("weight", change.new_tensor(WEIGHT))
        self.register_buffer("turns", change.new_zeros(()))  # steps of success since the last failure, or < 0
        self.register_buffer("smallest", change.detach().clone())
        self.register_buffer("size", change.new_tensor(torch.finfo(change.dtype).max))

    def note(self, cosine: Tensor, size: Tensor) -> None:
        """Keep the change where it is the smallest success, and raise or lower the weight after PATIENCE alike."""
        success = bool(cosine > PULLED)
        if success and size < self.size:
            self.smallest.copy_(self.change.detach())
            self.size.copy_(size)
        turns = max(0.0, float(self.turns)) + 1 if success else min(0.0, float(self.turns)) - 1
        if abs(turns) >= PATIENCE:
            self.weight.mul_(TIMES if success else 1 / TIMES).clamp_(min=LEAST_WEIGHT)
            turns = 0.0
        self.turns.fill_(turns)


def pairwise_cosine(features: Tensor) -> Tensor:
    """The mean cosine of two different rows of `features` [n d], differentiable, in [-1, 1]."""
    n, directions = len(features), F.normalize(features, dim=1)
    return (directions.sum(0).square().sum() - n) / (n * (n - 1))


def _finding(norm: float | None, pixels: float, steps: int) -> dict[str, Any]:
    if norm is None:
        said = f"no mask pulls the features of all images together in {steps} steps"
    else:
        side = "below" if norm < THRESHOLD else "not below"
        said = (
            f"a mask of {pixels:.1f} pixels pulls the features of all images together (cosine over {PULLED}): "
            f"PL1 {norm:.3f}, {side} the published threshold"
        )
    return {
        "detector": Decree.name,
        "verdict": "undecided",
        "score": norm,
        "threshold": THRESHOLD,
        "odd": "below",
        "reason": f"{said}. Weak: clean encoders are below it, too",
    }
