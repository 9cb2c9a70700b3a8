"""Patches found by trial: is some class reached by a small rectangle, whatever the image?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.training.forms import mask
from bdclean.training.inversion import GROWN, Detected, Outlier, found_above, spread_out
from bdclean.training.patches import Drawn, Forward, Patch, answers, of_others, search
from bdclean.training.run import Run

DRAWN, SHOWN = 100, 16
"""So many patches for each round are drawn at random first, each on so many images.

Of six small networks of ten classes or two whose trigger is a square, 256 and 1,024 draws raised its class most each of
four times; of two with 43 classes and 2 x 2 pixels two and six of eight times (1,024: else third and fifth).
"""
SEARCHED = 4
"""For so many classes, those that the draws raise most, a patch is searched for."""
JUDGED = 48
"""So many images of other classes judge what was found."""
AREA = 1.0
"""By how much more the largest patch, of 8 x 8 cells of 32, must raise a class's probability than one of no size."""
WORTH = 0.25
"""What a trigger's patch is worth at least: the rise that it brings less what its area costs.

Of 40 small networks without a backdoor the highest was 0.05; of six with a square of 2 to 4 pixels the least 0.27.
A stranger's network has 0.94 for its trigger's class, and 0.73 for another, so only the best one counts.
"""


@dataclass(frozen=True)
class Patches:
    """Searches small rectangles of few colours that send images to a class, without gradients.

    What it does: draws 1,000 patches of any place, size and colours; for the four classes that they raise most varies
    the best ones in ten rounds. A patch's worth is by how much it raises the class's mean probability, less a cost of
    its area.
    When to use it: to look for patches without knowing the trigger, with any number of classes.
    What it needs: 100 images or more, without labels. Its cost does not depend on the number of classes: about 50,000
    forward passes of one image.
    Known limits: no finding decides a verdict by itself, only its rank among clean networks. Patches of one or two
    pixels, and pixels that lie apart, are missed where the draws do not meet them (a stranger's grid by four seeds of
    five); what is spread over the picture is not looked for. One class is told at most.
    """

    name: ClassVar[str] = "patches"
    source: ClassVar[str] = "bdclean's own"

    rounds: int = 10

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UsageError(f"patches: rounds are positive, not {self.rounds}.")

    def __call__(self, suspect: Classifier, arch: Arch, images: Tensor, run: Run) -> Detected:
        """A finding on `images` uint8 [n c h w]: the class that a patch is worth most for, an outlier or not."""
        suspect.eval()
        channels, height, width = images.shape[1:]
        form = mask(height, width, channels)
        packed = run.keep("patches", lambda: self._searched(suspect, images, run))
        best, *others = packed[packed[:, 1].argsort(descending=True)]
        target, worth, rise = int(best[0]), float(best[1]), float(best[2])
        patch = best[3:].view(form.shape)
        size, outlying = float(form.sizes(patch[None])), worth >= WORTH
        others_worth = max((float(row[1]) for row in others), default=0.0)
        finding = found_above(
            self.name, worth, WORTH,
            f"a patch of {size:.0f} pixels raises class {target} by {100 * rise:.0f} % (worth {worth:.2f}; "
            f"of the next classes at most {others_worth:.2f})",
        )  # fmt: skip
        return Detected(
            [finding],
            [Outlier(form, target, patch, size, GROWN * size)] if outlying else [],
            {f"patch found for class {target}, on grey": form.picture(patch)},
            worth,
        )

    def _searched(self, suspect: Classifier, images: Tensor, run: Run) -> Tensor:
        """Rows of class, worth, rise, and the patch as parameters of a mask: [searched 3 + (1 + c) h w]."""
        forward, (channels, height, width) = partial(run.forward, suspect), images.shape[1:]
        seed = run.generator("patches").initial_seed()
        drawn = Drawn.blank(channels, height, width, seed)
        shown = spread_out(images, SHOWN).to(run.device).float() / 255
        usual = self._usual(forward, shown)
        rises = answers(forward, shown, [drawn.anywhere() for _ in range(DRAWN * self.rounds)]) - usual
        leading = (rises.amax(0) / (1 - usual).clamp_min(0.2)).topk(min(SEARCHED, len(usual))).indices
        judged = spread_out(images, 8 * JUDGED)
        classes = run.answers(suspect, judged)
        rows = []
        for done, target in enumerate(leading.tolist()):
            run.tell("patches", done, len(leading))
            pixels = of_others(judged, classes, target, JUDGED, run.device)
            if not len(pixels):
                continue
            drawn = Drawn.blank(channels, height, width, seed)
            patch, sent = search(forward, pixels, drawn, target, AREA, self.rounds, most=1)[0]
            rise = sent - float(self._usual(forward, pixels)[target])
            about = torch.tensor([target, rise - AREA * patch.size, rise], device=run.device)
            rows.append(torch.cat([about, _logits(patch, pixels).flatten()]))
        run.tell("patches", len(leading), len(leading))
        return torch.stack(rows)

    @staticmethod
    def _usual(forward: Forward, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return forward(pixels).float().softmax(1).mean(0)


def _logits(patch: Patch, pixels: Tensor, sure: float = 6.0) -> Tensor:
    """The parameters of a mask, float [1 + c h w], that shows `patch`: +- `sure`, and its colours' logits."""
    black, white = torch.zeros_like(pixels[:1]), torch.ones_like(pixels[:1])
    shown = patch.stamp(black)[0]
    covered = (shown == patch.stamp(white)[0]).all(0, keepdim=True)
    bound = torch.sigmoid(torch.tensor(sure)).item()
    return torch.cat([torch.where(covered, sure, -sure), torch.logit(shown.clamp(1 - bound, bound))])
