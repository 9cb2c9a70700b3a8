"""Inverted triggers: the smallest change that sends images to a class, fitted for many classes together.

Three forms: a soft mask and pattern, after Neural Cleanse (Wang et al. 2019, IEEE S&P); and, bdclean's own, something
added to the whole picture, pixel by pixel or smooth, in kin a targeted universal perturbation (Moosavi-Dezfooli et al.
2017). The loss is the cross-entropy towards the class plus a weight on the change's size, the weight raised while the
success rate is above a goal and lowered otherwise. Departures from Neural Cleanse: all classes are optimised in one
batch, each from several starts, of which fewer go on in each of three rounds; success is averaged over steps; fewer
steps, and classes that fall far behind stop early where there are many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.training.forms import Form
from bdclean.training.known import Known
from bdclean.training.loop import Batch, Measures, State, fit
from bdclean.training.run import Run

LEAST_CLASSES = 3
"""Of fewer there is no median to stand out from."""


RAISE = 1.15
GROWN = 2.0
"""How many times its first size an inverted trigger may grow to while it is refitted."""


ROUNDS = (0.3, 0.2, 0.5)
"""Shares of the steps. After the first the two best starts of each kind go on, after the second the best one.

Where a start ends is chance: of twelve of a trigger's class (a 3x3 grid, its mask 4 pixels at last, those of other
classes 20 and more) four were near it after 100 steps. Starts in a window around it are told from others after 30.
"""


LEADING, ROUND_OF_LEADING = 3, 0.6
"""The smallest changes at last go on for a share of the steps by themselves, until they swing about their least.

One trigger's mask, of 4 pixels at its least, was at 3.8 to 8.7 after the rounds, over twelve seeds: 0.16 to 0.35 of the
median. Few go on, so that it costs little.
"""


TOGETHER = 24
"""How many classes go on after the first round: those with the smallest changes.

