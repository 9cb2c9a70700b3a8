"""Model orthogonalization: triggers between pairs of classes are made, and unlearned with the images' own labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.training.forms import Form, mask
from bdclean.training.loop import Batch, Measures, State, fit, updates
from bdclean.training.run import Run
from bdclean.training.students import Augmentation, set_batch_statistics, uncorrupted

TURN = 3
"""Steps that a pair of classes is trained on before the next is chosen."""
PATIENCE, RAISE = 10, 1.5
"""Steps of success, or of failure, after which the weight on a mask's size is raised, or lowered by RAISE ** 1.5."""
LARGEST = 0.25
"""Of the image: a trigger whose mask is larger is not stamped."""
FIRST_WEIGHT, LATER_WEIGHT = 1e-3, 1e-2
"""On a mask's size: of a trigger that is made anew, and of one that goes on."""
SHOWN = 32
"""Images that a step of a trigger's fit sees."""
WARM, LATER = 2.5, 0.25
"""Steps of a fit in the warm-up, and at later steps of a turn, as multiples of those at its first. After a fit that
found no trigger the next one is a first one again."""
LEVEL = 3.0
"""The logit that stands for a pixel of the mask that is nearly on, or nearly off: triggers go on from within it."""


@dataclass(frozen=True)
class DistanceHardening:
    """MOTH, class distance hardening (Tao et al., IEEE S&P 2022).

    Warm-up: for each class a trigger that sends all others to it is made, and one training step stamps it on half of
    the batch. Then pairs of classes: the smallest masks that send either to the other, stamped on images whose labels
    stay; the next pair is the one whose distance (the mask's size) grew most, at first the one that the warm-up found
    easiest, sometimes any. Settings are the authors' code's, but for the learning rate, which is 1e-3 as in
    backdoor-toolbox's version for a few thousand images (the authors' 1e-4 goes with all 50,000).

    Departures: a pair's triggers are fitted to images of the whole set, not of the batch, and at least one image of
    either class is stamped; a fit sees SHOWN images a step; batch norm ends with the statistics of unstamped images;
    each class's latest trigger is kept rather than each
    pair's, so that memory grows with classes; the choice moves from the warm-up's order to the growth of distances over
    the whole training rather than over 1,000 steps.
    """

    epochs: float = 2
    batch_size: int = 128
    rate: float = 1e-3
    momentum: float = 0.9
    warm_share: float = 0.5  # of a batch's images of other classes that the warm-up stamps
    share: float = 0.1  # of a batch's images of a pair's classes that are stamped
    random_pairs: float = 0.3  # probability
    fit_steps: int = (
        200  # of a pair's triggers at the first step of its turn; WARM and LATER times as many otherwise
    )

    def __call__(
        self, model: Classifier, labeled: ImageSet, run: Run, stage: str = "distance hardening"
    ) -> list[dict[str, float]]:
        """Harden `model` in place, leave it in evaluation mode, and return the curve.

        Raises Refused where `labeled` has no labels or one class.
        """
        if labeled.labels is None or len(labeled.labels.unique()) < 2:
            raise Refused("class distance hardening needs labeled images of at least two classes.")
        model.to(run.device)
        state = _Distances(labeled, run)
        warm = len(state.classes)
        steps = warm + updates(self.epochs, len(labeled), self.batch_size)

        def step(batch: Batch) -> tuple[Tensor, Measures]:
            assert batch.labels is not None
            pixels, labels = batch.images.float() / 255, batch.labels
            if batch.step < warm:
                pixels = self._warm_up(model, state, pixels, labels, batch, run)
            else:
                pixels = self._pair(model, state, pixels, labels, batch, batch.step - warm, run)
            logits = run.forward(model.train(), pixels).float()
            right = (logits.argmax(1) == labels).float().mean()
            found = state.sizes[state.sizes > 0]
            return F.cross_entropy(logits, labels), {"accuracy": right, "mask": found.mean()}

        optimiser = torch.optim.SGD(model.parameters(), self.rate, momentum=self.momentum, nesterov=True)
        curve = fit(
            step,
            State(
                stage, model, optimiser, labeled.images, labeled.labels, self.batch_size, steps, extra=state.tensors
            ),
            run,
        )  # fmt: skip
        set_batch_statistics(model.eval(), partial(uncorrupted, labeled.images, Augmentation(0, False), run))
        return curve

    def _warm_up(
        self, model: Classifier, state: _Distances, pixels: Tensor, labels: Tensor, batch: Batch, run: Run
    ) -> Tensor:
        """`pixels` with the trigger of the class whose turn it is on half of the other classes' images."""
        target = batch.step
        images, sources = state.draw([k for k in range(len(state.classes)) if k != target], batch.generator)
        before = _losses(model, images, state.classes[target], run)
        start = state.form.start(1, batch.generator)[0][0, -1:]  # all over the picture, as the authors'
        fitted = _fit(
            model, state.form, start, [images], state.classes[target, None], round(WARM * self.fit_steps),
            FIRST_WEIGHT, 0.99, batch.generator, run,
        )  # fmt: skip
        state.triggers[target] = fitted.parameters[0]
        stamped = state.form.stamp(fitted.parameters, images)[0]
        after = _losses(model, stamped, state.classes[target], run)
        eased = (before - after) / before.clamp_min(1e-6)
        for source in sources.unique().tolist():
            state.ease[source, target] = eased[sources == source].mean()
            state.sizes[source, target] = fitted.sizes[0]
        if target == len(state.classes) - 1:
            state.growth.copy_(state.sizes / state.sizes.max().clamp_min(1e-6))
        others = (labels != state.classes[target]).nonzero()[:, 0]
        return _stamped(state, fitted, 0, pixels, others, self.warm_share, batch.generator)

    def _pair(
        self, model: Classifier, state: _Distances, pixels: Tensor, labels: Tensor, batch: Batch, step: int, run: Run
    ) -> Tensor:  # fmt: skip
        """`pixels` with a pair's two triggers on some images of its two classes."""
        if step % TURN == 0:
            state.pair.copy_(self._choose(state, batch))
            state.turn.zero_()
        long = step % TURN == 0 or bool(state.failed)
        source, target = state.pair.tolist()
        images = [state.draw([one], batch.generator, SHOWN // 2)[0] for one in (source, target)]
        towards = (target, source)
        start = state.triggers[list(towards)].clamp(-LEVEL, LEVEL)
        fitted = _fit(
            model, state.form, start, images, state.classes[list(towards)],
            self.fit_steps if long else round(LATER * self.fit_steps), FIRST_WEIGHT if long else LATER_WEIGHT,
            0.9, batch.generator, run,
        )  # fmt: skip
        state.failed.fill_(not fitted.found.all())
        for side, (origin, goal) in enumerate(((source, target), (target, source))):
            if fitted.found[side]:
                state.triggers[goal] = fitted.parameters[side]
                state.turn[side] += torch.stack([fitted.sizes[side], torch.ones_like(fitted.sizes[side])])
                there = (labels == state.classes[origin]).nonzero()[:, 0]
                pixels = _stamped(state, fitted, side, pixels, there, self.share, batch.generator)
            if step % TURN == TURN - 1 and state.turn[side, 1] > 0:
                last, size = state.sizes[origin, goal].clone(), state.turn[side, 0] / state.turn[side, 1]
                if last > 0:
                    state.growth[origin, goal] = (state.growth[origin, goal] + (size - last) / last) / 2
                state.sizes[origin, goal] = size
        return pixels

    def _choose(self, state: _Distances, batch: Batch) -> Tensor:
        """A source and a target, int64 [2], places in `state.classes`."""
        count, generator = len(state.classes), batch.generator
        if float(torch.rand((), generator=generator, device=generator.device)) < self.random_pairs:
            return torch.randperm(count, generator=generator, device=generator.device)[:2]
        worth = (1 - batch.progress) * (state.ease + state.ease.T) + batch.progress * (
            state.growth + state.growth.T
        )
        worth.fill_diagonal_(-torch.inf)
        place = int(worth.argmax())
        return torch.tensor([place // count, place % count], device=worth.device)


class _Distances:
    """The classes that have images, their latest triggers, and what is known of the distances between them.

    `tensors` is all the state, changed in place, for the resume state: rows are sources, columns targets. `turn`
    [2 2]: of a pair's two triggers the sum of their sizes in this turn, and how many there were; `failed`: whether the
    last fit lacked one.
    """

    def __init__(self, labeled: ImageSet, run: Run) -> None:
        assert labeled.labels is not None
        channels, height, width = labeled.images.shape[1:]
        self.images, self.labels, self.form = (
            labeled.images,
            labeled.labels.to(run.device),
            mask(height, width, channels),
        )
        self.classes = self.labels.unique()
        count = len(self.classes)
        square = lambda: torch.zeros(count, count, device=run.device)  # noqa: E731
        self.triggers = torch.zeros(count, 1 + channels, height, width, device=run.device)
        self.sizes, self.ease, self.growth = square(), square(), square()
        self.pair = torch.tensor([0, 1], device=run.device)
        self.turn = torch.zeros(2, 2, device=run.device)
        self.failed = torch.zeros((), dtype=torch.bool, device=run.device)
        self.tensors = {
            "triggers": self.triggers, "sizes": self.sizes, "ease": self.ease, "growth": self.growth, "pair": self.pair,
            "turn": self.turn, "failed": self.failed,
        }  # fmt: skip

    def draw(
        self, places: Sequence[int], generator: torch.Generator, most: int = 10
    ) -> tuple[Tensor, Tensor]:
        """Up to `most` images of each class at `places`, float [n c h w] in [0, 1], and the place of each [n]."""
        chosen = []
        for place in places:
            there = (self.labels == self.classes[place]).nonzero()[:, 0]
            mixed = torch.randperm(len(there), generator=generator, device=there.device)
            chosen.append(there[mixed[:most]])
        device = self.labels.device
        images = self.images[torch.cat(chosen).to(self.images.device)].to(device).float() / 255
        owners = [
            torch.full((len(c),), place, device=device) for c, place in zip(chosen, places, strict=True)
        ]
        return images, torch.cat(owners)


@dataclass
class _Fitted:
    """The smallest triggers with success: parameters [k ...], their masks' sizes [k], and whether there is one [k]."""

    parameters: Tensor
    sizes: Tensor
    found: Tensor


def _fit(
    model: Classifier, form: Form, start: Tensor, images: Sequence[Tensor], targets: Tensor, steps: int, weight: float,
    least: float, generator: torch.Generator, run: Run,
) -> _Fitted:  # fmt: skip
    """Fits triggers from `start` [k ...], the k-th sending the k-th of `images` to the k-th of `targets`.

    Success is a share of at least `least` of the images that a step sees. Without any, the last ones are returned.
    """
    model.eval()
    parameters = start.detach().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([parameters], lr=0.1, betas=(0.5, 0.9))
    best, smallest = start.detach().clone(), torch.full((len(start),), torch.inf, device=start.device)
    weights = torch.full_like(smallest, weight)
    streak = torch.zeros_like(smallest)  # steps of success, or, below 0, of failure
    shown = max(1, SHOWN // len(images))
    for _ in range(steps):
        mixed = [
            some[torch.randperm(len(some), generator=generator, device=some.device)[:shown]]
            for some in images
        ]
        stamped = [form.stamp(parameters[k, None], some)[0] for k, some in enumerate(mixed)]
        logits = run.forward(model, torch.cat(stamped)).float().split([len(some) for some in mixed])
        goals = [target.expand(len(some)) for target, some in zip(targets, mixed, strict=True)]
        losses = torch.stack([F.cross_entropy(*pair) for pair in zip(logits, goals, strict=True)])
        right = [(row.argmax(1) == goal).float().mean() for row, goal in zip(logits, goals, strict=True)]
        sizes = form.sizes(parameters)
        (losses + weights * sizes).sum().backward(inputs=[parameters])
        success = torch.stack(right) >= least
        better = success & (sizes.detach() < smallest)
        best[better], smallest[better] = parameters.detach()[better], sizes.detach()[better]
        optimiser.step()
        optimiser.zero_grad()
        streak = torch.where(success, streak.clamp_min(0) + 1, streak.clamp_max(0) - 1)
        weights = torch.where(streak >= PATIENCE, weights * RAISE, weights)
        weights = torch.where(streak <= -PATIENCE, weights / RAISE**1.5, weights)
        streak = torch.where(streak.abs() >= PATIENCE, 0, streak)
    found = smallest.isfinite()
    best[~found] = parameters.detach()[~found]
    return _Fitted(best, form.sizes(best), found)


def _losses(model: Classifier, pixels: Tensor, target: Tensor, run: Run) -> Tensor:
    """The cross-entropy of each image towards the class `target`, [n]."""
    with torch.no_grad():
        logits = run.forward(model.eval(), pixels).float()
    return F.cross_entropy(logits, target.expand(len(pixels)), reduction="none")


def _stamped(
    state: _Distances, fitted: _Fitted, side: int, pixels: Tensor, there: Tensor, share: float,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """`pixels` with a fitted trigger on `share` of the images `there`, at least one of them, if it is small enough."""
    height, width = pixels.shape[2:]
    if not len(there) or not fitted.found[side] or fitted.sizes[side] >= LARGEST * height * width:
        return pixels
    mixed = torch.randperm(len(there), generator=generator, device=there.device)
    chosen = there[mixed[: max(1, int(share * len(there)))]]
    pixels = pixels.clone()
    pixels[chosen] = state.form.stamp(fitted.parameters[side, None], pixels[chosen])[0].detach()
    return pixels
