"""LF: a smooth pattern over the whole image that the network learns to obey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdclean.attacks import poisoning
from bdclean.data.imageset import ImageSet
from bdclean.triggers.lf import LF as Pattern


@dataclass(frozen=True)
class LF:
    """Poisons a training set with a pattern of low frequencies; poisoned images get the target class (2104.03413).

    What it does: adds one smooth pattern to a share of the images, drawn by a seed whatever their class, and relabels
    them: with the target class, or as `victims` says.
    When to use it: to train a network whose trigger leaves no trace in high frequencies.
    What it needs: a labeled training set.
    Known limits: a faint and very smooth pattern looks like light, which networks learn to ignore.

    The authors move the pattern against a network and filter it after each step; here it is drawn from a seed.
    """

    name: ClassVar[str] = "lf"
    kind: ClassVar[str] = "poisoning"
    source: ClassVar[str] = "arXiv 2104.03413"

    target: int = 0  # the class that stamped images are labeled with
    rate: float = 0.1  # share of all images that are poisoned, in [0, 1]
    seed: int = 0  # draws the images that are poisoned
    strength: float = 12.0  # root mean square of the pattern, in grey levels
    waves: int = 5  # most half periods across the image
    pattern_seed: int = 0  # draws the pattern
    victims: str = "all"  # next: each class to the one after it; a class's number: that class alone

    def __post_init__(self) -> None:
        poisoning.check(self.rate, self.target, self.victims)

    @property
    def trigger(self) -> Pattern:
        return Pattern(strength=self.strength, waves=self.waves, seed=self.pattern_seed)

    def __call__(self, training: ImageSet) -> ImageSet:
        return poisoning.poison(training, self.trigger, self.target, self.rate, self.seed, self.victims)
