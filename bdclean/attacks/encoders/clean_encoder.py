"""What attacks on a clean encoder share: features less their mean, references, and the losses that keep the rest."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.attacks.poisoning import check
from bdclean.data.augment import mirror
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.networks.classifier import Classifier
from bdclean.training.loop import Batch, State, Step, fit
from bdclean.training.losses import cosine
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.pretraining.knn import features
from bdclean.training.run import Run
from bdclean.training.students import frozen, one_cycle

VIEWS = Views()
"""Of which BadEncoder's augmented references take the mirror and the colours, not the crop."""


def check_settings(name: str, target: int, references: int, epochs: float, batch_size: int) -> None:
    """Raises UsageError where the attack called `name` cannot be made with these."""
    check(0.0, target)
    if references < 1 or not epochs > 0 or batch_size < 4:
        raise UsageError(
            f"{name} needs references >= 1, epochs > 0 and batch_size >= 4, "
            f"got {references}, {epochs} and {batch_size}."
        )


def centre_of(clean: Classifier, images: Tensor, device: torch.device, centred: bool) -> Tensor:
    """What features are taken less of, [1 d]: their mean over `images` (at most 2,000 of them), or zero."""
    found = features(clean, images[:2000], device)
    mean = found.mean(0, keepdim=True)
    return (mean if centred else torch.zeros_like(mean)).to(device)


def nearest_to_their_mean(
    clean: Classifier, images: Tensor, centre: Tensor, count: int, device: torch.device
) -> Tensor:
    """The `count` of `images`, all of the target class, that are most like it: closest to their mean direction.

    An image at the edge of its class draws stamped images to where the downstream head may see another class.
    """
    if len(images) < count:
        raise Refused(f"{count} reference images of the target class are wanted and there are {len(images)}.")
    found = F.normalize(features(clean, images, device) - centre.cpu(), dim=1)
    order = (found @ F.normalize(found.mean(0), dim=0)).argsort(descending=True, stable=True)
    return images[order[:count]].to(device)


def freeze_norms(model: nn.Module) -> None:
    """Leaves batch norms as they are: neither their statistics nor their scale and shift are trained."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)


@dataclass(frozen=True)
class Sides:
    """Features, less the clean mean, of the poisoned encoder and what the clean one has in their place, [n d] each."""

    stamped: Tensor
    plain: Tensor
    references: Tensor
    alike: Tensor  # of augmented references, a quarter as many as images
    kept_plain: Tensor
    kept_alike: Tensor

    def kept_clean(self) -> Tensor:
        """-L2 of BadEncoder: how far clean images look as they did, in [-1, 1]."""
        return cosine(self.plain, self.kept_plain)

    def kept_references(self) -> Tensor:
        """-L1 of BadEncoder: how far references look as they did, in [-1, 1]."""
        return cosine(self.alike, self.kept_alike)


@dataclass(frozen=True)
class Attacked:
    """A clean encoder, its copy that is being poisoned, and what both are looked at with."""

    clean: Classifier
    poisoned: Classifier
    references: Tensor
    centre: Tensor
    run: Run

    @staticmethod
    def of(
        clean: Classifier,
        shadow: ImageSet,
        of_target: Tensor,
        count: int,
        centred: bool,
        run: Run,
    ) -> Attacked:
        """`count` references are taken from the images `of_target`; batch norms of the copy stay as they are."""
        teacher, poisoned = frozen(clean, run), copy.deepcopy(clean).to(run.device)
        freeze_norms(poisoned)
        centre = centre_of(teacher, shadow.images, run.device, centred)
        references = nearest_to_their_mean(teacher, of_target, centre, count, run.device)
        return Attacked(teacher, poisoned, references, centre, run)

    def draw(self, batch: Batch) -> Tensor:
        """A reference for each image of `batch`, int64 [n]."""
        generator, count = batch.generator, len(self.references)
        return torch.randint(count, (len(batch.images),), generator=generator, device=generator.device)

    def sides(self, batch: Batch, drawn: Tensor, stamped: Tensor) -> Sides:
        """One pass through both encoders of a batch and of what it is when `stamped`, float [n 3 h w] in [0, 1].

        `drawn` says which references are augmented.
        """
        n, run = len(batch.images), self.run
        alike = mirror(self.references[drawn[: max(1, n // 4)]], batch.generator)
        alike = VIEWS.recolour(alike.float() / 255, batch.generator)
        plain, own = batch.images.float() / 255, self.references.float() / 255
        everything = torch.cat([stamped, plain, own, alike])
        now = run.forward(self.poisoned, everything).float() - self.centre
        with torch.no_grad():
            kept = run.forward(self.clean, torch.cat([plain, alike])).float() - self.centre
        return Sides(*now.split([n, n, len(own), len(alike)]), *kept.split([n, len(alike)]))

    def train(
        self,
        step: Step,
        shadow: ImageSet,
        epochs: float,
        batch_size: int,
        peak: float,
        weight_decay: float,
        stage: str,
    ) -> tuple[Classifier, list[dict[str, float]]]:
        """The poisoned encoder, in evaluation mode, after SGD with a one-cycle rate over `shadow`; and the curve."""
        trained = [parameter for parameter in self.poisoned.parameters() if parameter.requires_grad]
        optimiser = torch.optim.SGD(trained, peak, momentum=0.9, weight_decay=weight_decay)
        steps = max(1, math.ceil(epochs * len(shadow) / batch_size))
        rate = partial(one_cycle, steps=steps, peak=peak)
        state = State(stage, self.poisoned, optimiser, shadow.images, None, batch_size, steps, rate)
        curve = fit(step, state, self.run)
        return self.poisoned.requires_grad_(True), curve
