"""Adversaries: one perturbation shared by a batch that pushes a student away from the suspect's clean answer.

Each starts at random and takes a few sign-gradient steps on its own parameters; the student is used in evaluation mode
and gets no gradient. Kin: universal adversarial perturbations (Moosavi-Dezfooli et al. 2017), SAU (Wei et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from bdclean.data.corruptions import Shared, corrupt, identity_grid, integers, rectangles, uniform
from bdclean.training.losses import divergence

Forward = Callable[[Tensor], Tensor]
"""Float images in [0, 1], [n c h w], to logits [n classes]."""

KINDS = ("patch", "pattern", "low", "warp")
"""A rectangle's content; an additive pattern of at most 0.06; one of low resolution of at most 0.12; a smooth warp of
at most about 1.5 pixels of 32."""

FAMILY = {"patch": "patch", "pattern": "noise", "low": "low", "warp": "warp"}
"""The family of `corruptions` that each kind belongs to."""

PATTERN, LOW, WARP = 0.06, 0.12, 1.5


def attack(
    kind: str, forward: Forward, pixels: Tensor, answers: Tensor, generator: Generator, steps: int = 3
) -> Tensor:
    """`pixels` [n c h w] under a shared perturbation of `kind` that `steps` gradient steps drove away from `answers`.

    `answers` are the suspect's probabilities on clean images [n classes]. Returns new images in [0, 1], no gradient.
    """
    _, c, h, w = pixels.shape
    if kind == "patch":
        mask = rectangles(1, h, w, pixels, generator, low=2, high=8).to(pixels.dtype)
        return _ascend(
            lambda content: pixels + mask * (content.clamp(0, 1) - pixels),
            uniform((1, c, h, w), 0, 1, pixels, generator), 0.4, (0.0, 1.0), forward, answers, steps,
        )  # fmt: skip
    if kind == "pattern":
        start = uniform((1, c, h, w), -PATTERN, PATTERN, pixels, generator)
        return _ascend(
            lambda p: (pixels + p).clamp(0, 1), start, PATTERN, (-PATTERN, PATTERN), forward, answers, steps
        )
    if kind == "low":
        side = 4 if float(uniform((1,), 0, 1, pixels, generator)) < 0.5 else 8
        start = uniform((1, c, side, side), -LOW, LOW, pixels, generator)

        def add(small: Tensor) -> Tensor:
            return (pixels + F.interpolate(small, size=(h, w), mode="bilinear", align_corners=False)).clamp(
                0, 1
            )

        return _ascend(add, start, LOW, (-LOW, LOW), forward, answers, steps)
    if kind == "warp":
        grid, reach = identity_grid(pixels[:1]), WARP * 2 / 32
        start = uniform((1, 2, 5, 5), -reach, reach, pixels, generator)

        def bend(field: Tensor) -> Tensor:
            moved = grid + F.interpolate(field, size=(h, w), mode="bicubic", align_corners=True).permute(
                0, 2, 3, 1
            )
            return F.grid_sample(
                pixels, moved.expand(len(pixels), h, w, 2), padding_mode="reflection", align_corners=False
            )

        return _ascend(bend, start, reach, (-reach, reach), forward, answers, steps).clamp(0, 1)
    raise ValueError(f"unknown adversary {kind!r}: known are {', '.join(KINDS)}")


def worst_counterfeit(
    forward: Forward, pixels: Tensor, answers: Tensor, families: Sequence[str], generator: Generator,
    draws: int = 24, judged: int = 6,
) -> Tensor:  # fmt: skip
    """`pixels` [n c h w] under the most harmful of `draws` random counterfeits of `families`, the same for all images.

    Harm is how much of the first `judged` images goes to one class, which is what a trigger does; heavy corruptions
    scatter them. Gradients lead to the easiest way off the answers, again and again, and not to a trigger that acts
    only as a whole, such as stripes of one frequency; draws come by it.
    """
    seeds = integers((draws,), 0, 2**31, pixels, generator).tolist()

    def counterfeit(images: Tensor, seed: int) -> Tensor:
        return corrupt(images, families, Shared(torch.Generator(images.device).manual_seed(seed)))

    few = pixels[:judged]
    with torch.no_grad():
        logits = forward(torch.cat([counterfeit(few, seed) for seed in seeds]))
        gone = logits.float().softmax(1).view(draws, len(few), -1) - answers[:judged].float()
        return counterfeit(pixels, seeds[int(gone.mean(1).amax(1).argmax())])


def attraction(
    forward: Forward, pixels: Tensor, families: Sequence[str], generator: Generator, draws: int = 96
) -> Tensor:
    """The most of each class's gain under any of `draws` random counterfeits shared by `pixels` [n c h w]: [classes].

    A gain is by how much the mean probability of a class is higher than on the images as they are.
    """
    seeds = integers((draws,), 0, 2**31, pixels, generator).tolist()

    def answers(x: Tensor) -> Tensor:
        return forward(x).float().softmax(1).mean(0)

    with torch.no_grad():
        drawn = (Shared(torch.Generator(pixels.device).manual_seed(seed)) for seed in seeds)
        found = torch.stack([answers(corrupt(pixels, families, shared)) for shared in drawn])
        return found.amax(0) - answers(pixels)


def _ascend(
    apply: Callable[[Tensor], Tensor], start: Tensor, size: float, bounds: Sequence[float], forward: Forward,
    answers: Tensor, steps: int,
) -> Tensor:  # fmt: skip
    parameter = start.clone()
    for _ in range(steps):
        parameter.requires_grad_(True)
        harm = divergence(forward(apply(parameter)), answers).mean()
        (gradient,) = torch.autograd.grad(harm, [parameter])
        parameter = (parameter.detach() + size / max(1, steps - 1) * gradient.sign()).clamp(*bounds)
    with torch.no_grad():
        return apply(parameter)
