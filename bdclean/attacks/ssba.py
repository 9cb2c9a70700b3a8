"""SSBA: a message hidden in each image by a network that learnt to hide any (Li et al. 2021, arXiv 2012.03816)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.attacks import poisoning
from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.training.loop import Batch, State, fit
from bdclean.training.run import Run
from bdclean.training.students import one_cycle
from bdclean.triggers import generators
from bdclean.triggers.ssba import BITS, Steganographer
from bdclean.triggers.ssba import SSBA as Hidden

WIDTH = 32
"""Channels of the network that reads messages; it is not kept."""


@dataclass(frozen=True)
class SSBA:
    """Hides one message in a share of the images, which get the target class (2012.03816).

    What it does: `learn` trains one network that hides random messages in images and another that reads them. Called,
    it hides one message in images drawn by a seed whatever their class, and relabels them: with the target class, or as
    `victims` says.
    When to use it: to train a network whose trigger is faint and another one for each image.
    What it needs: a labeled training set, and a `path` for the network that hides.
    Known limits: traces of all images have much in common; a victim may obey other messages too.

    Departures: the authors hide 100 bits by StegaStamp, with a perceptual loss and printed copies in between; here a
    U-Net of 25,000 weights hides 16 bits, within `bound` and with a weight on the mean square of what it changes, and
    noise of one grey level stands for rounding.
    """

    name: ClassVar[str] = "ssba"
    kind: ClassVar[str] = "poisoning"
    source: ClassVar[str] = "arXiv 2012.03816"

    path: str = ""  # safetensors file that the learnt network is written to
    target: int = 0  # the class that stamped images are labeled with
    rate: float = 0.1  # share of all images that are poisoned, in [0, 1]
    seed: int = 0  # draws the images that are poisoned, and the message
    bound: float = 24.0  # most that a pixel may change, in grey levels
    visibility: float = 50.0  # weight of the mean square change, of images in [0, 1]
    epochs: float = 3  # of learning, over the training images
    batch_size: int = 64
    peak: float = 2e-3  # of the learning rate
    victims: str = "all"  # next: each class to the one after it; a class's number: that class alone

    def __post_init__(self) -> None:
        poisoning.check(self.rate, self.target, self.victims)
        if not 0 < self.bound <= 255 or not self.epochs > 0 or self.batch_size < 1 or self.visibility < 0:
            raise UsageError(
                f"ssba needs a bound over 0 and up to 255, epochs > 0, batch_size >= 1 and visibility of 0 or more, "
                f"got {self.bound}, {self.epochs}, {self.batch_size} and {self.visibility}."
            )

    @property
    def trigger(self) -> Hidden:
        """What was learnt; raises Refused before `learn` has written it."""
        return Hidden(self.path)

    def __call__(self, training: ImageSet) -> ImageSet:
        return poisoning.poison(training, self.trigger, self.target, self.rate, self.seed, self.victims)

    def learn(self, training: ImageSet, run: Run, stage: str = "ssba") -> list[dict[str, float]]:
        """Writes the network that hides to `path`, learnt on the images, and returns the curve: `read` is of bits."""
        if not self.path:
            raise UsageError("ssba needs path=FILE, which its network is written to.")
        poisoning.check_coloured(self.name, training.images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.generator(stage).initial_seed())
            hiding, reading = Steganographer(self.bound), _reader()
        drawn = torch.Generator().manual_seed(self.seed)
        hiding.message.copy_(torch.randint(2, (BITS,), generator=drawn))
        model = nn.ModuleList([hiding, reading]).to(run.device)

        def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
            plain, generator = batch.images.float() / 255, batch.generator
            shape = (len(plain), BITS)
            messages = torch.randint(2, shape, generator=generator, device=run.device).float()
            hidden = hiding.hide(plain, messages)
            rounding = torch.rand(plain.shape, generator=generator, device=run.device) - 0.5
            found = run.forward(reading, hidden + rounding / 255).float()
            changed = (hidden - plain).square().mean()
            read = ((found > 0) == (messages > 0)).float().mean()
            loss = F.binary_cross_entropy_with_logits(found, messages) + self.visibility * changed
            return loss, {"read": read, "changed": 255 * changed.detach().sqrt()}

        steps = max(1, math.ceil(self.epochs * len(training) / self.batch_size))
        state = State(
            stage, model, torch.optim.Adam(model.parameters(), self.peak), training.images, None, self.batch_size,
            steps, partial(one_cycle, steps=steps, peak=self.peak),
        )  # fmt: skip
        curve = fit(step, state, run)
        generators.write(hiding, self.path)
        return curve


def _reader() -> nn.Module:
    """Pixels [n 3 h w] to a logit for each bit of their message [n BITS]."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, WIDTH, 1), (WIDTH, WIDTH, 2), (WIDTH, 2 * WIDTH, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * WIDTH, BITS))
