"""Inverted triggers that a student is trained under: refitted at each use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.training.drawing import SAMPLE_SPECIFIC
from bdclean.training.inversion import GROWN, RAISE, Outlier, spread_out
from bdclean.training.patches import Drawn, Patch, of_others, scored, search
from bdclean.training.run import Run

TRIED, JUDGED = 16, 8
"""So many patches are tried on a batch, each on so many of its images."""
REMEMBERED = 0.8
"""Of what a trigger sent is kept at each use of it: one use, of a quarter of a batch, tells 0.02 at best."""
UNSEEN = -2.0
"""Stands for what a trigger sends before its first use: no share, and a number, as all state must be."""
SHOWN = 64
"""On so many images of other classes is what a search for patches found judged."""


class Pursuit:
    """Inverted triggers that are refitted on a student at each use, and start anew when they have grown.

    Of each class, the form that stands out most is taken; beside a sample-specific one, the next one for all images.
    Beside a mask go patches that were found by trial on the `suspect`, with `images` uint8 [n c h w]. `tensors` is all
    the state, changed in place, for the resume state.
    """

    def __init__(self, found: Sequence[Outlier], suspect: nn.Module, images: Tensor, run: Run):
        self.triggers = clearest(found)
        self.tensors: dict[str, Tensor] = {}
        for k, trigger in enumerate(self.triggers):
            self.tensors[f"change.{k}"] = self._first(trigger).to(run.device).clone()
            self.tensors[f"weight.{k}"] = torch.tensor(trigger.form.weight, device=run.device)
            self.tensors[f"sent.{k}"] = torch.tensor(UNSEEN, device=run.device)
        self.patches = [_patches(trigger, suspect, images, run) for trigger in self.triggers]

    @staticmethod
    def _first(trigger: Outlier) -> Tensor:
        return trigger.parameters[None].clamp(-trigger.form.reach, trigger.form.reach)

    def whose(self, turn: int) -> Outlier:
        """The trigger whose turn it is."""
        return self.triggers[turn % len(self.triggers)]

    def sent(self, turn: int, gone: Tensor) -> Tensor:
        """The share of images that the trigger whose turn it is sends to its class, a mean that forgets; [].

        `gone` [n classes]: by how much the probabilities of n images rise under it. What it does to other classes is
        not counted: of a weak network any change moves some.
        """
        target, mean = self.whose(turn).target, self.tensors[f"sent.{turn % len(self.triggers)}"]
        now = gone[:, target].mean()
        mean.copy_(torch.where(mean == UNSEEN, now, REMEMBERED * mean + (1 - REMEMBERED) * now))
        return mean

    def stamp(
        self,
        model: Callable[[Tensor], Tensor],
        pixels: Tensor,
        turn: int,
        generator: torch.Generator,
        steps: int = 2,
    ) -> Tensor:
        """`pixels` [n c h w] in [0, 1] under the trigger whose turn it is, after `steps` sign steps on `model`.

        Every other turn of a mask it is the worst of patches: near what the mask covers now, and of those found on the
        suspect, some of them varied.
        """
        k = turn % len(self.triggers)
        trigger, change, weight = self.whose(turn), self.tensors[f"change.{k}"], self.tensors[f"weight.{k}"]
        form, targets = trigger.form, torch.full((len(pixels),), trigger.target, device=pixels.device)
        if float(form.sizes(change)) > min(trigger.limit, GROWN * trigger.size):
            change.copy_(self._first(trigger))
            weight.fill_(form.weight)
        for _ in range(steps):
            leaf = change.clone().requires_grad_(True)
            logits = model(form.stamp(leaf, pixels)[0])
            loss = F.cross_entropy(logits, targets) + (weight * form.sizes(leaf)).sum()
            (gradient,) = torch.autograd.grad(loss, [leaf])
            change -= form.push * gradient.sign()
            rising = float((logits.argmax(1) == targets).float().mean()) > form.goal
            weight.mul_(RAISE if rising else 1 / RAISE).clamp_(1e-6, 1.0)
        if form.parts is not None and turn // len(self.triggers) % 2:
            mask, pattern = form.parts(change)
            seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
            drawn, found = Drawn(mask[0, 0], pattern[0], seed), self.patches[k]
            tried = [drawn.near() for _ in range(TRIED // 2 if found else TRIED)]
            tried += [drawn.varied(found) if j % 2 else drawn.one(found) for j in range(TRIED - len(tried))]
            return scored(model, pixels[:JUDGED], tried, trigger.target)[0][0].stamp(pixels)
        return form.stamp(change, pixels)[0]


def clearest(found: Sequence[Outlier]) -> list[Outlier]:
    """Of each class what stands out most, the clearest first, up to the first one that is the same for all images."""
    taken: list[Outlier] = []
    done: set[int] = set()
    for outlier in sorted(found, key=lambda outlier: outlier.size / outlier.limit):
        if outlier.target not in done:
            taken.append(outlier)
        if outlier.form.name != SAMPLE_SPECIFIC:
            done.add(outlier.target)
    return taken


def _patches(trigger: Outlier, suspect: nn.Module, images: Tensor, run: Run) -> list[Patch]:
    """What sends `images` of other classes to that of a mask, found by trial; nothing of other forms."""
    if trigger.form.parts is None:
        return []
    shown = spread_out(images, 4 * SHOWN)
    pixels = of_others(shown, run.answers(suspect, shown), trigger.target, SHOWN, run.device)
    if not len(pixels):
        return []
    mask, pattern = trigger.form.parts(trigger.parameters[None])
    seed = run.generator("patches", trigger.target).initial_seed()
    found = search(partial(run.forward, suspect), pixels, Drawn(mask[0, 0], pattern[0], seed), trigger.target)
    return [patch for patch, _ in found]
