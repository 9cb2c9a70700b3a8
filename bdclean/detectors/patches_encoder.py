"""Patches on encoders, found by trial: is there a small rectangle under which all images look alike?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import Refused, UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.training.encoder_lesson import mean_feature
from bdclean.training.inversion import Detected, spread_out
from bdclean.training.patches import Drawn, Patch
from bdclean.training.pulling import AVERAGED, JUDGED, LONGEST, pulled, pulling
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
    What it needs: 100 images or more, without labels; about 27,000 forward passes of one image.
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
        (best,) = pulling(suspect.eval(), None, images, self.rounds, AREA, 1, run)
        usual = float(run.keep("pulled-kin", lambda: self._kin(suspect, best.patch, images, run)).median())
        channels, height, width = images.shape[1:]
        tall, wide = best.patch.tall, best.patch.wide
        finding = {
            "detector": self.name,
            "verdict": "outlier" if best.pull - usual >= WORTH else "no-outlier",
            "score": best.pull - usual,
            "threshold": WORTH,
            "odd": "above",
            "reason": f"under a patch of {tall} x {wide} cells features have a mean cosine of {best.pull:.2f}, under "
            f"half of {KIN} others there at most {usual:.2f}",
        }
        grey = torch.full((1, channels, height, width), 0.5)
        return Detected(
            [finding], pictures={"patch that pulls features together, on grey": best.patch.stamp(grey)[0]}
        )

    @staticmethod
    def _kin(suspect: Classifier, patch: Patch, images: Tensor, run: Run) -> Tensor:
        """How far patches of the same place and size, of other colours, pull: [KIN]."""
        channels, height, width = images.shape[1:]
        drawn = Drawn.blank(channels, height, width, run.generator("pulled-kin").initial_seed(), LONGEST)
        kin = [replace(patch, colours=drawn.coloured()) for _ in range(KIN)]
        pixels = spread_out(images, 2 * JUDGED)[1::2].to(run.device).float() / 255
        centre = mean_feature(suspect, spread_out(images, AVERAGED), run.under("suspect"))
        return pulled(partial(run.forward, suspect), centre, pixels, kin)
