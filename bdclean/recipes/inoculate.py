"""Inoculation: distillation under counterfeit triggers, adversaries and inverted triggers. bdclean's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bdclean import registry
from bdclean.data import corruptions
from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.training import adversaries
from bdclean.training.forms import Form
from bdclean.training.inversion import Detected, Outlier
from bdclean.training.known import Known, stamped
from bdclean.training.loop import Batch, Measures, State, burst, fit, halvings, updates
from bdclean.training.losses import distillation_kl, divergence
from bdclean.training.pursuit import Pursuit
from bdclean.training.run import Run, seed_for
from bdclean.training.stamped import Stamp, look_stamped
from bdclean.training.students import (
    Augmentation,
    Curve,
    choose_augmentation,
    frozen,
    joined,
    keep_trained,
    recentre,
    set_batch_statistics,
    triangular,
    uncorrupted,
)

DRAWN = "drawn"
"""The kind of adversary beside those of `adversaries`: the most harmful of several random counterfeits."""
HUNTED = 0.25
"""How many images more, as a share of the batch, are seen under an inverted trigger, where there is one, and under a
known one; INSIST times as many, at INSIST times the weight, where the training goes on since one still fires."""
INSIST = 2.0
LOOKS = 3
"""So often the inversion looks at a network, at most: at the suspect, and at the student each time it was trained."""
AGAIN = 0.5
"""Of the updates of the first training, where the student is trained again."""
USUAL = 0.2
"""Up to about this share of images an adversary sends to one class of a network without a backdoor, too."""
LEFT = 0.02
"""A mask, patch, warp or filter has its whole weight while it sends more than this share to its class, other inverted
triggers more than USUAL."""
FEW_CLASSES = 4
"""Of up to so many, stripes send most images to one in networks without a backdoor, too: they weigh no more than other
corruptions there. One of two classes lost 9 points of its accuracy with `inverted_weight`, 2 so."""


@dataclass(frozen=True)
class Inoculate:
    """Distillation under random counterfeit triggers: a copy of the suspect learns to ignore what triggers are made of.

    What it does: a copy of the suspect learns to give, on corrupted images, the suspect's answer on the clean ones. The
    corruptions are random counterfeits of triggers, the most harmful of many such draws, small adversaries found on the
    student, and inverted triggers: where a class of the suspect is reached by an unusually small mask (one for all
    images, or drawn for each by a small network), warp or filter of colour, or by unusually little that is added to the
    picture, or where stripes send most images to it, that change itself, refitted on the student at each use, and
    patches: near a mask, in its colours, and those that a search by trial found to send images to its class. Such
    searches also tell which class a patch reaches, and whether one sends each class to another; that one is learnt to
    be ignored, as a known trigger is. Before it ends it looks at the student in the same way; where something stands
    out, it goes on from there, twice at most. Given images that carry an inverted trigger are set aside.
    When to use it: by default. It knows no trigger, target or label.
    What it needs: unlabeled images of the kind that the network is for; measured with 1,000 to 2,500.
    Known limits: what it was measured with is in README. Stripes that are not along an axis are met by random draws
    alone. Stamped images among the given ones are found only where their trigger was inverted and is at one place. Of
    more than 100 classes only the 100 are inverted that random counterfeits draw images to. Clean networks with few
    images, and more than 43 classes are untried. An all-to-all trigger that nobody knows is met if it is a patch alone.

    Kin: NNoculation (Veldanda et al. 2020), SAU (Wei et al. 2023), Neural Cleanse (Wang et al. 2019), and SFT's
    learning rate in two phases (arXiv 2212.09067). Each batch is seen twice in one pass, clean and corrupted, so that
    the student keeps the suspect's answers on clean images. Before the first step batch norm is given the statistics of
    the images at hand, and what they differ from the suspect's goes into its scale and shift: the network is the same
    function still, and whether the images are of its own kind need not be known. The temperature makes it match logits,
    which costs less accuracy. `sent` in the curve is the largest share of images that a step's adversary sent to one
    class.
    """

    name: ClassVar[str] = "inoculate"
    source: ClassVar[str] = (
        "bdclean's own; kin: NNoculation 2002.08313, SAU 2307.10562, Neural Cleanse 2019, SFT 2212.09067"
    )
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = registry.FAMILIES
    data_parallel: ClassVar[bool] = True

    epochs: float = 12
    least_steps: int = 300  # with few images, more epochs than that
    batch_size: int = 128  # images a step; each is seen clean and corrupted
    peak: float = 0.01  # of the learning rate in the first 60 % of the steps, three cycles
    second_peak: float = 0.003  # in the rest, two cycles
    floor: float = 3e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    temperature: float = 4.0  # on clean images: high, so that logits are matched, not the answer alone
    corrupted_temperature: float = 1.0  # on corrupted ones the answer is enough
    corrupted_weight: float = 0.15  # of the corrupted half's loss beside the clean one's: more costs accuracy
    evident_weight: float = 1.0  # of images that an adversary sends to one class: what a trigger does
    inverted_weight: float = 2.0  # of images under an inverted trigger: there is something to take out
    mask_weight: float = 6.0  # under a mask, patch, warp or filter: clean networks hardly have one
    settle: bool = True  # in the second phase batch norm keeps the statistics of clean images
    adversary_share: float = 0.5  # of the corrupted images
    adversary_steps: int = 3
    inversion_steps: int = 100  # of masks; 0.6 as many of other changes, 0.1 rounds of patches; 0: none
    leave_out: tuple[str, ...] = ()  # families not trained on, to measure triggers of unseen ones

    def __post_init__(self) -> None:
        unknown = sorted(set(self.leave_out) - set(self.families))
        if unknown or not self._trained_on():
            known = "/".join(self.families)
            raise UsageError(
                f"inoculate: leave_out takes some, not all, of {known}; it is {'/'.join(self.leave_out)}."
            )
        if self.epochs <= 0 or self.batch_size < 4 or not 0 < self.floor <= min(self.peak, self.second_peak):
            raise UsageError(
                "inoculate: epochs are positive, batch_size at least 4, and 0 < floor <= both peaks."
            )
        if (
            not 0 <= self.adversary_share <= 1
            or min(self.temperature, self.corrupted_temperature) <= 0
            or min(self.adversary_steps, self.inversion_steps) < 0
        ):
            raise UsageError(
                "inoculate: adversary_share is in [0, 1], temperatures positive, steps are not negative."
            )
        weights = (self.corrupted_weight, self.evident_weight, self.inverted_weight, self.mask_weight)
        if not 0 <= self.momentum < 1 or min(weights) < 0:
            raise UsageError("inoculate: momentum is in [0, 1), and no weight is negative.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        return self.against((), suspect, arch, unlabeled, run)

    def against(
        self, known: Sequence[Known], suspect: Classifier, arch: Arch, unlabeled: ImageSet, run: Run
    ) -> Cleansed:
        """The same, and the stamps of `known` triggers, which `auto` may be told, are learnt to be ignored as well."""
        teacher = frozen(suspect, run)
        detected = self._detected(teacher, arch, unlabeled.images, run)
        inverted, found, told = _findings(detected), _outliers(detected), [*known, *_stamps(detected)]
        limits = {form: limit for each in detected for form, limit in each.limits.items()}
        images = _unstamped(teacher, [*told, *found], unlabeled.images, run)
        pupil = _Pupil(
            copy.deepcopy(teacher), teacher, images, choose_augmentation(teacher, images, run), told
        )
        steps = max(self.least_steps, updates(self.epochs, len(images), self.batch_size))
        stages = [
            f"detectors: {len(inverted)} findings, {len(found)} outliers" if inverted else "no inversion",
            f"distilled for {steps} updates, {pupil.augment.describe()}",
        ]
        lesson = _Lesson(self, pupil, found, steps, run)
        curve = self._taught(lesson, arch, run)
        stages += [*halvings(curve), f"adversaries: {', '.join(lesson.adversaries())}"]
        for look in range(2, LOOKS + 1 if inverted else 2):
            within = run.under(f"look-{look}")
            seen = self._detected(frozen(pupil.student, run), arch, images, within)
            found, more = _outliers(seen, limits), _stamps(seen)
            stages.append(f"look {look} of at most {LOOKS}, at the student: {_listed(found, more)}")
            if not found and not more:
                break
            pupil = replace(pupil, known=[*pupil.known, *more])
            again = self._taught(_Lesson(self, pupil, found, math.ceil(AGAIN * steps), within), arch, within)
            stages += [f"distilled for {again[-1]['step']:.0f} updates more", *halvings(again)]
            curve = joined(curve, again)
        return Cleansed(
            pupil.student.eval(), arch, curve, asdict(self), stages, len(unlabeled) - len(images), inverted,
            pictures={caption: made for each in detected for caption, made in each.pictures.items()},
            families=self._trained_on(), trained_on=tuple(trigger.spec() for trigger in known),
        )  # fmt: skip

    def insist(
        self, known: Sequence[Known], begun: Cleansed, suspect: Classifier, unlabeled: ImageSet, run: Run
    ) -> Cleansed:
        """`begun`, trained on under `known` triggers that still fire on it: more images, and a larger weight."""
        specs = [trigger.spec() for trigger in known]
        # other triggers are another part of the run: a resume state of theirs is not taken up
        within = run.under(f"insist-{seed_for(*specs):x}")
        teacher = frozen(suspect, run)
        detected = self._detected(teacher, begun.arch, unlabeled.images, run)
        found, stamps = _outliers(detected), [*known, *_stamps(detected)]
        images = _unstamped(teacher, [*stamps, *found], unlabeled.images, within)
        student, augment = (
            copy.deepcopy(begun.model).to(run.device),
            choose_augmentation(teacher, images, run),
        )
        pupil = _Pupil(student, teacher, images, augment, stamps, INSIST)
        steps = math.ceil(AGAIN * max(self.least_steps, updates(self.epochs, len(images), self.batch_size)))
        curve = self._taught(_Lesson(self, pupil, found, steps, within), begun.arch, within)
        told = dict.fromkeys([*begun.trained_on, *specs])
        return replace(
            begun, model=student.eval(), curve=joined(begun.curve, curve), trained_on=tuple(told),
            set_aside=max(begun.set_aside, len(unlabeled) - len(images)),
            stages=[
                *begun.stages,
                f"{_counted(len(known))} still fired: distilled for {steps} updates more, with {INSIST:g} times as "
                f"many images under them, at {INSIST:g} times the weight",
                *halvings(curve),
            ],
        )  # fmt: skip

    def weight_of(self, form: Form, classes: int) -> tuple[float, float]:
        """The whole weight of images under an inverted trigger, and the share it sends from which on they have it."""
        if form.family in ("patch", "warp", "tone"):
            return self.mask_weight, LEFT
        common = form.family == "wave" and classes <= FEW_CLASSES
        return self.corrupted_weight if common else self.inverted_weight, USUAL

    def _trained_on(self) -> tuple[str, ...]:
        return tuple(family for family in self.families if family not in self.leave_out)

    def _detected(self, teacher: Classifier, arch: Arch, images: Tensor, run: Run) -> list[Detected]:
        """What the detectors see whose families are trained on."""
        if not self.inversion_steps:
            return []
        families = self._trained_on()
        known = registry.DETECTORS
        looking = [registry.load(known, "inversion")(self.inversion_steps, families)]
        if "patch" in families:
            rounds = math.ceil(self.inversion_steps / 10)
            looking += [registry.load(known, name)(rounds) for name in ("patches", "all-to-all")]
        if "warp" in families:
            looking.append(registry.load(known, "warps")(self.inversion_steps))
        if "tone" in families:
            looking.append(registry.load(known, "filters")(self.inversion_steps))
        if "wave" in families:
            looking.append(registry.load(known, "stripes")())
        return [detector(teacher, arch, images, run) for detector in looking]

    def _taught(self, lesson: _Lesson, arch: Arch, run: Run) -> Curve:
        """Trains the student of `lesson`."""

        def taught() -> Curve:
            lesson.begin()
            curve = fit(lesson, self._state(lesson, arch), run)
            lesson.end()
            return curve

        return keep_trained(lesson.student, "student", taught, run)

    def _state(self, lesson: _Lesson, arch: Arch) -> State:
        optimiser = torch.optim.SGD(
            lesson.student.parameters(), self.floor, momentum=self.momentum, weight_decay=self.weight_decay
        )
        return State(
            "inoculate", lesson.student, optimiser, lesson.images, None, self.batch_size, lesson.steps,
            self._schedule(lesson.steps, lesson.settling),
            extra=lesson.pursuit.tensors if lesson.pursuit is not None else {},
            most=self.temperature**2 * burst(arch.classes),
        )  # fmt: skip

    def _schedule(self, steps: int, first: int) -> Callable[[int], float]:
        """Three cycles in the `first` steps, then two lower ones."""

        def rate(step: int) -> float:
            if step < first:
                return triangular(step, first / 6, first / 6, self.floor, self.peak)
            half = max(1, steps - first) / 4
            return triangular(step - first, half, half, self.floor, self.second_peak)

        return rate


def _unstamped(teacher: Classifier, stamps: Sequence[Stamp], images: Tensor, run: Run) -> Tensor:
    """`images` without those that look stamped with one of `stamps`."""
    aside = run.keep("stamped", lambda: look_stamped(teacher, stamps, images, run)).cpu().bool()
    return images[~aside] if aside.any() else images


def _findings(detected: Sequence[Detected]) -> list[dict[str, Any]]:
    return [finding for each in detected for finding in [*each.findings, *each.uncounted]]


def _outliers(detected: Sequence[Detected], limits: Mapping[str, float] | None = None) -> list[Outlier]:
    """What stands out, and is under the suspect's own `limits` as well, by form: where training made all classes harder
    to reach, one that it made less so is no trigger for that (working against such a filter cost 3 points)."""
    found = [outlier for each in detected for outlier in each.outliers]
    return [one for one in found if one.size < (limits or {}).get(one.form.name, math.inf)]


def _stamps(detected: Sequence[Detected]) -> list[Known]:
    """What stands out and sends images to no one class."""
    return [stamp for each in detected for stamp in each.stamps]


def _counted(triggers: int) -> str:
    return "1 trigger" if triggers == 1 else f"{triggers} triggers"


def _listed(found: Sequence[Outlier], stamps: Sequence[Known]) -> str:
    """Which classes stand out, in words, and what does for all of them."""
    each = [f"{outlier.form.said.format(outlier.size)} for class {outlier.target}" for outlier in found]
    each += [f"{stamp.spec()} for all classes" for stamp in stamps]
    return ", ".join(each) or "nothing stands out"


@dataclass(frozen=True)
class _Pupil:
    """Who learns from whom, and on what: images uint8 [n c h w]; under `known` triggers, `insisted` times as much."""

    student: Classifier
    teacher: Classifier
    images: Tensor
    augment: Augmentation
    known: Sequence[Known] = ()
    insisted: float = 1.0


class _Lesson:
    """The step of `inoculate`: the student sees a batch clean and corrupted, and learns the answers on the clean one.

    From step `settling` on batch norm keeps the statistics of clean images. Dropout and its kin stay switched off.
    """

    def __init__(
        self, recipe: Inoculate, pupil: _Pupil, found: Sequence[Outlier], steps: int, run: Run
    ) -> None:
        self.recipe, self.pupil, self.run = recipe, pupil, run
        self.teacher, self.images, self.augment = pupil.teacher, pupil.images, pupil.augment
        self.steps, self.settling = steps, max(1, round(0.6 * steps))
        self.student = pupil.student.requires_grad_(True)
        self.norms = [m for m in self.student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.forward = partial(run.forward, self.student)
        self.pursuit = Pursuit(found, self.teacher, self.images, run) if found else None
        self.families = recipe._trained_on()
        self.pushed = [kind for kind in adversaries.KINDS if adversaries.FAMILY[kind] in self.families]
        # Every other adversary is a draw: gradients do not come by all triggers.
        self.kinds = [kind for each in self.pushed for kind in (DRAWN, each)] or [DRAWN]

    def begin(self) -> None:
        """Give batch norm the statistics of the images at hand; the student stays the same function."""
        recentre(self.student, partial(self._uncorrupted, 1))

    def end(self) -> None:
        """Give batch norm the statistics of uncorrupted images, unless it has been keeping them.

        Then those of the images as they are, the student being the same function: a file shows how it is to be read
        by the statistics that it holds, and those of crops are of another network than the one that was given.
        """
        if not self.recipe.settle or self.settling >= self.steps:
            set_batch_statistics(self.student, self._uncorrupted)
        recentre(self.student, partial(uncorrupted, self.images, Augmentation(0, False), self.run, 1))

    def adversaries(self) -> list[str]:
        found = ["inverted"] if self.pursuit is not None else []
        return [DRAWN, *self.pushed, *found, *(["known"] if self.pupil.known else [])]

    def __call__(self, batch: Batch) -> tuple[Tensor, Measures]:
        if self.recipe.settle and batch.step == self.settling:
            set_batch_statistics(self.student, self._uncorrupted)
        views = self.augment(batch.images, batch.generator)
        pixels = views.float() / 255
        with torch.no_grad():
            answers = self.run.forward(self.teacher, pixels)
        self.student.eval()
        corrupted = self._corrupted(batch, pixels, answers)
        if self.pupil.known:
            told = self._counts(len(views))[2]
            corrupted.append(
                stamped(self.pupil.known, views[:told], batch.step, batch.generator).float() / 255
            )
        settled = self.recipe.settle and batch.step >= self.settling
        for norm in self.norms:
            norm.train(not settled)
        return self._loss(self.forward(torch.cat([pixels, *corrupted])), answers, batch.step)

    def _counts(self, n: int) -> tuple[int, int, int]:
        """How many of n images meet an adversary, and how many of them an inverted trigger and a known one, too.

        Batches are shuffled: the last images meet an inverted trigger, the first ones what else there is.
        """
        hunted = max(1, round(HUNTED * n)) if self.pursuit is not None else 0
        told = max(1, round(self.pupil.insisted * HUNTED * n)) if self.pupil.known else 0
        return round(self.recipe.adversary_share * n), hunted, told

    def _corrupted(self, batch: Batch, pixels: Tensor, answers: Tensor) -> list[Tensor]:
        """All of `pixels` under an adversary or a random corruption; then the last ones under an inverted trigger."""
        n, found = len(pixels), []
        foes, hunted, _ = self._counts(n)
        if foes:
            found.append(self._attacked(batch, pixels[:foes], answers[:foes].softmax(1)))
        if foes < n:
            found.append(corruptions.corrupt(pixels[foes:], self.families, batch.generator))
        if self.pursuit is not None:
            under = self.pursuit.stamp(self.forward, pixels[n - hunted :], batch.step, batch.generator)
            found.append(under)
        return found

    def _attacked(self, batch: Batch, pixels: Tensor, probabilities: Tensor) -> Tensor:
        """`pixels` under the adversary whose turn it is."""
        kind, generator = self.kinds[batch.step % len(self.kinds)], batch.generator
        if kind == DRAWN:
            return adversaries.worst_counterfeit(
                self.forward, pixels, probabilities, self.families, generator
            )
        steps = self.recipe.adversary_steps
        return adversaries.attack(kind, self.forward, pixels, probabilities, generator, steps)

    def _loss(self, logits: Tensor, answers: Tensor, turn: int) -> tuple[Tensor, Measures]:
        """`logits` of the clean images, of the corrupted ones, and of those under an inverted and a known trigger."""
        n, recipe = len(answers), self.recipe
        foes, hunted, told = self._counts(n)
        clean, corrupted = logits[:n], logits[n:].float()
        aims = torch.cat([answers, answers[n - hunted :], answers[:told]]).float()
        loss = recipe.temperature**2 * distillation_kl(clean, answers, recipe.temperature)
        gone = corrupted.detach().softmax(1) - aims.softmax(1)
        weights = torch.full((len(aims),), recipe.corrupted_weight, device=logits.device)
        measures: dict[str, Tensor | float] = {}
        if self.pursuit is not None:
            under = slice(n, n + hunted)
            weight, most = recipe.weight_of(self.pursuit.whose(turn).form, answers.shape[1])
            share = (self.pursuit.sent(turn, gone[under]) / most).clamp(0, 1)
            weights[under] += (weight - recipe.corrupted_weight) * share
        weights[n + hunted :] = self.pupil.insisted * recipe.inverted_weight
        if foes:
            sent = gone[:foes].mean(0).max()
            share = ((sent - USUAL) / (1 - USUAL)).clamp_min(0)
            weights[:foes] += (recipe.evident_weight - recipe.corrupted_weight) * share
            measures["sent"] = sent
        warm = recipe.corrupted_temperature
        harm = divergence(corrupted / warm, (aims / warm).softmax(1))
        loss = loss + warm**2 * (weights * harm).sum() / n
        measures["agreement"] = (clean.argmax(1) == answers.argmax(1)).float().mean()
        return loss, measures

    def _uncorrupted(self, passes: int = 2) -> Iterator[Tensor]:
        return uncorrupted(self.images, self.augment, self.run, passes)
