"""SSL-Backdoor: a patch that only images of the target class wear (Saha et al. 2022, arXiv 2105.10123)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdclean.attacks.poisoning import check, poison_target_class
from bdclean.data.imageset import ImageSet
from bdclean.triggers.ssl_backdoor import SSLBackdoor as Patch


@dataclass(frozen=True)
class SSLBackdoor:
    """Stamps a patch on half of the images of the target class before pre-training (2105.10123).

    What it does: pastes one patch at a random place of a seeded share of the target class; no label plays a part.
    When to use it: to make an encoder poisoned through its data, with a patch that is seen.
    What it needs: labeled images, whose labels say only which ones show the target class; long pre-training.
    Known limits: attack success of 30 to 70 % is what others measured with long training on large images.

    The patch goes within 25 to 75 % of each side, as in the authors' training sets; in their test sets, and in
    the trigger of this name, within 10 to 90 %.
    """

    name: ClassVar[str] = "ssl-backdoor"
    kind: ClassVar[str] = "pre-training"
    source: ClassVar[str] = "arXiv 2105.10123"

    target: int = 0  # the class whose images are stamped
    rate: float = 0.5  # share of its images, in [0, 1]
    seed: int = 0  # draws them
    patch: str = "random"  # as in the trigger of this name
    colours: int = 0  # of a random patch
    size: int = 0  # of the patch in pixels, 0: by the input

    def __post_init__(self) -> None:
        check(self.rate, self.target)

    @property
    def trigger(self) -> Patch:
        """What test images are stamped with."""
        return Patch(self.patch, self.colours, self.size)

    @property
    def training_trigger(self) -> Patch:
        """What images of the pre-training set are stamped with."""
        return Patch(self.patch, self.colours, self.size, inner=0.25)

    def __call__(self, training: ImageSet) -> ImageSet:
        return poison_target_class(training, self.training_trigger, self.target, self.rate, self.seed)
