"""Inverted triggers that a student is trained under: refitted at each use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.training.adversaries import worst_square
from bdclean.training.inversion import GROWN, RAISE, Outlier


class Pursuit:
    """Inverted triggers that are refitted on a student at each use, and start anew when they have grown.

    Of each class, the form that stands out most is taken. `tensors` is all the state, changed in place, for the resume
    state.
    """

    def __init__(self, found: Sequence[Outlier], device: torch.device):
        clearest: dict[int, Outlier] = {}
        for outlier in sorted(found, key=lambda outlier: outlier.size / outlier.limit):
            clearest.setdefault(outlier.target, outlier)
        self.triggers = list(clearest.values())
        self.tensors: dict[str, Tensor] = {}
        for k, trigger in enumerate(self.triggers):
            self.tensors[f"change.{k}"] = self._first(trigger).to(device).clone()
            self.tensors[f"weight.{k}"] = torch.tensor(trigger.form.weight, device=device)

    @staticmethod
    def _first(trigger: Outlier) -> Tensor:
        return trigger.parameters[None].clamp(-trigger.form.reach, trigger.form.reach)

    def stamp(
        self,
        model: Callable[[Tensor], Tensor],
        pixels: Tensor,
        turn: int,
        generator: torch.Generator,
        steps: int = 2,
    ) -> Tensor:
        """`pixels` [n c h w] in [0, 1] under the trigger whose turn it is, after `steps` sign steps on `model`.

        Every other turn of a mask it is a square of its kin: a mask is the least that a network answers to, which may
        be a part of the trigger, or beside it.
        """
        k = turn % len(self.triggers)
        trigger, change, weight = self.triggers[k], self.tensors[f"change.{k}"], self.tensors[f"weight.{k}"]
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
            return worst_square(model, pixels, mask[0, 0], pattern[0], trigger.target, generator)
        return form.stamp(change, pixels)[0]