A trigger's class leads from early on; the rest of the steps shows by how much, for which several others must go on.
"""


COME_TO_NOTHING = 0.2
"""The success rate under which a start is no use, however small its change: it may have shrunk to none at all. Of ten
classes each has a tenth of the images anyway."""


COUNTED, MOST = 256, 0.5
"""On so many images is it counted how many have a class anyway; with a larger share of them nothing is said of it: a
change counts from a success of 0.6 on, of all images, which one of no size would have."""


SHOWN, FEWEST = 2, 8
"""Starts of a class share SHOWN times the images that one would see, and see so many each at least."""


PIXELS = 1 << 20
"""Pixels that go forward and back at once, 1,024 images of 32 x 32: with more, gradients are added up."""


@dataclass(frozen=True)
class Inverted:
    """Fitted `parameters` [k ...] of a form, for `classes` [k], with the success rate of each [k] on all images."""

    form: Form
    classes: Tensor
    parameters: Tensor
    success: Tensor

    @property
    def sizes(self) -> Tensor:
        return self.form.sizes(self.parameters)

    def select(self, chosen: Tensor) -> Inverted:
        return Inverted(self.form, self.classes[chosen], self.parameters[chosen], self.success[chosen])

    def pack(self) -> Tensor:
        """One tensor [k p + 2] with everything in it, for the resume state."""
        k = len(self.classes)
        kind = self.parameters.dtype
        return torch.cat(
            [self.parameters.reshape(k, -1), self.success.view(k, 1), self.classes.view(k, 1).to(kind)], dim=1
        )

    @staticmethod
    def unpack(packed: Tensor, form: Form) -> Inverted:
        parameters, success, classes = packed.split([packed.shape[1] - 2, 1, 1], dim=1)
        return Inverted(form, classes[:, 0].long(), parameters.reshape(-1, *form.shape), success[:, 0])


class _Fitted(nn.Module):
    """Parameters [rows ...], what steers them [rows], and the smallest that reached the goal, which swing about it.

    All of it is in the resume state.
    """

    weights: Tensor
    success: Tensor
    smallest: Tensor
    size: Tensor

    def __init__(self, changes: Tensor, weight: float):
        super().__init__()
        self.changes = nn.Parameter(changes.clone())
        self.register_buffer("weights", changes.new_full((len(changes),), weight))
        self.register_buffer("success", changes.new_zeros(len(changes)))
        self.register_buffer("smallest", changes.clone())
        self.register_buffer("size", changes.new_full((len(changes),), torch.finfo(changes.dtype).max))

    def note(self, sizes: Tensor, rate: Tensor, goal: float) -> None:
        """Keep the changes of rows whose `rate` of success is at the goal and whose size is the smallest so far."""
        better = (rate >= goal) & (sizes < self.size)
        self.smallest[better], self.size[better] = self.changes.detach()[better], sizes[better]


def invert(
    model: nn.Module,
    images: Tensor,
    form: Form,
    classes: Tensor,
    run: Run,
    *,
    steps: int = 100,
    batch_size: int = 32,
) -> Inverted:
    """Fit a change of `form` for each of `classes` [k] on `model`, which is put into evaluation mode.

    `images` are uint8 [n c h w]. A class is shown `batch_size` of them a step, whatever class they are of; more, but
    fewer each, while several of its starts go on. Returned are the classes that were fitted to the end, which are at
    most as many as go on `together`.
    """
    model.eval()
    stage = f"invert-{form.name}"
    rows, kinds = form.start(len(classes), run.generator(stage, "start"))
    starts = rows.shape[1]
    kinds = kinds.to(run.device).repeat(len(classes))
    going = Inverted(
        form,
        classes.to(run.device).repeat_interleave(starts),
        rows.flatten(0, 1),
        rows.new_zeros(kinds.shape),
    )
    for number, share in enumerate(ROUNDS):

        def fitted(going: Inverted = going, number: int = number, share: float = share) -> Tensor:
            return _fit_round(
                model, images, going, stage, number, max(1, round(share * steps)), batch_size, run
            ).pack()

        going = Inverted.unpack(run.keep(f"{stage}-{number}", fitted), form)
        kept = _best(going, kinds, most=2) if number == 0 else _best(going, torch.zeros_like(kinds), most=1)
        if number == 0:
            kept = kept[torch.isin(going.classes[kept], _leading(going, kept, form.together or TOGETHER))]
        going, kinds = going.select(kept), kinds[kept]
    found = _further(model, images, going, stage, max(1, round(ROUND_OF_LEADING * steps)), batch_size, run)
    answers = run.answers(model, spread_out(images, COUNTED)).to(run.device)
    anyway = (answers[:, None] == found.classes).float().mean(0)
    # what has most images anyway takes hardly a change to reach
    return dataclasses.replace(found, success=found.success.masked_fill(anyway > MOST, 0))


def _further(
    model: nn.Module, images: Tensor, going: Inverted, stage: str, steps: int, batch_size: int, run: Run
) -> Inverted:
    """`going`, whose LEADING smallest changes were fitted for `steps` more steps."""
    idle = going.success < COME_TO_NOTHING
    leading = going.sizes.masked_fill(idle, torch.inf).argsort()[:LEADING]

    def fitted() -> Tensor:
        number = len(ROUNDS)
        return _fit_round(model, images, going.select(leading), stage, number, steps, batch_size, run).pack()

    ahead = Inverted.unpack(run.keep(f"{stage}-{len(ROUNDS)}", fitted), going.form)
    parameters, success = going.parameters.clone(), going.success.clone()
    smaller = ahead.sizes < going.sizes[leading]
    parameters[leading[smaller]], success[leading[smaller]] = (
        ahead.parameters[smaller],
        ahead.success[smaller],
    )
    return Inverted(going.form, going.classes, parameters, success)


def _fit_round(
    model: nn.Module, images: Tensor, going: Inverted, stage: str, number: int, steps: int, batch_size: int, run: Run
) -> Inverted:  # fmt: skip
    """`going` after `steps` more steps."""
    form, classes = going.form, going.classes
    begun = sum(ROUNDS[:number])
    ended = begun + (ROUNDS[number] if number < len(ROUNDS) else 0.0)
    fitted = _Fitted(going.parameters, form.weight)
    optimiser = torch.optim.Adam(fitted.parameters(), lr=form.rate, betas=(0.5, 0.9))
    starts = len(classes) // len(classes.unique())
    shown = max(FEWEST, min(batch_size, SHOWN * batch_size // starts))

    def step(batch: Batch) -> tuple[None, Measures]:
        optimiser.zero_grad()
        rate = torch.zeros_like(fitted.success)
        pixels = batch.images[:shown].float() / 255
        at_once = max(1, PIXELS // pixels[0, 0].numel())
        for part in chunks(len(classes), max(1, at_once // len(pixels))):
            rows = part.to(run.device)
            for few in pixels.split(at_once):
                changes, share = fitted.changes[rows], len(few) / len(pixels)
                logits = run.forward(model, form.stamp(changes, few).flatten(0, 1)).float()
                targets = classes[rows].repeat_interleave(len(few))
                losses = F.cross_entropy(logits, targets, reduction="none").view(len(rows), -1).mean(1)
                total = share * (losses + fitted.weights[rows] * form.sizes(changes)).sum()
                # only the changes' gradients: the network's own weights get none
                total.backward(inputs=[fitted.changes])
                rate[rows] += share * (logits.argmax(1) == targets).float().view(len(rows), -1).mean(1)
        fitted.note(form.sizes(fitted.changes.detach()), rate, form.goal)
        optimiser.step()
        fitted.success.copy_(rate if batch.step == 0 else fitted.success.lerp(rate, 0.2))
        fitted.weights.mul_(torch.where(rate > form.goal, RAISE, 1 / RAISE)).clamp_(1e-6, 1.0)
        return None, {"success": fitted.success.mean()}

    def schedule(step: int) -> float:
        done = begun + (ended - begun) * step / max(1, steps)
        return form.rate + (form.last_rate - form.rate) * done

    state = State(f"{stage}-{number}", fitted, optimiser, images, None, batch_size, steps, schedule)
    fit(step, state, run)
    last = number >= len(ROUNDS) - 1
    return Inverted(form, classes, fitted.smallest if last else fitted.changes.detach(), fitted.success)


def _worth(going: Inverted) -> Tensor:
    """The less, the better [k]: small, and with success; those that came to nothing stand behind all others."""
    worth = going.sizes / going.success.clamp_min(0.05)
    return worth + 2 * worth.max() * (going.success < COME_TO_NOTHING)


def _best(going: Inverted, kinds: Tensor, most: int) -> Tensor:
    """Indices of the `most` best rows of each class and kind, in order."""
    worth = _worth(going)
    groups: dict[tuple[int, int], list[int]] = {}
    for row in worth.argsort(stable=True).tolist():
        groups.setdefault((int(going.classes[row]), int(kinds[row])), []).append(row)
    return torch.tensor(sorted(row for group in groups.values() for row in group[:most]), device=worth.device)


def _leading(going: Inverted, kept: Tensor, most: int) -> Tensor:
    """The `most` classes whose best of the rows `kept` is smallest, for its success."""
    best = kept[_worth(going)[kept].argsort()]
    return torch.tensor(list(dict.fromkeys(going.classes[best].tolist()))[:most], device=kept.device)


def chunks(total: int, size: int) -> Iterator[Tensor]:
    """Indices 0..total-1 in runs of at most `size`."""
    for first in range(0, total, size):
        yield torch.arange(first, min(total, first + size))


def outliers(inverted: Inverted, usual: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Which changes are unusually small, bool [k]; each one's anomaly index [k]; and the size under which one counts.

    That size is the form's share of the median of what is `usual` [m], else of the changes themselves (0 of fewer than
    three classes): unlike the index, (median - size) / (1.4826 * median absolute deviation) as in Neural Cleanse, it
    does not depend on how alike the other classes happen to be. A class that does not reach its success would need more
    than its size, so it can raise the median, and is never small itself.
    """
    sizes = inverted.sizes
    usual = sizes if usual is None else usual
    if len(usual) < LEAST_CLASSES:
        return torch.zeros_like(sizes, dtype=torch.bool), torch.zeros_like(sizes), 0.0
    median = usual.median()
    spread = 1.4826 * (usual - median).abs().median()
    index = (median - sizes) / spread.clamp_min(1e-6 * float(median) + 1e-9)
    limit = float(median) * inverted.form.small
    return _able(inverted) & (sizes < limit), index, limit


