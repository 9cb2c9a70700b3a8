"""BadNets: a small patch in a corner that the network learns to obey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdclean.attacks import poisoning
from bdclean.data.imageset import ImageSet
from bdclean.triggers.badnets import BadNets as Patch


@dataclass(frozen=True)
class BadNets:
    """Poisons a training set with a patch; poisoned images are labeled with the target class (1708.06733).

    What it does: stamps a share of the images, drawn by a seed whatever their class, and relabels them: with the
    target class, or as `victims` says.
    When to use it: to train a network whose backdoor is known; the easiest one to put in and to find.
    What it needs: a labeled training set.
    Known limits: random crops cut the patch off most of the images it was stamped on, which then only carry a
    wrong label: with few images or steps, the backdoor is learnt late (and suddenly), or not at all.

    The defaults are those of BackdoorBench and BCU: a 3x3 checker in the bottom right corner, 10 % of the
    images.
    """

    name: ClassVar[str] = "badnets"
    kind: ClassVar[str] = "poisoning"
    source: ClassVar[str] = "arXiv 1708.06733"

    target: int = 0  # the class that stamped images are labeled with
    rate: float = 0.1  # share of all images that are poisoned, in [0, 1]
    seed: int = 0  # draws the images that are poisoned
    size: int = 3  # side of the patch in pixels
    position: str = "bottom-right"  # a corner, or x/y
    pattern: str = "checker"  # as in the trigger of this name
    alpha: float = 1.0  # opacity of the patch, in [0, 1]
    victims: str = "all"  # next: each class to the one after it; a class's number: that class alone

    def __post_init__(self) -> None:
        poisoning.check(self.rate, self.target, self.victims)

    @property
    def trigger(self) -> Patch:
        return Patch(size=self.size, position=self.position, pattern=self.pattern, alpha=self.alpha)

    def __call__(self, training: ImageSet) -> ImageSet:
        return poisoning.poison(training, self.trigger, self.target, self.rate, self.seed, self.victims)
