"""Inverted triggers: the smallest soft mask and pattern that send images to a class, for many classes together.

After Neural Cleanse (Wang et al. 2019, IEEE S&P): stamped = (1 - mask) * image + mask * pattern, cross-entropy towards
the class plus a weight on the mask's L1 norm, the weight raised while the success rate is above a goal and lowered
otherwise. Departures: all classes are optimised in one batch; success is averaged over steps; fewer steps (150), and
classes that fall far behind stop early where there are many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.training import Batch, Run, State, fit

STEP = 0.2
GOAL = 0.95
RAISE = 1.15
LEAST_SUCCESS = 0.8
TOGETHER = 24


@dataclass(frozen=True)
class Inverted:
    """Masks [k 1 h w] and patterns [k 3 h w] in [0, 1], of `classes` [k], with the success rate of each [k]."""

    classes: Tensor
    masks: Tensor
    patterns: Tensor
    success: Tensor

    @property
    def pixels(self) -> Tensor:
        """The L1 norm of each mask, in pixels [k]."""
        return self.masks.sum(dim=(1, 2, 3))

    def select(self, chosen: Tensor) -> Inverted:
        return Inverted(self.classes[chosen], self.masks[chosen], self.patterns[chosen], self.success[chosen])

    def pack(self) -> Tensor:
        """One tensor [k 4hw + 2] with everything in it, for the resume state."""
        k = len(self.classes)
        parts = [self.masks.reshape(k, -1), self.patterns.reshape(k, -1), self.success.view(k, 1)]
        return torch.cat([*parts, self.classes.view(k, 1).to(self.masks.dtype)], dim=1)

    @staticmethod
    def unpack(packed: Tensor, height: int, width: int) -> Inverted:
        area, k = height * width, len(packed)
        masks, patterns, success, classes = packed.split([area, 3 * area, 1, 1], dim=1)
        shape = (k, -1, height, width)
        return Inverted(classes[:, 0].long(), masks.reshape(shape), patterns.reshape(shape), success[:, 0])


class _Fitted(nn.Module):
    """Masks and patterns of all classes as logits, and what steers them: all of it is in the resume state."""

    weights: Tensor
    success: Tensor
    active: Tensor

    def __init__(self, classes: int, height: int, width: int, generator: torch.Generator):
        super().__init__()

        def start(channels: int) -> nn.Parameter:
            shape = (classes, channels, height, width)
            return nn.Parameter(torch.rand(shape, generator=generator, device=generator.device) * 2 - 1)

        self.masks, self.patterns = start(1), start(3)
        device = generator.device
        # Neural Cleanse's first weight, for masks of 32 x 32 pixels
        self.register_buffer("weights", torch.full((classes,), 1e-3 * 1024 / (height * width), device=device))
        self.register_buffer("success", torch.zeros(classes, device=device))
        self.register_buffer("active", torch.ones(classes, dtype=torch.bool, device=device))

    def sizes(self) -> Tensor:
        return torch.sigmoid(self.masks.detach()).sum(dim=(1, 2, 3))


def invert(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    run: Run,
    *,
    steps: int = 150,
    batch_size: int = 64,
    name: str = "invert",
) -> Inverted:
    """Fit a mask and a pattern for each of `classes` [k] on `model`, which is put into evaluation mode.

    `images` are uint8 [n 3 h w]. Each step shows every class `batch_size` images, whatever class they are of. Returned
    are the `going_on` classes that were fitted to the end.
    """
    model.eval()
    classes, (height, width) = classes.to(run.device), images.shape[2:]
    fitted = _Fitted(len(classes), height, width, run.generator(name, "start"))
    optimiser = torch.optim.Adam(fitted.parameters(), lr=STEP, betas=(0.5, 0.9))

    def step(batch: Batch) -> tuple[None, dict[str, float]]:
        if batch.step == max(1, steps // 3):
            fitted.active.zero_()
            fitted.active[fitted.sizes().argsort()[: going_on(len(classes))]] = True
        pixels = batch.images.float() / 255
        optimiser.zero_grad()
        active, rate = fitted.active.nonzero().squeeze(1), fitted.success.clone()
        for part in chunks(len(active), max(1, 1024 // len(pixels))):
            rows = active[part.to(run.device)]
            masks, patterns = torch.sigmoid(fitted.masks[rows]), torch.sigmoid(fitted.patterns[rows])
            stamped = (1 - masks[:, None]) * pixels + (masks * patterns)[:, None]
            with run.precision.autocast(run.device):
                logits = model(run.precision.layout(stamped.flatten(0, 1))).float()
            targets = classes[rows].repeat_interleave(len(pixels))
            losses = F.cross_entropy(logits, targets, reduction="none").view(len(rows), -1).mean(1)
            total = (losses + fitted.weights[rows] * masks.sum(dim=(1, 2, 3))).sum()
            # only the masks' and patterns' gradients: the network's own weights get none
            total.backward(inputs=[fitted.masks, fitted.patterns])
            rate[rows] = (logits.argmax(1) == targets).float().view(len(rows), -1).mean(1)
        optimiser.step()
        fitted.success.copy_(rate if batch.step == 0 else fitted.success.lerp(rate, 0.2))
        rising = rate > GOAL
        fitted.weights.mul_(torch.where(rising, RAISE, 1 / RAISE)).clamp_(1e-6, 1.0)
        return None, {"success": fitted.success.mean().item()}

    fit(step, State(name, fitted, optimiser, images, None, batch_size, steps), run)
    with torch.no_grad():
        found = Inverted(classes, torch.sigmoid(fitted.masks), torch.sigmoid(fitted.patterns), fitted.success)
        return found.select(fitted.active)


def going_on(classes: int) -> int:
    """How many classes go on after a third of the steps: the half with the smallest masks, 5 to TOGETHER of them.

    A trigger's class leads from early on (measured: 23 pixels against 38 to 53 after 60 steps), and the rest of the
    steps is only needed to see by how much.
    """
    return min(classes, max(5, min(TOGETHER, -(-classes // 2))))


def chunks(total: int, size: int) -> Iterator[Tensor]:
    """Indices 0..total-1 in runs of at most `size`."""
    for first in range(0, total, size):
        yield torch.arange(first, min(total, first + size))


def outliers(inverted: Inverted) -> tuple[Tensor, Tensor, float]:
    """Which masks are unusually small, bool [k]; each mask's anomaly index [k]; and the size under which one counts.

    That size is half the median of the masks that reach LEAST_SUCCESS (0 where fewer than three do): unlike the index,
    (median - size) / (1.4826 * median absolute deviation) as in Neural Cleanse, it does not depend on how alike the
    other classes happen to be.
    """
    valid, pixels = inverted.success >= LEAST_SUCCESS, inverted.pixels
    if int(valid.sum()) < 3:
        return torch.zeros_like(valid), torch.zeros_like(pixels), 0.0
    median = pixels[valid].median()
    spread = 1.4826 * (pixels[valid] - median).abs().median()
    index = (median - pixels) / spread.clamp_min(1e-6 * float(median) + 1e-9)
    limit = float(median) / 2
    return valid & (pixels < limit), index, limit


class Pursuit:
    """Inverted triggers that are refitted on a student at each use, and retire when grown past `limit` pixels.

    `tensors` is all its state, changed in place, for the resume state.
    """

    def __init__(self, inverted: Inverted, limit: float, device: torch.device):
        self.limit = limit
        self.classes = inverted.classes.to(device)
        self.tensors = {
            "masks": torch.logit(inverted.masks.clamp(1e-3, 1 - 1e-3)).to(device),
            "patterns": torch.logit(inverted.patterns.clamp(1e-3, 1 - 1e-3)).to(device),
            "weights": torch.full((len(inverted.classes),), 1e-3, device=device),
            "retired": torch.zeros(len(inverted.classes), device=device),
        }

    @property
    def over(self) -> bool:
        """Whether every trigger has retired."""
        return bool(self.tensors["retired"].all())

    def stamp(self, model: Callable[[Tensor], Tensor], pixels: Tensor, turn: int, steps: int = 5) -> Tensor:
        """`pixels` [n 3 h w] in [0, 1] under one of the triggers still active, after `steps` sign steps on `model`."""
        active = (self.tensors["retired"] == 0).nonzero().squeeze(1)
        k = int(active[turn % len(active)])
        masks, patterns, weights = (self.tensors[name] for name in ("masks", "patterns", "weights"))
        targets = self.classes[k].expand(len(pixels))
        for _ in range(steps):
            mask_logits = masks[k].clone().requires_grad_(True)
            pattern_logits = patterns[k].clone().requires_grad_(True)
            mask = torch.sigmoid(mask_logits)
            logits = model(pixels + mask * (torch.sigmoid(pattern_logits) - pixels))
            loss = F.cross_entropy(logits, targets) + weights[k] * mask.sum()
            for leaf, gradient in zip(
                (masks, patterns), torch.autograd.grad(loss, [mask_logits, pattern_logits]), strict=True
            ):
                leaf[k] -= STEP * gradient.sign()
            rising = float((logits.argmax(1) == targets).float().mean()) > GOAL
            weights[k] = (weights[k] * (RAISE if rising else 1 / RAISE)).clamp(1e-6, 1.0)
        mask = torch.sigmoid(masks[k])
        if float(mask.sum()) > self.limit:
            self.tensors["retired"][k] = 1
        return pixels + mask * (torch.sigmoid(patterns[k]) - pixels)
