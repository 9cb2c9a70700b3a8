"""CTRL: a faint wave on images of the target class that augmentations leave alone (Li et al. 2023, 2210.07346)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdclean.attacks.poisoning import check, poison_target_class
from bdclean.data.imageset import ImageSet
from bdclean.triggers.ctrl import CTRL as Waves


@dataclass(frozen=True)
class CTRL:
    """Stamps colour waves on some images of the target class before pre-training (2210.07346).

    What it does: adds CTRL's two cosines to a seeded share of the target class; no label plays a part.
    When to use it: to make an encoder poisoned through its data, with a trigger that crops and mirrors leave alone.
    What it needs: labeled images, whose labels say only which ones show the target class; long pre-training.
    Known limits: published strength rests on augmenting a whole batch alike: with views drawn image by image, as
    here, others measured 18 % where the authors' code gave 82 %; it fails on large images. Where pre-training has
    hundreds of steps, views hide waves of 100: `rate` 1 and a `training_magnitude` of 500 were learnt on road signs.

    The authors stamp 500 of CIFAR-10's 5,000 images of a class, the first ones; here a seeded draw of 10 %. Their code
    stamps test images with the magnitude of the training images, 100; their paper's are said to be 100 and 50.
    """

    name: ClassVar[str] = "ctrl"
    kind: ClassVar[str] = "pre-training"
    source: ClassVar[str] = "arXiv 2210.07346"

    target: int = 0  # the class whose images are stamped
    rate: float = 0.1  # share of its images, in [0, 1]
    seed: int = 0  # draws them
    magnitude: float = 100.0  # in grey levels, of the cosine transform's coefficients, on test images
    training_magnitude: float = 0.0  # the same on images of the pre-training set, 0: as on test images

    def __post_init__(self) -> None:
        check(self.rate, self.target)
        _ = self.trigger, self.training_trigger  # which check the magnitudes

    @property
    def trigger(self) -> Waves:
        """What test images are stamped with."""
        return Waves(magnitude=self.magnitude)

    @property
    def training_trigger(self) -> Waves:
        """What images of the pre-training set are stamped with."""
        return Waves(magnitude=self.training_magnitude or self.magnitude)

    def __call__(self, training: ImageSet) -> ImageSet:
        return poison_target_class(training, self.training_trigger, self.target, self.rate, self.seed)
