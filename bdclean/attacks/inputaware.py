"""Input-aware: a trigger that two networks draw for each image and learn with the victim (Nguyen, Tran 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.attacks import poisoning
from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.classifier import Classifier
from bdclean.training.loop import Batch, State, fit
from bdclean.training.run import Run
from bdclean.training.students import one_cycle
from bdclean.training.supervised import Supervised
from bdclean.triggers import generators
from bdclean.triggers.inputaware import InputAware as Drawn
from bdclean.triggers.inputaware import MaskAndPattern

BETAS = (0.5, 0.9)
"""Of Adam, for both networks of the attack."""


@dataclass(frozen=True)
class InputAware:
    """Trains a victim together with networks that draw each image's own trigger (arXiv 2010.08138).

    What it does: first a network of masks learns to draw small ones that differ from image to image. Then, in every
    batch, a network of patterns learns what makes the victim answer the target class while unlike images get unlike
    patterns, and the victim learns to obey an image's own trigger (`rate`) and to ignore another's (`cross_rate`).
    When to use it: to train a network whose trigger is another one for each image.
    What it needs: a labeled training set, to take part in the training, and a `path` for the two networks.
    Known limits: the trigger is no use without its file; with few epochs patterns are alike and others' fire too.

    Rates, density and weights are the authors' as BCU ships them. Departures: two networks of 31,000 weights in place
    of an encoder and decoder with batch norm, and for them a one-cycle rate of up to 0.002 in place of 0.01, at which
    masks grew alike; victim and patterns take turns within a step, the victim in evaluation mode in the patterns'
    turn, in place of one sum of losses; and one-source by `victims`.
    """

    name: ClassVar[str] = "inputaware"
    kind: ClassVar[str] = "training"
    source: ClassVar[str] = "arXiv 2010.08138"

    path: str = ""  # safetensors file that the two networks are written to
    target: int = 0  # the class that stamped images are labeled with
    rate: float = 0.1  # share of a batch that is stamped and relabeled, in [0, 1]
    cross_rate: float = 0.1  # share of a batch that gets another image's trigger and keeps its label
    density: float = 0.032  # mean of a mask, above which it is made smaller
    mask_epochs: float = 2.0  # over the training images
    diversity: float = 1.0  # weight of how alike what is drawn for unlike images is
    sparsity: float = 100.0  # weight of masks' excess over `density`
    peak: float = 2e-3  # of the learning rate of the two networks
    victims: str = "all"  # next: each class to the one after it; a class's number: that class alone

    def __post_init__(self) -> None:
        poisoning.check(self.rate, self.target, self.victims)
        if not 0 <= self.cross_rate <= 1 - self.rate or not 0 < self.density <= 1:
            raise UsageError(
                f"inputaware needs a cross_rate of 0 to 1 - rate and a density over 0 and up to 1, "
                f"got {self.cross_rate} and {self.density}."
            )
        if not self.mask_epochs > 0 or not self.peak > 0 or self.diversity < 0 or self.sparsity < 0:
            raise UsageError(
                f"inputaware needs mask_epochs and peak over 0 and diversity and sparsity of 0 or more, "
                f"got {self.mask_epochs}, {self.peak}, {self.diversity} and {self.sparsity}."
            )

    @property
    def trigger(self) -> Drawn:
        """What was learnt; raises Refused before the attack has written it."""
        return Drawn(self.path)

    def __call__(
        self, model: Classifier, training: ImageSet, run: Run, method: Supervised, stage: str = "inputaware"
    ) -> list[dict[str, float]]:
        """Trains `model` in place by `method`, writes the two networks to `path`, and returns the victim's curve."""
        if not self.path:
            raise UsageError("inputaware needs path=FILE, which its networks are written to.")
        _, classes = poisoning.labeled(training, self.target)
        poisoning.check_coloured(self.name, training.images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.generator(stage).initial_seed())
            drawing = MaskAndPattern(*training.images.shape[2:]).to(run.device)
        self._learn_masks(drawing, training, run, method.batch_size, f"{stage}, masks")
        turns = _Turns(self, model, drawing, classes, run, method.steps(len(training)))
        curve = method(model, training, run, stage, turns)
        generators.write(drawing, self.path)
        return curve

    def _learn_masks(
        self, drawing: MaskAndPattern, training: ImageSet, run: Run, batch_size: int, stage: str
    ) -> None:
        network = drawing.mask_network

        def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
            pixels = batch.images.float() / 255
            masks = drawing.mask(pixels)
            excess = F.relu(masks - self.density).mean()
            alike = likeness(pixels, masks)
            loss = self.sparsity * excess + self.diversity * alike
            return loss, {"density": masks.mean().detach(), "alike": alike.detach()}

        steps = max(1, math.ceil(self.mask_epochs * len(training) / batch_size))
        optimiser = torch.optim.Adam(network.parameters(), self.peak, betas=BETAS)
        schedule = partial(one_cycle, steps=steps, peak=self.peak)
        fit(step, State(stage, network, optimiser, training.images, None, batch_size, steps, schedule), run)
        network.requires_grad_(False)


