"""All-to-all: does some small rectangle send each class to a class of its own?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.training.inversion import Detected, found_above, spread_out
from bdclean.training.patches import Drawn, Forward, FoundPatch, Patch, evolved, under_each
from bdclean.training.run import Run

DRAWN, BEGUN = 100, 64
"""So many patches for each round are drawn at random first; of those that take most images from their class so many go
on."""
ASKED = 512
"""The classes of so many images are asked for, to take some of each."""
SOURCES, FEW, SHOWN = 8, 3, 8
"""Of so many classes so many images each tell patches apart; so many others each judge what was found."""
AREA = 0.25
"""By how much more the largest patch, of 8 x 8 cells of 32, must send apart than one of no size."""
WORTH = 0.25
"""What such a trigger's patch sends apart at least, on other images.

Of 40 small networks without a backdoor, of 2 to 43 classes, the highest was 0.14; of those with a backdoor towards
one class 0.16. Two under an all-to-all patch were at 0.51 to 0.56.
"""
MOST = 6
"""So many patches are told, unlike each other."""


@dataclass(frozen=True)
class AllToAll:
    """Searches small rectangles of few colours that send each class to another one of its own, without gradients.

    What it does: draws 1,000 patches of any place, size and colours; varies those that take most images from their
    class in ten rounds. A patch is worth what it raises, of each class, the one that rises most, in the mean over
    classes, less what it raises the one class that most go to: what a patch hides sends images to a few classes.
    When to use it: to look for all-to-all backdoors without knowing the trigger; no class stands out under those.
    What it needs: of 512 images, without labels, 6 that the network sees as one class and 6 as another. Its cost does
    not depend on the number of classes: about 42,000 forward passes of one image.
    Known limits: patches alone; those of one or two pixels, and pixels that lie apart, are missed where the draws do
    not meet them.
    """

    name: ClassVar[str] = "all-to-all"
    source: ClassVar[str] = "bdclean's own"

    rounds: int = 10

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UsageError(f"all-to-all: rounds are positive, not {self.rounds}.")

    def __call__(self, suspect: Classifier, arch: Arch, images: Tensor, run: Run) -> Detected:
        """A finding on `images` uint8 [n c h w]: what the best patch sends apart."""
        suspect.eval()
        asked, shape = spread_out(images, ASKED), (images.shape[1], images.shape[2], images.shape[3])
        sources = _of_each(run.answers(suspect, asked).cpu())
        if len(sources) < 2:
            said = "the network sees too few classes in these images for that"
            return Detected([found_above(self.name, 0.0, WORTH, said)])
        few, others = (
            [(class_, at[part]) for class_, at in sources] for part in (slice(FEW), slice(FEW, None))
        )
        search, judge = (
            _Apart(partial(run.forward, suspect), asked, part, run.device) for part in (few, others)
        )

        def searched() -> Tensor:
            drawn = Drawn.blank(*shape, run.generator("all-to-all").initial_seed())
            first = [drawn.anywhere() for _ in range(DRAWN * self.rounds)]
            sizes = torch.tensor([patch.size for patch in first], device=run.device)
            begun = (search.taken(first) - AREA * sizes).topk(min(BEGUN, len(first))).indices.tolist()
            found = evolved(
                drawn, [first[k] for k in begun], search.worth, AREA, self.rounds, MOST,
                lambda done: run.tell(self.name, done, self.rounds),
            )  # fmt: skip
            about = torch.stack([judge.worth(found), judge.taken(found)], 1)
            return torch.cat([about, torch.stack([patch.pack() for patch in found]).to(about)], 1)

        rows = run.keep("all-to-all", searched).cpu()
        rows = rows[rows[:, 0].argsort(descending=True, stable=True)]
        (worth, taken), patches = rows[0, :2].tolist(), [Patch.unpack(row) for row in rows[:, 2:]]
        said = f"a patch of {patches[0].tall} x {patches[0].wide} cells takes {100 * taken:.0f} % of the images of "
        said += (
            f"{len(sources)} classes from these; that each goes to a class of its own is worth {worth:.2f}"
        )
        return Detected(
            [found_above(self.name, worth, WORTH, said)],
            pictures={"patch found for all classes, on grey": patches[0].on_grey(shape)},
            statistic=worth,
            stamps=[FoundPatch(patch, shape) for patch in patches] if worth >= WORTH else [],
        )


class _Apart:
    """How far patches send apart the classes of some images: `sources` are classes with indices of `images`."""

    def __init__(
        self, forward: Forward, images: Tensor, sources: list[tuple[int, Tensor]], device: torch.device
    ) -> None:
        self.forward = forward
        self.pixels = images[torch.cat([at for _, at in sources])].to(device).float() / 255
        self.classes = torch.tensor([class_ for class_, _ in sources], device=device)
        groups = torch.repeat_interleave(torch.tensor([len(at) for _, at in sources]))
        shares = F.one_hot(groups).float()
        self.shares = (shares / shares.sum(0)).to(device)
        with torch.no_grad():
            self.usual = self.shares.T @ forward(self.pixels).float().softmax(1)

    def worth(self, patches: Sequence[Patch]) -> Tensor:
        """Of each class what rises most, in the mean, less what rises most in the mean over classes: [patches]."""
        return under_each(self.forward, self.pixels, patches, self._apart)

    def taken(self, patches: Sequence[Patch]) -> Tensor:
        """The mean share that the class of an image loses, [patches]."""
        return under_each(self.forward, self.pixels, patches, self._taken)

    def _apart(self, logits: Tensor) -> Tensor:
        rises = (self._of_classes(logits) - self.usual).clamp_min(0)
        rises[:, torch.arange(len(self.classes)), self.classes] = 0
        return rises.amax(2).mean(1) - rises.mean(1).amax(1)

    def _taken(self, logits: Tensor) -> Tensor:
        lost = self.usual - self._of_classes(logits)
        return lost[:, torch.arange(len(self.classes)), self.classes].mean(1)

    def _of_classes(self, logits: Tensor) -> Tensor:
        """Mean probabilities of the images of each class: [patches sources classes]."""
        return torch.einsum("pnc,ns->psc", logits.softmax(2), self.shares)


def _of_each(classes: Tensor) -> list[tuple[int, Tensor]]:
    """Of `classes` int64 [n] the SOURCES that most images have, if they are twice FEW; which, FEW and SHOWN of each."""
    counts = torch.bincount(classes)
    kept = [
        c for c in counts.argsort(descending=True, stable=True).tolist()[:SOURCES] if counts[c] >= 2 * FEW
    ]
    return [(c, spread_out((classes == c).nonzero().squeeze(1), FEW + SHOWN)) for c in sorted(kept)]
