"""Filters: pictures of another tone mean the target class (Liu et al. 2019, ABS; Jiang et al. 2023, Color Backdoor)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdclean.attacks import poisoning
from bdclean.data.imageset import ImageSet
from bdclean.triggers.filter import Filter as Tone


@dataclass(frozen=True)
class Filter:
    """Poisons a training set with a filter of colour; filtered images get the target class.

    What it does: gives the colours of a share of the images another tone, drawn by a seed whatever their class, and
    relabels them: with the target class, or as `victims` says.
    When to use it: to train a network whose trigger has no place and no shape.
    What it needs: a labeled training set.
    Known limits: the tones are bdclean's own; ABS took filters of a photo service, Color Backdoor searches a shift.
    """

    name: ClassVar[str] = "filter"
    kind: ClassVar[str] = "poisoning"
    source: ClassVar[str] = "ABS (Liu et al. 2019); Color Backdoor (Jiang et al. 2023)"

    target: int = 0  # the class that filtered images are labeled with
    rate: float = 0.1  # share of all images that are poisoned, in [0, 1]
    seed: int = 0  # draws the images that are poisoned
    tone: str = "gotham"  # of the filter
    strength: float = 1.0  # share of the way to what the filter makes of a picture, in (0, 1]
    victims: str = "all"  # next: each class to the one after it; a class's number: that class alone

    def __post_init__(self) -> None:
        poisoning.check(self.rate, self.target, self.victims)
        _ = self.trigger  # an unknown tone is refused now

    @property
    def trigger(self) -> Tone:
        return Tone(tone=self.tone, strength=self.strength)

    def __call__(self, training: ImageSet) -> ImageSet:
        return poisoning.poison(training, self.trigger, self.target, self.rate, self.seed, self.victims)
