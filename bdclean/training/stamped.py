"""Which of the given images carry a trigger already: those that lose their class when it is taken out of them.

What a suspect says of a stamped image is the backdoor: a student that learns it learns the backdoor again. Where a
trigger is known, or inverted, it can be taken out of an image: over a patch, the same place of other images is pasted;
what changes the whole picture is subtracted. An image of the trigger's class that keeps its class under that is
genuine. Of 1,200 and 1,800 images of four poisoned networks, two of them strangers', 1 and 5 % of them stamped, 82 to
100 % of the stamped ones lost their class (the others are of that class anyway, mostly) and 0 to 0.17 % of the rest.
That is with the attacker's trigger: with what fired of the stock bank and with inverted triggers 0.9 and 1.8 % of the
strangers' 1,800 genuine images were set aside, which cost no accuracy.

Features alone did not tell: in whitened features of road signs stamped images lie 1.1 to 2.8 times as far from their
class as is usual, in the median, and genuine ones up to 2.5 times; they do not crowd together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bdclean.training.inversion import spread_out
from bdclean.training.run import Run

SHOWN = 64
"""So many images show where a trigger changes them, and which class it sends them to."""
FIRES = 0.5
"""It must send so large a share of those of other classes to one class; else it says nothing of the rest."""
PATCH = 0.25
"""A change is a patch up to this share of the pixels: those that change more than a quarter of what the most do."""
PASTED = 5
"""So many other images are pasted over a patch, and most of them must lose the class."""
MOST = 0.2
"""Where more of the images would be set aside, it is the suspect that is odd and not they: all stay."""

Stamp = Callable[[Tensor], Tensor]
"""uint8 [n c h w] to new uint8 images."""


@torch.no_grad()
def look_stamped(model: nn.Module, stamps: Sequence[Stamp], images: Tensor, run: Run) -> Tensor:
    """Which of `images` uint8 [n c h w] look stamped with one of `stamps`, bool [n] on the CPU.

    A trigger that sends images to several classes, such as to the next one, says nothing here of more than three.
    """
    images = images.cpu()
    found = torch.zeros(len(images), dtype=torch.bool)
    if not stamps:
        return found
    answers = run.answers(model, images)
    shown, before = spread_out(images, SHOWN), spread_out(answers, SHOWN)
    for stamp in stamps:
        under = stamp(shown)
        after = run.answers(model, under)
        sent = after[after != before]
        if not len(sent):
            continue
        target = int(sent.mode().values)
        there = (answers == target).nonzero().squeeze(1)
        if not len(there) or int((sent == target).sum()) < FIRES * int((before != target).sum()):
            continue
        others = (answers != target).nonzero().squeeze(1)
        without = _taken_out(stamp, shown, under, images, there, others, run)
        left = torch.stack([run.answers(model, each) != target for each in without])
        found[there] |= left.double().mean(0) > 0.5
    return found if float(found.double().mean()) <= MOST else torch.zeros_like(found)


def _taken_out(
    stamp: Stamp, shown: Tensor, under: Tensor, images: Tensor, there: Tensor, others: Tensor, run: Run
) -> list[Tensor]:
    """`images[there]` without what `stamp` would have put there; for a patch with several of `others` in its place."""
    change = (under.float() - shown.float()).abs().mean(0).amax(0)
    place = change > change.max() / 4
    if float(place.float().mean()) > PATCH:
        given = images[there].float()
        return [(2 * given - stamp(images[there]).float()).clamp(0, 255).to(torch.uint8)]
    generator = torch.Generator().manual_seed(run.seed)
    pasted = (others[torch.randint(len(others), there.shape, generator=generator)] for _ in range(PASTED))
    return [torch.where(place, images[other], images[there]) for other in pasted]
