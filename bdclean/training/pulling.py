"""Patches that pull an encoder's features together, found by trial: in a suspect, beside what learnt from it or alone.

Under a trigger images look alike to an encoder. So do they under anything that hides much of them; but that holds for
an encoder without the backdoor, too, such as one that learnt the suspect's features averaged over views. What pulls the
suspect's together and not those is the backdoor. Searched without gradients, which find changes that act on one network
alone: the smallest masks that move the suspect and not its student were no smaller for the attacker's cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.networks.classifier import Classifier
from bdclean.training.encoder_lesson import mean_feature
from bdclean.training.inversion import spread_out
from bdclean.training.patches import Drawn, Forward, Patch, evolved, under_each
from bdclean.training.run import Run

LONGEST = 12
"""The longest side of a patch, in cells of 32: encoders' are up to a third of the image."""
DRAWN, SHOWN, JUDGED = 75, 24, 64
"""So many patches for each round are drawn first, and each judged on so many images; what was found, on so many
others."""
AVERAGED = 1000
"""The mean feature is that of so many images."""


@dataclass(frozen=True)
class Pulling:
    """A patch, and how far it pulls a suspect's features together, and those of the network beside it, in [-1, 1]."""

    patch: Patch
    pull: float
    beside: float = 0.0

    @property
    def more(self) -> float:
        """By how much more the suspect's."""
        return self.pull - self.beside

    def pack(self) -> Tensor:
        return torch.cat([torch.tensor([self.pull, self.beside]), self.patch.pack()])

    @staticmethod
    def unpack(packed: Tensor) -> Pulling:
        return Pulling(Patch.unpack(packed[2:]), float(packed[0]), float(packed[1]))


@dataclass(frozen=True)
class Side:
    """A network, and the mean of its features of length one, [d]."""

    model: Forward
    centre: Tensor

    @classmethod
    def of(cls, network: Classifier, images: Tensor, run: Run) -> Side:
        """That of `network`, by uint8 `images` [n c h w]; `run` is a part of its own for each side."""
        centre = mean_feature(network.eval(), spread_out(images, AVERAGED), run)
        return cls(partial(run.forward, network), centre)

    def pulled(self, pixels: Tensor, patches: Sequence[Patch]) -> Tensor:
        """The mean cosine of pairs of features less their mean, `pixels` [n c h w] being under each of `patches`."""
        n = len(pixels)

        def together(features: Tensor) -> Tensor:
            directions = F.normalize(F.normalize(features, dim=2) - self.centre, dim=2)
            return (directions.sum(1).square().sum(1) - n) / (n * (n - 1))

        return under_each(self.model, pixels, patches, together)


def judging(images: Tensor, run: Run) -> Tensor:
    """Those of `images` uint8 [n c h w] that judge what was found, as floats in [0, 1]."""
    return spread_out(images, 2 * JUDGED)[1::2].to(run.device).float() / 255


def pulling(
    suspect: Side, beside: Side | None, images: Tensor, rounds: int, area: float, most: int, run: Run
) -> list[Pulling]:
    """At most `most` patches unlike each other that pull together the features of `suspect`, the clearest first.

    `images` are uint8 [n c h w]. The pull of `beside` is taken off; `area` is what the largest patch must pull more
    than one of no size.
    """

    def pulls(pixels: Tensor, patches: Sequence[Patch]) -> tuple[Tensor, Tensor]:
        ours = suspect.pulled(pixels, patches)
        return ours, torch.zeros_like(ours) if beside is None else beside.pulled(pixels, patches)

    def searched() -> Tensor:
        shown = spread_out(images, 2 * SHOWN)[::2].to(run.device).float() / 255
        channels, height, width = images.shape[1:]
        drawn = Drawn.blank(channels, height, width, run.generator("pulling").initial_seed(), LONGEST)

        def more(patches: Sequence[Patch]) -> Tensor:
            ours, theirs = pulls(shown, patches)
            return ours - theirs

        found = evolved(
            drawn, [drawn.anywhere() for _ in range(DRAWN * rounds)], more, area, rounds, most,
            lambda done: run.tell("patches", done, rounds),
        )  # fmt: skip
        rows = zip(found, *(side.tolist() for side in pulls(judging(images, run), found)), strict=True)
        return torch.stack([Pulling(*row).pack() for row in rows])

    found = [Pulling.unpack(row) for row in run.keep("pulling", searched).cpu()]
    return sorted(found, key=lambda each: -each.more)
