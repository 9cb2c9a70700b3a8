"""Re-activation: does a network that stands obey the trigger again once that is changed a little?

Amplified, moved, or with a faint perturbation on top that was optimised towards the target, which on most published
repairs is enough (Zhu et al. 2024, arXiv 2405.16134). The network is not trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.errors import Refused
from bdclean.measuring.sequela.ground import Ground, Threat, base_rate, success
from bdclean.measuring.trial import Target
from bdclean.networks.classifier import Classifier
from bdclean.record.sequela import SUSPECT, Reactivation
from bdclean.triggers.stamping import Stamp, add, to_pixels

AMPLIFIED = 1.5
MOVED = (8, 4)
"""An eighth and a quarter of the image, up or down and left or right: towards the middle."""
REACH, STEPS, BATCH, SEEN = 8, 100, 64, 512
"""Grey levels that the perturbation stays within; its steps, their images, and of how many images those are drawn."""


def reactivate(networks: Mapping[str, Classifier], threat: Threat, ground: Ground) -> Iterator[Reactivation]:
    """What changed triggers do to `networks` by name, on the images that are scored.

    The perturbation is one for all images, learnt on those to tune on: one made for each image moves any network. What
    the same optimisation does without the trigger stands beside it; a trigger that adds nothing to that is gone.
    """
    target = threat.target
    stamps: dict[str, Stamp] = {
        "as it is": threat.trigger,
        f"amplified {AMPLIFIED:g} times": amplified(threat.trigger),
    }
    for part in MOVED:
        down, right = inwards(threat.trigger, ground.tuning.images, part)
        stamps[f"moved by {right}/{down} pixels"] = moved(threat.trigger, down, right)
    for done, (name, model) in enumerate(networks.items(), 1):
        trial = ground.asked(model, name == SUSPECT)
        base = base_rate(trial, target)
        of_model = dict(stamps)
        below: dict[str, Stamp] = {"the trigger": threat.trigger, "nothing": _unstamped}
        for words, stamp in below.items():
            noise = perturbation(model, stamp, target, ground)
            of_model[f"optimised within {REACH}/255 on top of {words}"] = _on_top(stamp, noise)
        for change, stamp in of_model.items():
            rated = success(trial, stamp, target)
            yield Reactivation(name, threat.trigger.spec(), target, change, rated, base)
        ground.trial.tell("reactivation", done, len(networks))


def amplified(trigger: Stamp, factor: float = AMPLIFIED) -> Stamp:
    """The trigger whose change of each pixel is `factor` times as large, as far as there are such grey levels."""

    def stamp(images: Tensor) -> Tensor:
        given = images.float()
        return to_pixels(given + factor * (trigger(images).float() - given))

    return stamp


def moved(trigger: Stamp, down: int, right: int) -> Stamp:
    """The trigger in another place; what leaves the image on one side comes in on the other.

    The image is rolled under it and back, so that a patch, a picture and a warp are each moved as they are.
    """

    def stamp(images: Tensor) -> Tensor:
        return trigger(images.roll((-down, -right), (2, 3))).roll((down, right), (2, 3))

    return stamp


def inwards(trigger: Stamp, images: Tensor, part: int) -> tuple[int, int]:
    """How far down and right a `part`-th of the image is, towards the middle from where the trigger changes most."""
    few = images[:16]
    change = (trigger(few).float() - few.float()).abs().sum((0, 1))
    found = []
    for axis, size in enumerate(change.shape):
        along = change.sum(1 - axis)
        centre = float((along * torch.arange(size)).sum() / along.sum().clamp_min(1e-6))
        found.append((1 if centre < (size - 1) / 2 else -1) * max(1, size // part))
    return found[0], found[1]


def perturbation(model: Classifier, stamp: Stamp, target: Target, ground: Ground) -> Tensor:
    """Grey levels in [-REACH, REACH], float [c h w] of whole numbers, that send stamped images to the target most.

    Sign steps of a tenth of REACH on the mean cross-entropy of images of other classes, from nothing. Raises Refused
    where there is no such image.
    """
    asked = copy.deepcopy(model).to(ground.device).eval().requires_grad_(False)
    labels = ground.tuning.labels
    assert labels is not None
    wanted = (labels + 1) % ground.trial.classes if target == "next" else torch.full_like(labels, int(target))
    away = (labels != wanted).nonzero().squeeze(1)[:SEEN]
    if not len(away):
        raise Refused(f"the images to tune on are all of class {target}, the target.")
    images, wanted = stamp(ground.tuning.images[away]), wanted[away]
    generator = torch.Generator().manual_seed(ground.trial.seed)
    levels = torch.zeros(images.shape[1:], device=ground.device)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        pixels = images[chosen].to(ground.device).float()
        levels.requires_grad_(True)
        loss = F.cross_entropy(asked((pixels + levels).clamp(0, 255) / 255), wanted[chosen].to(ground.device))
        (gradient,) = torch.autograd.grad(loss, [levels])
        levels = (levels.detach() - REACH / 10 * gradient.sign()).clamp(-REACH, REACH)
    return levels.detach().round().cpu()


def _on_top(stamp: Stamp, noise: Tensor) -> Stamp:
    return lambda images: add(stamp(images), noise)


def _unstamped(images: Tensor) -> Tensor:
    return images
