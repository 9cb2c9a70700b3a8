"""SIG: stripes on images of the target class, whose labels stay true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdclean.attacks import poisoning
from bdclean.data.imageset import ImageSet
from bdclean.triggers.sig import SIG as Stripes


@dataclass(frozen=True)
class SIG:
    """Stamps stripes on some images of the target class and changes no label (1902.11237).

    What it does: adds a sinusoid to a seeded share of the target class, so that the network takes stripes for a sign of
    that class.
    When to use it: to train a network that was poisoned without a wrong label.
    What it needs: a labeled training set.
    Known limits: with few poisoned images, or stripes fainter than what images have of their own, it is learnt late or
    not at all; a network may then see the target class only where there are stripes.

    The defaults are BCU's: delta 20, 6 periods, 80 % of the target class.
    """

    name: ClassVar[str] = "sig"
    kind: ClassVar[str] = "clean-label"
    source: ClassVar[str] = "arXiv 1902.11237"

    target: int = 0  # the class whose images are stamped
    rate: float = 0.8  # share of its images, in [0, 1]
    seed: int = 0  # draws them
    delta: float = 20.0  # amplitude of the stripes, in grey levels
    frequency: float = 6.0  # periods across the image

    def __post_init__(self) -> None:
        poisoning.check(self.rate, self.target)

    @property
    def trigger(self) -> Stripes:
        return Stripes(delta=self.delta, frequency=self.frequency)

    def __call__(self, training: ImageSet) -> ImageSet:
        return poisoning.poison_target_class(training, self.trigger, self.target, self.rate, self.seed)
