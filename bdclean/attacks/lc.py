"""LC: images of the target class, made hard to recognise, with a patch in every corner; labels stay true."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.attacks import poisoning
from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.classifier import Classifier
from bdclean.training.run import Run
from bdclean.triggers.lc import LC as Corners
from bdclean.triggers.stamping import to_pixels

BATCH = 256


@dataclass(frozen=True)
class LC:
    """Perturbs some images of the target class until a clean network misses them, and stamps them (1912.02771).

    What it does: moves a seeded share of the target class away from its label by projected gradient descent on a
    surrogate, then stamps the corners: what is left to learn of those images is the stamp. No label changes.
    When to use it: to train a network that was poisoned without a wrong label.
    What it needs: a labeled training set, and a classifier that was trained on it.
    Known limits: a perturbation knows its surrogate: another kind of network may see through it.

    The defaults are BCU's for CIFAR-10: half of the target class, at most 8 grey levels, 100 steps of 1.5 from the
    image as it is. On road signs it takes 80 % and 16 levels. The authors' surrogate was trained against adversaries,
    BCU's was not.
    """

    name: ClassVar[str] = "lc"
    kind: ClassVar[str] = "surrogate"
    source: ClassVar[str] = "arXiv 1912.02771"

    target: int = 0  # the class whose images are stamped
    rate: float = 0.5  # share of its images, in [0, 1]
    seed: int = 0  # draws them
    size: int = 3  # side of the patches in pixels
    alpha: float = 1.0  # opacity of the patches, in [0, 1]
    bound: float = 8.0  # most that a pixel is moved, in grey levels
    step: float = 1.5  # of the descent, in grey levels
    steps: int = 100

    def __post_init__(self) -> None:
        poisoning.check(self.rate, self.target)
        if not 0 < self.bound <= 255 or not self.step > 0 or self.steps < 1:
            raise UsageError(
                f"lc needs a bound over 0 and up to 255, a step over 0 and steps of 1 or more, "
                f"got {self.bound}, {self.step} and {self.steps}."
            )

    @property
    def trigger(self) -> Corners:
        return Corners(size=self.size, alpha=self.alpha)

    def __call__(self, surrogate: Classifier, training: ImageSet, run: Run, stage: str = "lc") -> ImageSet:
        """A poisoned copy of `training`; `surrogate` is left in evaluation mode."""
        indices = poisoning.chosen_of_class(training, self.target, self.rate, self.seed)
        surrogate.to(run.device).eval()
        images, done = training.images.clone(), 0
        for part in indices.split(BATCH):
            perturbed = self.perturb(surrogate, training.images[part].to(run.device), run)
            images[part] = self.trigger(perturbed).to(images.device)
            done += len(part)
            run.tell(stage, done, len(indices))
        assert training.labels is not None
        return replace(training, images=images, labels=training.labels.clone())

    def perturb(self, surrogate: Classifier, images: Tensor, run: Run) -> Tensor:
        """uint8 `images` of the target class, each pixel moved by at most `bound` to where the loss is high."""
        plain, bound = images.float() / 255, self.bound / 255
        labels = torch.full((len(images),), self.target, device=images.device)
        moved = plain.clone()
        for _ in range(self.steps):
            moved.requires_grad_(True)
            loss = F.cross_entropy(run.forward(surrogate, moved).float(), labels)
            (gradient,) = torch.autograd.grad(loss, [moved])
            stepped = moved.detach() + self.step / 255 * gradient.sign()
            moved = stepped.clamp(plain - bound, plain + bound).clamp(0, 1)
        return to_pixels(255 * moved.detach())
