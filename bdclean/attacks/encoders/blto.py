"""BLTO: a trigger that survives pre-training, learnt on a surrogate (Sun et al. 2024, arXiv 2404.07863)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdclean.attacks.poisoning import check, check_coloured, poison_target_class
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.networks.classifier import Classifier
from bdclean.training.loop import Batch, State, fit
from bdclean.training.losses import cosine, nt_xent
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.pretraining.learning import Projected, mlp, ready, width
from bdclean.training.run import Run
from bdclean.training.students import one_cycle
from bdclean.triggers import generators
from bdclean.triggers.blto import BLTO as Noise

VIEWS = Views()
PROJECTED = 128
"""Values that the surrogate's projector gives, as SimCLR's here."""


@dataclass(frozen=True)
class BLTO:
    """Stamps noise on some images of the target class that a generator learnt to be seen as that class (2404.07863).

    What it does: `learn` pre-trains a surrogate on images poisoned by a generator, and in the same steps moves the
    generator to where views of any image, stamped, have the surrogate's features of views of the target class.
    Called, it stamps a seeded share of the target class with what was learnt; no label plays a part.
    When to use it: to make an encoder poisoned through its data, with a trigger that augmentations leave alone.
    What it needs: labeled images, whose labels say only which ones show the target class; a surrogate encoder; a
    `path` for the generator.
    Known limits: a generator knows its surrogate; what passes over to a victim shows when one is pre-trained.

    Two levels of the authors', alternating, with the numbers of steps and the bound not known (8 is what another group
    takes): here both levels take one step each of one Adam, features are centred before they are compared, and the
    surrogate sees another draw of `rate` of the target class stamped at every step.
    Other departures: SimCLR in place of SimSiam; a surrogate that may be pre-trained already and is not begun anew;
    a generator of 20,000 weights in place of a ResNet of 64 channels.
    """

    name: ClassVar[str] = "blto"
    kind: ClassVar[str] = "pre-training"
    source: ClassVar[str] = "arXiv 2404.07863"

    path: str = ""  # safetensors file that the learnt generator is written to
    target: int = 0  # the class whose images are stamped
    rate: float = 0.1  # share of its images, in [0, 1]
    seed: int = 0  # draws them
    bound: float = 8.0  # most that a pixel may change, in grey levels
    epochs: float = 4  # of learning, over the training images
    batch_size: int = 256
    peak: float = 1e-3  # of the learning rate
    temperature: float = 0.5  # of the surrogate's pre-training

    def __post_init__(self) -> None:
        check(self.rate, self.target)
        if not 0 < self.bound <= 255 or not self.epochs > 0 or self.batch_size < 4:
            raise UsageError(
                f"blto needs a bound over 0 and up to 255, epochs > 0 and batch_size >= 4, "
                f"got {self.bound}, {self.epochs} and {self.batch_size}."
            )

    @property
    def trigger(self) -> Noise:
        """What was learnt; raises Refused before `learn` has written it."""
        return Noise(self.path)

    def __call__(self, training: ImageSet) -> ImageSet:
        return poison_target_class(training, self.trigger, self.target, self.rate, self.seed)

    def learn(
        self, surrogate: Classifier, training: ImageSet, run: Run, stage: str = "blto"
    ) -> list[dict[str, float]]:
        """Writes a generator to `path`, learnt on a copy of `surrogate` and on `training`, and returns the curve."""
        if not self.path:
            raise UsageError("blto needs path=FILE, which its generator is written to.")
        if training.labels is None:
            raise Refused("poisoning images of the target class needs labels and these images have none.")
        check_coloured(self.name, training.images)
        references = training.images[training.labels == self.target]
        if not len(references):
            raise Refused(f"there is no image of class {self.target} to poison.")
        references = references.to(run.device)
        inside = width(surrogate, training.images)
        victim = Projected(copy.deepcopy(surrogate), mlp(inside, inside, PROJECTED, run, stage, "projector"))
        ready(victim, run)
        learnt = generators.fresh(self.bound, run.generator(stage).initial_seed()).to(run.device)

        def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
            plain = batch.images.float() / 255
            stamped = learnt(plain)
            drawn = torch.randint(
                len(references), (len(plain),), generator=batch.generator, device=run.device
            )
            drawn_to = self._drawn_to(victim.encoder, stamped, plain, references[drawn], batch, run)
            assert batch.labels is not None
            coins = torch.rand(len(plain), generator=batch.generator, device=run.device)
            wearing = (batch.labels == self.target) & (coins < self.rate)
            poisoned = torch.where(wearing.view(-1, 1, 1, 1), stamped.detach(), plain)
            views = torch.cat([VIEWS(poisoned, batch.generator) for _ in range(2)])
            first, second = run.forward(victim, views).chunk(2)
            contrast = nt_xent(first, second, self.temperature)
            return contrast - drawn_to, {"drawn": drawn_to.detach(), "contrast": contrast.detach()}

        model = nn.ModuleList([victim, learnt])
        steps = max(1, math.ceil(self.epochs * len(training) / self.batch_size))
        state = State(
            stage, model, torch.optim.Adam(model.parameters(), self.peak), training.images, training.labels,
            self.batch_size, steps, partial(one_cycle, steps=steps, peak=self.peak),
        )  # fmt: skip
        curve = fit(step, state, run)
        generators.write(learnt, self.path)
        return curve

    def _drawn_to(
        self, encoder: nn.Module, stamped: Tensor, plain: Tensor, references: Tensor, batch: Batch, run: Run
    ) -> Tensor:
        """Mean cosine of views of `stamped` and of `references`, whose gradient goes to the generator alone.

        The encoder is in evaluation mode here, as a victim is when it is attacked, and features are centred by the mean
        of the plain images'.
        """
        encoder.eval().requires_grad_(False)
        found = run.forward(encoder, VIEWS(stamped, batch.generator)).float()
        with torch.no_grad():
            others = torch.cat([VIEWS(references, batch.generator), plain])
            wanted, usual = run.forward(encoder, others).float().chunk(2)
        encoder.train().requires_grad_(True)
        centre = usual.mean(0, keepdim=True)
        return cosine(found - centre, wanted - centre)
