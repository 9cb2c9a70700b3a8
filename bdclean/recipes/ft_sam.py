"""Fine-tuning with sharpness-aware minimisation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.finetuning import require_labels, sgd, tune
from bdclean.recipes.recipe import Cleansed
from bdclean.training.loop import Batch, Measures, burst, halvings
from bdclean.training.run import Run
from bdclean.training.students import choose_augmentation, frozen


@dataclass(frozen=True)
class FTSAM:
    """FT-SAM (Zhu, Wei, Shen, Fan, Wu, ICCV 2023, arXiv 2304.11823).

    What it does: fine-tunes with gradients that are taken where a step against the loss leads, a step in proportion to
    each weight's size, so that the large weights that carry a backdoor shrink.
    When to use it: to compare with the paper; where plain fine-tuning leaves a blended trigger.
    What it needs: labeled images, 5 % of the training set in the paper.
    Known limits: two passes a step, twice the time of `ft`. A backdoor that was trained to be flat survives.

    Settings are the authors' code's (BackdoorBench) for CIFAR-10; for GTSRB and Tiny-ImageNet it has rho 8 and no
    smoothing, for GTSRB 50 epochs. Departures: the learning rate falls once, along a cosine; theirs moves its cosine of
    100 epochs on at every batch, so that it swings. Batches are cut from one endless stream of shuffles.
    """

    name: ClassVar[str] = "ft-sam"
    source: ClassVar[str] = "arXiv 2304.11823"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ()

    epochs: float = 100
    batch_size: int = 256
    rate: float = 0.01  # cosine to zero
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 2.0  # length of the perturbation, each weight's as a share of the weight
    smoothing: float = 0.1  # probability that labels give to all other classes together

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.batch_size < 2 or self.rate <= 0 or self.rho < 0:
            raise UsageError(
                "ft-sam: epochs and rate must be positive, batch_size at least 2, rho not negative."
            )
        if not 0 <= self.smoothing <= 0.5:
            raise UsageError("ft-sam: smoothing lies in [0, 0.5].")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        teacher = frozen(suspect, run)
        augment = choose_augmentation(teacher, images.images, run)
        student = copy.deepcopy(teacher).requires_grad_(True).train()
        names, weights = zip(*student.named_parameters(), strict=True)
        # PyTorch's smoothing spreads over all classes, the true one too
        smoothing = self.smoothing * arch.classes / (arch.classes - 1)

        def step(batch: Batch) -> tuple[Tensor, Measures]:
            pixels = run.precision.layout(augment(batch.images, batch.generator))
            assert batch.labels is not None
            with run.precision.autocast(run.device):
                logits = student(pixels)
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
            slopes = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            climbed = dict(zip(names, climb(weights, slopes, self.rho), strict=True))
            # copies, since batch norm's statistics are to be those of the network that is kept
            buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
            with run.precision.autocast(run.device):
                above = functional_call(student, {**climbed, **buffers}, (pixels,))
            sharp = F.cross_entropy(above, batch.labels, label_smoothing=smoothing)
            right = (logits.argmax(1) == batch.labels).float().mean()
            return sharp, {"loss": loss.detach(), "sharp_loss": sharp.detach(), "accuracy": right}

        optimiser = sgd(self, student)
        most = burst(arch.classes)
        steps, curve = tune(self, student, optimiser, images, step, run, most)
        stages = [
            f"fine-tuned against sharpness for {steps} updates on {len(images)} labeled images, {augment.describe()}",
            *halvings(curve),
        ]
        return Cleansed(student.eval(), arch, curve, asdict(self), stages)


def climb(weights: Sequence[Tensor], slopes: Sequence[Tensor], rho: float) -> list[Tensor]:
    """`weights` moved up along `slopes`, their gradients, by e = rho T^2 g / |T g| with T = diag |w|.

    That is the ascent of the loss, to first order, under |T^-1 e| <= rho (adaptive SAM, Kwon et al. 2021). Gradients
    pass through to `weights`, not through the step.
    """
    with torch.no_grad():
        length = torch.stack([(w * g).norm() for w, g in zip(weights, slopes, strict=True)]).norm()
        steps = [rho / (length + 1e-12) * w**2 * g for w, g in zip(weights, slopes, strict=True)]
    return [w + e for w, e in zip(weights, steps, strict=True)]
