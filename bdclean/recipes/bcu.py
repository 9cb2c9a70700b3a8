"""BCU: adaptive layer-wise re-initialisation, then distillation on unlabeled images."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.training.loop import Batch, Measures, State, burst, fit, halvings, updates
from bdclean.training.losses import distillation_kl
from bdclean.training.run import Run
from bdclean.training.students import choose_augmentation, frozen


@dataclass(frozen=True)
class BCU:
    """Backdoor cleansing with unlabeled data (Pang, Sun, Ling, Chen, CVPR 2023, arXiv 2211.12044).

    What it does: re-draws a share of each layer's weights, more in deeper layers, and distils the suspect's answers
    into the result.
    When to use it: to compare with the paper; unlabeled images are enough, also ones of another kind.
    What it needs: unlabeled images, 5,000 in the paper.
    Known limits: leaves backdoors in small networks, and those that survive distillation (see README's figures).

    Settings are the authors' code's for CIFAR-10. Departures: batches are cut from one endless stream of shuffles, so
    none is smaller than the others; ratios are mapped by depth to networks other than ResNet-18.
    """

    name: ClassVar[str] = "bcu"
    source: ClassVar[str] = "arXiv 2211.12044"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    ratios: tuple[float, ...] = (0.01, 0.01, 0.03, 0.09, 0.27)  # re-drawn shares from stem to last stage
    head_ratio: float = 0.10
    epochs: float = 100
    batch_size: int = 256
    rate: float = 0.01  # cosine to zero, stepped once an epoch
    momentum: float = 0.9
    weight_decay: float = 5e-4
    temperature_start: float = 1.0  # the temperature rises linearly over the epochs
    temperature_end: float = 4.0

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 <= r <= 1 for r in (*self.ratios, self.head_ratio)):
            raise UsageError("bcu: ratios and head_ratio are shares in [0, 1].")
        if self.epochs <= 0 or self.batch_size < 2 or self.rate <= 0:
            raise UsageError("bcu: epochs and rate must be positive, batch_size at least 2.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        teacher = frozen(suspect, run)
        student = copy.deepcopy(teacher).requires_grad_(True)
        shares = by_depth(self.ratios, self.head_ratio, len(arch.stages))
        drawn = {}
        for stage, share in zip(arch.stages, shares, strict=True):
            for name in stage.modules:
                reinitialise(student.network.get_submodule(name), share, run.generator("bcu", name))
            drawn[stage.name] = round(share, 4)
        student.train()
        augment = choose_augmentation(teacher, unlabeled.images, run)
        steps = updates(self.epochs, len(unlabeled), self.batch_size)
        per_epoch = steps / self.epochs

        def epoch(step: int) -> int:
            return min(int(step / per_epoch), math.ceil(self.epochs) - 1)

        def rate(step: int) -> float:
            return self.rate * (1 + math.cos(math.pi * epoch(step) / self.epochs)) / 2

        def step(batch: Batch) -> tuple[Tensor, Measures]:
            images = augment(batch.images, batch.generator)
            rise = (epoch(batch.step) + 1) / self.epochs
            temperature = self.temperature_start + (self.temperature_end - self.temperature_start) * min(
                1.0, rise
            )
            with torch.no_grad():
                answers = run.forward(teacher, images)
            logits = run.forward(student, images)
            agreement = (logits.argmax(1) == answers.argmax(1)).float().mean()
            return distillation_kl(logits, answers, temperature), {"agreement": agreement}

        optimiser = torch.optim.SGD(
            student.parameters(), self.rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        state = State(
            "bcu",
            student,
            optimiser,
            unlabeled.images,
            None,
            self.batch_size,
            steps,
            rate,
            most=burst(arch.classes),
        )
        curve = fit(step, state, run)
        stages = [
            f"re-initialised shares by depth: {drawn}",
            f"distilled for {steps} updates, {augment.describe()}",
            *halvings(curve),
        ]
        return Cleansed(student.eval(), arch, curve, asdict(self), stages)


def by_depth(ratios: Sequence[float], head: float, stages: int) -> list[float]:
    """A ratio for each of `stages` from shallow to deep, the head's last; these very ones where ratios + 1 is `stages`.

    Other depths interpolate geometrically (linearly where a ratio is 0) at the same relative depth.
    """
    body = stages - 1
    if body < 1:
        return [head] * stages
    found = []
    for index in range(body):
        at = index * (len(ratios) - 1) / max(1, body - 1)
        low = min(int(at), len(ratios) - 1)
        high = min(low + 1, len(ratios) - 1)
        a, b, t = ratios[low], ratios[high], at - low
        found.append(a ** (1 - t) * b**t if a > 0 and b > 0 else a + (b - a) * t)
    return [*found, head]


def reinitialise(module: nn.Module, share: float, generator: torch.Generator) -> None:
    """Re-draw each weight and bias of `module` with probability `share`, in place.

    Convolutions from Kaiming's normal law (fan out), linear layers from PyTorch's own, as in the authors' network.
    """
    device = generator.device
    with torch.no_grad():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and parameter.dim() > 2:
                receptive = parameter[0, 0].numel()
                fan_out = parameter.shape[0] * receptive
                fresh = torch.randn(parameter.shape, generator=generator, device=device) * math.sqrt(
                    2 / fan_out
                )
            else:
                # A bias follows its module's matrix: `weight`, in attention `in_proj_weight`.
                weight = next((p for p in module.parameters(recurse=False) if p.dim() > 1), parameter)
                bound = 1 / math.sqrt(max(1, weight[0].numel()))
                fresh = (torch.rand(parameter.shape, generator=generator, device=device) * 2 - 1) * bound
            chosen = torch.rand(parameter.shape, generator=generator, device=device) < share
            parameter.copy_(torch.where(chosen, fresh, parameter))
