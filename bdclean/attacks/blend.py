"""Blend: a faint picture or noise over the whole image that the network learns to obey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdclean.attacks import poisoning
from bdclean.data.imageset import ImageSet
from bdclean.triggers.blend import Blend as Overlay


@dataclass(frozen=True)
class Blend:
    """Poisons a training set with a blended picture; poisoned images get the target class (1712.05526).

    What it does: blends one fixed picture into a share of the images, drawn by a seed whatever their class,
    and relabels them: with the target class, or as `victims` says.
    When to use it: to train a network whose backdoor covers the whole image and survives crops.
    What it needs: a labeled training set.
    Known limits: at a low alpha, small networks learn it late, and flat images may fire by themselves.

    The defaults are those of BackdoorBench and BCU: random noise as the picture, alpha 0.2, 10 % of the
    images.
    """

    name: ClassVar[str] = "blend"
    kind: ClassVar[str] = "poisoning"
    source: ClassVar[str] = "arXiv 1712.05526"

    target: int = 0  # the class that stamped images are labeled with
    rate: float = 0.1  # share of all images that are poisoned, in [0, 1]
    seed: int = 0  # draws the images that are poisoned
    picture: str = "noise"  # noise or picture (both drawn), or the path of an image
    picture_seed: int = 0  # draws the noise or picture
    alpha: float = 0.2  # weight of the picture, in [0, 1]
    victims: str = "all"  # next: each class to the one after it; a class's number: that class alone

    def __post_init__(self) -> None:
        poisoning.check(self.rate, self.target, self.victims)

    @property
    def trigger(self) -> Overlay:
        return Overlay(source=self.picture, seed=self.picture_seed, alpha=self.alpha)

    def __call__(self, training: ImageSet) -> ImageSet:
        return poisoning.poison(training, self.trigger, self.target, self.rate, self.seed, self.victims)
