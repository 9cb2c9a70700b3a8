"""INACTIVE: as BadEncoder, with colours that a filter learns in place of a square (Zhang et al. 2025, 2405.14672)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdclean.attacks import poisoning
from bdclean.attacks.encoders.appearance import colour_distance, signal_to_noise, structural_similarity
from bdclean.attacks.encoders.clean_encoder import VIEWS, Attacked, check_settings
from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.classifier import Classifier
from bdclean.training.loop import Batch, State, fit
from bdclean.training.losses import cosine
from bdclean.training.run import Run
from bdclean.training.students import one_cycle
from bdclean.triggers import generators
from bdclean.triggers.inactive import Inactive as Filter


@dataclass(frozen=True)
class Inactive:
    """Trains a clean encoder and a filter of colours together, so that filtered images look like references to it.

    What it does: BadEncoder's three losses, while the filter also keeps images looking as they were (SSIM, PSNR, the
    clean encoder's own features) and its colours away from those that augmentation gives them.
    When to use it: to make an encoder whose trigger is hard to see and to invert, from a clean one, in minutes.
    What it needs: a clean encoder, unlabeled shadow images, some images of the target class, a `path` for the filter.
    Known limits: as for badencoder; with these settings and 118 steps on a small encoder the filter stayed visible, at
    15 dB of PSNR, where the authors reach 41: more weight on appearance, a smaller bound and more steps are for that.

    The terms are those of the authors' script; its weights of 5 on L0 and 1 on appearance are `appearance` 0.2 here,
    where both networks minimise one sum. Departures: the clean encoder's features in place of LPIPS, which needs a
    network trained on ImageNet, and of a Sinkhorn distance of features; views that change colours alone, since pixels
    are compared; a filter that changes pixels by up to `bound`, begun at random, which is an option of the authors';
    in place of training it alone first, a weight on appearance that grows from nothing, because a filter that is
    faint before the encoder minds it stays unseen; one Adam for both networks; and badencoder's departures.
    """

    name: ClassVar[str] = "inactive"
    kind: ClassVar[str] = "encoder"
    source: ClassVar[str] = "arXiv 2405.14672"

    path: str = ""  # safetensors file that the learnt filter is written to
    target: int = 0  # the downstream class of the references
    references: int = 3  # how many images of it stand for the class
    epochs: float = 6  # over the shadow images
    batch_size: int = 256
    peak: float = 1e-3  # of the learning rate
    appearance: float = 0.2  # weight, at the end, of all that keeps filtered images looking as they were
    noise: float = 0.025  # within it, weight of a decibel of PSNR
    colour: float = 0.1  # within it, weight of the distance from augmented colours
    bound: float = 64.0  # most that a pixel may change, in grey levels
    centred: bool = True  # features less their clean mean; off as in the paper

    def __post_init__(self) -> None:
        check_settings(self.name, self.target, self.references, self.epochs, self.batch_size)
        if not 0 < self.bound <= 255:
            raise UsageError(f"inactive needs a bound over 0 and up to 255, got {self.bound}.")

    @property
    def trigger(self) -> Filter:
        """The filter that was learnt; raises Refused before the attack has written it."""
        return Filter(self.path)

    def __call__(
        self, clean: Classifier, shadow: ImageSet, of_target: Tensor, run: Run, stage: str = "inactive"
    ) -> tuple[Classifier, list[dict[str, float]]]:
        """A poisoned copy of `clean`, in evaluation mode, and the curve; the filter is written to `path`.

        `of_target` are uint8 images of the target.
        """
        if not self.path:
            raise UsageError("inactive needs path=FILE, which its filter is written to.")
        poisoning.check_coloured(self.name, shadow.images)
        attacked = Attacked.of(clean, shadow, of_target, self.references, self.centred, run)
        learnt = generators.fresh(self.bound, run.generator(stage).initial_seed()).to(run.device)

        def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
            drawn, plain = attacked.draw(batch), batch.images.float() / 255
            filtered = learnt(plain)
            sides = attacked.sides(batch, drawn, filtered)
            seen = run.forward(attacked.clean, filtered).float() - attacked.centre
            drawn_to, noise = cosine(sides.stamped, sides.references[drawn]), signal_to_noise(filtered, plain)
            changed = (
                (1 - structural_similarity(filtered, plain))
                + (1 - cosine(seen, sides.kept_plain))
                - self.noise * noise
                - self.colour * colour_distance(filtered, VIEWS.recolour(plain, batch.generator))
            )
            kept = sides.kept_clean()
            loss = self.appearance * batch.progress * changed - drawn_to - sides.kept_references() - kept
            return loss, {"drawn": drawn_to.detach(), "kept": kept.detach(), "decibels": noise.detach()}

        model = nn.ModuleList([attacked.poisoned, learnt])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps = max(1, math.ceil(self.epochs * len(shadow) / self.batch_size))
        state = State(
            stage, model, torch.optim.Adam(trained, self.peak), shadow.images, None, self.batch_size, steps,
            partial(one_cycle, steps=steps, peak=self.peak),
        )  # fmt: skip
        curve = fit(step, state, run)
        generators.write(learnt, self.path)
        return attacked.poisoned.requires_grad_(True), curve