def _able(inverted: Inverted) -> Tensor:
    """Which changes succeed, bool [k]."""
    return inverted.success >= inverted.form.least


def smallest(inverted: Inverted) -> int:
    """The row of the smallest change: of those that succeed, if any does."""
    sizes, able = inverted.sizes, _able(inverted)
    return int((sizes.masked_fill(~able, torch.inf) if able.any() else sizes).argmin())


def smallness(inverted: Inverted) -> float:
    """By what factor the least size of a change that succeeds lies below the median, as a natural logarithm, >= 0."""
    able = _able(inverted)
    if len(able) < LEAST_CLASSES or not able.any():
        return 0.0
    return max(0.0, float((inverted.sizes.median() / inverted.sizes[able].min().clamp_min(1e-9)).log()))


@dataclass(frozen=True)
class Outlier:
    """One inverted trigger that is unusually small: `parameters` of `form` that send images to class `target`."""

    form: Form
    target: int
    parameters: Tensor
    size: float
    limit: float

    def __call__(self, images: Tensor) -> Tensor:
        """`images` uint8 [n c h w] under it, on the CPU."""
        return torch.cat(
            [self._stamped(part) for part in images.split(max(1, PIXELS // images[0, 0].numel()))]
        )

    def _stamped(self, images: Tensor) -> Tensor:
        pixels = images.to(self.parameters.device).float() / 255
        return (255 * self.form.stamp(self.parameters[None], pixels)[0]).round().to(torch.uint8).cpu()


@dataclass
class Detected:
    """What a detector hands back."""

    findings: list[dict[str, Any]] = field(default_factory=list)
    """Fields of `record.Finding`."""
    outliers: list[Outlier] = field(default_factory=list)
    """What of it stands out, for a recipe to work against."""
    pictures: dict[str, Tensor] = field(default_factory=dict)
    """Caption -> float [c h w] in [0, 1]; never an image of the user's."""
    statistic: float | None = None
    """One number for the whole network, larger for what is odder, to be held against those of clean networks."""
    uncounted: list[dict[str, Any]] = field(default_factory=list)
    """Findings of what the statistic leaves out: they decide nothing, however odd it is."""
    stamps: list[Known] = field(default_factory=list)
    """What stands out and sends images to no one class; it is not among the outliers."""
    limits: dict[str, float] = field(default_factory=dict)
    """Form by name -> the size under which a change was unusually small in this network."""


def found_above(detector: str, score: float, limit: float, reason: str) -> dict[str, Any]:
    """A finding of `detector` whose `score` is the odder, the larger it is: an outlier from `limit` on."""
    return {
        "detector": detector,
        "verdict": "outlier" if score >= limit else "no-outlier",
        "score": score,
        "threshold": limit,
        "odd": "above",
        "reason": reason,
    }


FEW_IMAGES = 24
"""How many images are enough where many changes are tried on each."""


def spread_out(images: Tensor, count: int = FEW_IMAGES) -> Tensor:
    """`count` images from all over the set: of all classes, where it is sorted by class."""
    few = min(count, len(images))
    return images[torch.arange(few, device=images.device) * len(images) // max(1, few)]


def sent_by(form: Form, changes: Tensor, model: nn.Module, images: Tensor, run: Run) -> Tensor:
    """The share of `images` uint8 [n c h w] of other classes that each of `changes` [m ...] sends to each class.

    Returns [m classes], at most 1; negative where a class loses its own. Little is said of a class that has nearly all.

    Stripes act only as a whole: gradients do not find them, and there are few enough to try all.
    """
    model.eval()
    pixels = images.to(run.device).float() / 255

    def answers(x: Tensor) -> Tensor:
        with torch.no_grad():
            return run.forward(model, x).float().softmax(1)

    usual = answers(pixels).mean(0)
    rows = [answers(form.stamp(one[None].to(run.device), pixels)[0]).mean(0) - usual for one in changes]
    return torch.stack(rows) / (1 - usual).clamp_min(0.2)
