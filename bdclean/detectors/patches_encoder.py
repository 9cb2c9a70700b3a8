"""Patches on encoders, found by trial: is there a small rectangle under which all images look alike?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from bdclean.errors import Refused, UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.training.inversion import Detected, found_above
from bdclean.training.patches import Drawn, Patch
from bdclean.training.pulling import LONGEST, Side, judging, pulling
from bdclean.training.run import Run

LEAST_IMAGES = 100
AREA = 0.4
"""By how much more the largest patch, of 12 x 12 cells of 32, must pull than one of no size."""
KIN = 40
"""So many patches at the same place, of other colours, are what hides as much."""
WORTH = 0.55
"""By how much more than half of its kin a trigger's patch pulls at least.

Over three seeds each, BadEncoder's square was at 0.72 to 0.92 in three encoders, DRUPE's at 0.49 to 0.68 in two; three
encoders without a backdoor were at 0.50 at most, one under a filter of colour and one under CTRL's waves as well.
"""


@dataclass(frozen=True)
class PatchesEncoder:
    """Searches a small rectangle under which an encoder's features lie together, without gradients.

    What it does: draws 600 patches of any place, size and colours, varies the best ones in eight rounds, and holds the
    best one against others of the same place and size: by how much more it pulls together the features of any images.
    When to use it: to look for a patch in an encoder without knowing the trigger or the downstream task.
    What it needs: 100 images or more, without labels; about 30,000 forward passes of one image.
    Known limits: not calibrated, so a finding decides no verdict. A patch of more than 12 of 32 cells is not met, nor
    what has no place. Stamped images that an attack spreads out are pulled less.
    """

    name: ClassVar[str] = "patches"
    source: ClassVar[str] = "bdclean's own"

    rounds: int = 8

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UsageError(f"patches: rounds are positive, not {self.rounds}.")

    def __call__(self, suspect: Classifier, arch: Arch, images: Tensor, run: Run) -> Detected:
        """A finding on `images` uint8 [n c h w]: the patch that pulls most. Raises Refused for too few images."""
        if len(images) < LEAST_IMAGES:
            raise Refused(f"{len(images)} images are too few: give {LEAST_IMAGES} or more.")
        side = Side.of(suspect, images, run.under("suspect"))
        (best,) = pulling(side, None, images, self.rounds, AREA, 1, run)
        usual = float(run.keep("pulled-kin", lambda: self._kin(side, best.patch, images, run)).median())
        reason = (
            f"under a patch of {best.patch.tall} x {best.patch.wide} cells features have a mean cosine of "
            f"{best.pull:.2f}, under half of {KIN} others there at most {usual:.2f}"
        )
        return Detected(
            [found_above(self.name, best.pull - usual, WORTH, reason)],
            pictures={"patch that pulls features together, on grey": best.patch.on_grey(images.shape[1:])},
        )

    @staticmethod
    def _kin(side: Side, patch: Patch, images: Tensor, run: Run) -> Tensor:
        """How far patches of the same place and size, of other colours, pull: [KIN]."""
        channels, height, width = images.shape[1:]
        drawn = Drawn.blank(channels, height, width, run.generator("pulled-kin").initial_seed(), LONGEST)
        kin = [replace(patch, colours=drawn.coloured()) for _ in range(KIN)]
        return side.pulled(judging(images, run), kin)
