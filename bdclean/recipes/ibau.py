"""I-BAU: adversarial unlearning of a universal perturbation, by implicit hypergradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.finetuning import require_labels
from bdclean.recipes.recipe import Cleansed
from bdclean.training.adversaries import Forward
from bdclean.training.loop import Batch, Measures, State, fit, halvings
from bdclean.training.run import Run
from bdclean.training.students import frozen


@dataclass(frozen=True)
class IBAU:
    """I-BAU (Zeng, Chen, Park, Mao, Jin, Jia, ICLR 2022, arXiv 2110.03735).

    What it does: in each round looks for one perturbation that makes the network wrong on all images, and unlearns it;
    the gradient takes into account how the perturbation answers to a change of the weights.
    When to use it: to compare with the paper; when minutes are few.
    What it needs: labeled images, 5,000 in the authors' code; they claim that 100 do.
    Known limits: five rounds see five perturbations. Differentiates twice: a network with an operation that cannot be
    is refused.

    Settings are the authors' code's; BackdoorBench has a rate of 1e-4 and batches of 256. As in their code images are
    not augmented, batch norm keeps the suspect's statistics, and nothing bounds the perturbation: its intensities leave
    [0, 1] by far. Departures: images are shuffled anew for each round; the batch that stands for all of them in the
    hypergradient is drawn, theirs is the first; at least one image a batch is perturbed, however small the batch.
    """

    name: ClassVar[str] = "ibau"
    source: ClassVar[str] = "arXiv 2110.03735"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ()

    rounds: int = 5
    batch_size: int = 100
    rate: float = 1e-3  # of Adam, over the weights
    search_rate: float = 10.0  # of gradient ascent, over the perturbation
    penalty: float = 1e-3  # of the perturbation's squared length
    portion: float = 0.01  # of a batch's images, perturbed while unlearning
    fixed_points: int = 5  # iterations that solve for the implicit gradient
    map_rate: float = 0.1  # of the gradient step whose fixed point the perturbation is taken to be

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.batch_size < 2 or min(self.rate, self.search_rate, self.map_rate) <= 0:
            raise UsageError("ibau: rounds are at least 1, batch_size at least 2, rates positive.")
        if not 0 < self.portion <= 1 or min(self.penalty, self.fixed_points) < 0:
            raise UsageError("ibau: portion lies in (0, 1], penalty and fixed_points are not negative.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        student = frozen(suspect, run).requires_grad_(True)
        weights = list(student.parameters())
        per_round = math.ceil(len(images) / self.batch_size)
        found = torch.zeros(1, *images.images.shape[1:], device=run.device)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(run.seed))[
            : self.batch_size
        ]
        some = images.select(chosen)
        assert some.labels is not None
        standing = (some.images.to(run.device).float() / 255, some.labels.to(run.device))

        def exact(pixels: Tensor) -> Tensor:
            """In float32 and by operations that can be differentiated twice."""
            with sdpa_kernel(SDPBackend.MATH):
                return student(run.precision.layout(pixels))

        def step(batch: Batch) -> tuple[Tensor, Measures]:
            assert batch.labels is not None
            if batch.step % per_round == 0:
                found.copy_(self.search(partial(run.forward, student), images.images, batch.generator, run))
            perturbation = found.clone().requires_grad_(True)
            pixels, n = batch.images.float() / 255, len(batch.images)
            hit = torch.rand(n, generator=batch.generator, device=run.device).argsort() < max(
                1, int(self.portion * n)
            )
            logits = exact(pixels + hit[:, None, None, None] * perturbation)
            outer = F.cross_entropy(logits, batch.labels)
            inner = self.inner_loss(exact, perturbation, *standing)
            right = (logits.argmax(1) == batch.labels).float().mean()
            with twice_differentiable(arch):
                (slope,) = torch.autograd.grad(inner, perturbation, create_graph=True)
                mapped = perturbation - self.map_rate * slope
                loss = with_implicit_gradient(outer, mapped, perturbation, weights, self.fixed_points)
            return loss, {"accuracy": right}

        optimiser = torch.optim.Adam(weights, self.rate)
        state = State(
            self.name, student, optimiser, images.images, images.labels, self.batch_size, self.rounds * per_round,
            lambda step: self.rate, extra={"perturbation": found},
        )  # fmt: skip
        curve = fit(step, state, run)
        stages = [
            f"unlearnt {self.rounds} universal perturbations in {state.steps} updates on {len(images)} labeled images",
            f"length of the last one: {float(found.norm()):.1f} (pixels in [0, 1])",
            *halvings(curve),
        ]
        return Cleansed(student.eval(), arch, curve, asdict(self), stages)

    def search(self, forward: Forward, images: Tensor, generator: Generator, run: Run) -> Tensor:
        """A perturbation [1 c h w] that moves answers: a step of gradient ascent on each batch of uint8 `images`."""
        found = torch.zeros(1, *images.shape[1:], device=run.device)
        shuffled = torch.randperm(len(images), generator=generator, device=run.device).cpu()
        for part in shuffled.split(self.batch_size):
            pixels = images[part].to(run.device).float() / 255
            with torch.no_grad():
                answers = forward(pixels).argmax(1)
            found.requires_grad_(True)
            (slope,) = torch.autograd.grad(self.inner_loss(forward, found, pixels, answers), found)
            found = found.detach() - self.search_rate * slope
        return found

    def inner_loss(self, forward: Forward, perturbation: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        """What a perturbation minimises: it makes `labels` unlikely on all `pixels`, and is short."""
        loss = F.cross_entropy(forward(pixels + perturbation).float(), labels)
        return self.penalty * perturbation.square().sum() - loss


@contextmanager
def twice_differentiable(arch: Arch) -> Iterator[None]:
    """Within it, an operation that PyTorch can differentiate only once raises Refused."""
    try:
        yield
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise Refused(
            f"ibau differentiates a network twice, and {arch.name} has an operation that cannot be "
            f"({str(error).splitlines()[0]}): use another recipe."
        ) from error


def with_implicit_gradient(
    outer: Tensor, mapped: Tensor, at: Tensor, weights: Sequence[Tensor], iterations: int
) -> Tensor:
    """`outer`, whose gradient to `weights` also goes through `at`, the fixed point of `mapped` that moves with them.

    With p = `at`, a leaf that both were made from, and m = `mapped`: the gradient is d outer / dw + v dm / dw, where
    v = d outer / dp + v dm / dp is iterated from v = 0 (Grazzi et al. 2020, fixed point method).
    """
    if not iterations:
        return outer
    (slope,) = torch.autograd.grad(outer, at, retain_graph=True)
    v = slope  # after the first iteration
    for _ in range(iterations - 1):
        (carried,) = torch.autograd.grad(mapped, at, grad_outputs=v, retain_graph=True)
        v = slope + carried
    moved = torch.autograd.grad(mapped, weights, grad_outputs=v, allow_unused=True, materialize_grads=True)
    through = torch.stack([(w * g).sum() for w, g in zip(weights, moved, strict=True)]).sum()
    return outer + (through - through.detach())