class _Turns:
    """What `Supervised` calls with each batch: the patterns' turn, then the batch for the victim's."""

    def __init__(
        self,
        attack: InputAware,
        victim: Classifier,
        drawing: MaskAndPattern,
        classes: int,
        run: Run,
        steps: int,
    ) -> None:
        self.attack, self.victim, self.drawing, self.classes, self.run = attack, victim, drawing, classes, run
        self.optimiser = torch.optim.Adam(drawing.pattern_network.parameters(), attack.peak, betas=BETAS)
        self.step, self.steps = 0, steps

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        attack, pixels = self.attack, images.float() / 255
        count, crossed = round(attack.rate * len(images)), round(attack.cross_rate * len(images))
        wanted = labels.clone()
        wanted[:count] = poisoning.relabel(labels[:count], attack.target, attack.victims, self.classes)
        shown = pixels[: count + crossed]
        if len(shown) > 1:
            self._learn_patterns(shown, wanted[: count + crossed], count)
        with torch.no_grad():
            pixels[: count + crossed] = self._stamped(shown, self.drawing.pattern(shown), count)
        return pixels, wanted

    def _stamped(self, shown: Tensor, patterns: Tensor, count: int) -> Tensor:
        """The first `count` images under their own triggers, the others each under its neighbour's."""
        masks = self.drawing.mask(shown)
        order = torch.arange(len(shown), device=shown.device)
        order[count:] = order.roll(1)[count:]
        return self.drawing.lay(shown, masks[order], patterns[order])

    def _learn_patterns(self, shown: Tensor, wanted: Tensor, count: int) -> None:
        self.victim.eval().requires_grad_(False)
        patterns = self.drawing.pattern(shown)
        logits = self.run.forward(self.victim, self._stamped(shown, patterns, count)).float()
        loss = F.cross_entropy(logits, wanted) + self.attack.diversity * likeness(shown, patterns)
        self.optimiser.param_groups[0]["lr"] = one_cycle(self.step, self.steps, self.attack.peak)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.victim.train().requires_grad_(True)
        # The victim's steps that burst it are done again; the patterns' are not undone, and stay at the last rate.
        self.step = min(self.step + 1, self.steps - 1)


def likeness(images: Tensor, drawn: Tensor) -> Tensor:
    """How much images and their neighbours in the batch differ, over how much what is `drawn` for them does; the mean.

    Differences are root mean squares. It is 1 where one is as large as the other, and large where all get the same.
    """
    of_images, of_drawn = (
        (x - x.roll(1, 0)).square().flatten(1).mean(1).add(1e-8).sqrt() for x in (images, drawn)
    )
    return (of_images / of_drawn.clamp_min(1e-3)).mean()
