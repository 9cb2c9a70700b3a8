"""Inoculation: distillation under counterfeit triggers, adversaries and inverted triggers. bdclean's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bdclean import adversaries, corruptions
from bdclean.architectures import Arch
from bdclean.data import ImageSet
from bdclean.errors import UsageError
from bdclean.inversion import (
    ADDED,
    GROWN,
    MOST_SENT,
    Inverted,
    Outlier,
    Pursuit,
    added,
    invert,
    mask,
    outliers,
    sent_by,
    striped,
)
from bdclean.losses import distillation_kl, divergence
from bdclean.preprocessing import Classifier
from bdclean.recipes import Cleansed
from bdclean.training import (
    Batch,
    Measures,
    Run,
    State,
    burst,
    choose_augmentation,
    fit,
    frozen,
    halvings,
    recentre,
    set_batch_statistics,
    triangular,
)

DRAWN = "drawn"
"""The kind of adversary beside those of `adversaries`: the most harmful of several random counterfeits."""
HUNTED = 0.25
"""How many images more, as a share of the batch, are seen under an inverted trigger, where there is one."""
FEW_IMAGES = 24
"""How many images all stripes are tried on, and where there are too many classes to invert all, counterfeits."""
MOST_INVERTED = 100
"""Of more classes those are inverted that counterfeits draw most images to."""
STATISTICS_PIXELS = 1 << 20
"""Batch norm's final statistics are means over parts of 256 images, or of so many pixels but 64 images or more."""
USUAL = 0.2
"""Up to about this share of images an adversary sends to one class of a network without a backdoor, too."""


@dataclass(frozen=True)
class Inoculate:
    """Distillation under random counterfeit triggers: a copy of the suspect learns to ignore what triggers are made of.

    What it does: a copy of the suspect learns to give, on corrupted images, the suspect's answer on the clean ones. The
    corruptions are random counterfeits of triggers, the most harmful of many such draws, small adversaries found on the
    student, and inverted triggers: where a class of the suspect is reached by an unusually small mask, or by unusually
    little that is added to the picture, or where stripes send most images to it, that change itself, refitted on the
    student at each use.
    When to use it: by default. It knows no trigger, target or label.
    What it needs: unlabeled images of the kind that the network is for; measured with 1,000 to 2,500.
    Known limits: what it was measured with is in README. Stripes that are not along an axis, and warps, are met by
    random draws alone. Of more than 100 classes only the 100 are inverted that random counterfeits draw images to.
    Triggers that only a generator makes, clean networks with few images, and more than 43 classes are untried.

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
    families: ClassVar[tuple[str, ...]] = tuple(corruptions.FAMILIES)

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
    settle: bool = True  # in the second phase batch norm keeps the statistics of clean images
    adversary_share: float = 0.5  # of the corrupted images
    adversary_steps: int = 3
    inversion_steps: int = 100  # of masks; 0.6 as many of what is added to the picture; 0 leaves both out
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
        weights = (self.corrupted_weight, self.evident_weight, self.inverted_weight)
        if not 0 <= self.momentum < 1 or min(weights) < 0:
            raise UsageError("inoculate: momentum is in [0, 1), and no weight is negative.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = unlabeled.images
        teacher = frozen(suspect, run)
        augment = choose_augmentation(teacher, images, run)
        outlying, findings, inverted = self._inverted(teacher, arch, images, run)
        if self.inversion_steps and "wave" not in self.leave_out:
            striking, told = _stripes(teacher, images, run)
            outlying, findings = outlying + striking, findings + told
        pursuit = Pursuit(outlying, run.device) if outlying else None
        student = copy.deepcopy(teacher).requires_grad_(True)
        norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        steps = max(self.least_steps, math.ceil(self.epochs * len(images) / self.batch_size))
        first, settled = max(1, round(0.6 * steps)), False
        families = self._trained_on()
        # Every other adversary is a draw: gradients do not come by all triggers.
        pushed = [kind for kind in adversaries.KINDS if adversaries.FAMILY[kind] in families]
        kinds = [kind for each in pushed for kind in (DRAWN, each)] or [DRAWN]

        evaluated = partial(run.forward, student)

        def attacked(kind: str, batch: Batch, pixels: Tensor, answers: Tensor) -> Tensor:
            """`pixels` under this step's adversary."""
            probabilities = answers.softmax(1)
            if kind == DRAWN:
                return adversaries.worst_counterfeit(
                    evaluated, pixels, probabilities, families, batch.generator
                )
            return adversaries.attack(
                kind, evaluated, pixels, probabilities, batch.generator, self.adversary_steps
            )

        def train() -> None:
            """Batch norm takes each batch's statistics until it is settled; dropout and its kin stay switched off."""
            for norm in norms:
                norm.train(not settled)

        def uncorrupted(passes: int = 2) -> Iterator[Tensor]:
            generator = run.generator("statistics")
            size = min(256, max(64, STATISTICS_PIXELS // images[0, 0].numel()))
            for _ in range(passes):
                # Shuffled, and parts of one size: each counts alike, whatever the order of the files.
                order = torch.randperm(len(images), generator=generator, device=run.device).cpu()
                for part in order.tensor_split(math.ceil(len(images) / size)):
                    yield run.precision.layout(augment(images[part].to(run.device), generator))

        def step(batch: Batch) -> tuple[Tensor, Measures]:
            nonlocal settled
            if self.settle and batch.step == first:
                set_batch_statistics(student, uncorrupted)
            settled = self.settle and batch.step >= first
            pixels = augment(batch.images, batch.generator).float() / 255
            with torch.no_grad():
                answers = run.forward(teacher, pixels)
            # Batches are shuffled: the first images of each meet an adversary, the last an inverted trigger, too.
            n, kind = len(pixels), kinds[batch.step % len(kinds)]
            foes = round(self.adversary_share * n)
            hunted = max(1, round(HUNTED * n)) if pursuit is not None else 0
            found, aims = [], torch.cat([answers, answers[n - hunted :]]).float()
            student.eval()
            if foes:
                found.append(attacked(kind, batch, pixels[:foes], answers[:foes]))
            if foes < n:
                found.append(corruptions.corrupt(pixels[foes:], families, batch.generator))
            if pursuit is not None:
                found.append(pursuit.stamp(evaluated, pixels[n - hunted :], batch.step))
            train()
            logits = run.forward(student, torch.cat([pixels, *found]))
            loss = self.temperature**2 * distillation_kl(logits[:n], answers, self.temperature)
            corrupted = logits[n:].float()
            gone = corrupted.detach().softmax(1) - aims.softmax(1)
            weights = torch.full((n + hunted,), self.corrupted_weight, device=run.device)
            measures: dict[str, Tensor | float] = {}
            if hunted:
                share = (gone[n:].mean(0).max() / USUAL).clamp(0, 1)
                weights[n:] += (self.inverted_weight - self.corrupted_weight) * share
            if foes:
                sent = gone[:foes].mean(0).max()
                share = ((sent - USUAL) / (1 - USUAL)).clamp_min(0)
                weights[:foes] += (self.evident_weight - self.corrupted_weight) * share
                measures["sent"] = sent
            warm = self.corrupted_temperature
            harm = divergence(corrupted / warm, (aims / warm).softmax(1))
            loss = loss + warm**2 * (weights * harm).sum() / n
            measures["agreement"] = (logits[:n].argmax(1) == answers.argmax(1)).float().mean()
            return loss, measures

        recentre(student, partial(uncorrupted, 1))
        optimiser = torch.optim.SGD(
            student.parameters(), self.floor, momentum=self.momentum, weight_decay=self.weight_decay
        )
        extra = pursuit.tensors if pursuit is not None else {}
        state = State(
            "inoculate",
            student,
            optimiser,
            images,
            None,
            self.batch_size,
            steps,
            self._schedule(steps, first),
            extra=extra,
            most=self.temperature**2 * burst(arch.classes),
        )
        curve = fit(step, state, run)

        if not self.settle or first >= steps:
            set_batch_statistics(student, uncorrupted)
        stages = [
            f"inverted {min(arch.classes, MOST_INVERTED)} of {arch.classes} classes: {len(findings)} findings"
            if findings
            else "no inversion",
            f"distilled for {steps} updates, {augment.describe()}",
            *halvings(curve),
            f"adversaries: {', '.join([DRAWN, *pushed, *(['inverted'] if pursuit is not None else [])])}",
        ]
        return Cleansed(
            student.eval(), arch, curve, asdict(self), stages,
            findings=findings, pictures=inverted, families=families,
        )  # fmt: skip

    def _trained_on(self) -> tuple[str, ...]:
        return tuple(family for family in self.families if family not in self.leave_out)

    def _schedule(self, steps: int, first: int) -> Callable[[int], float]:

        def rate(step: int) -> float:
            if step < first:
                return triangular(step, first / 6, first / 6, self.floor, self.peak)
            half = max(1, steps - first) / 4
            return triangular(step - first, half, half, self.floor, self.second_peak)

        return rate

    def _inverted(
        self, teacher: Classifier, arch: Arch, images: Tensor, run: Run
    ) -> tuple[list[Outlier], list[dict[str, Any]], dict[str, Tensor]]:
        """The outlying masks and added patterns, findings about them, and their pictures by caption."""
        height, width = images.shape[2:]
        forms = [mask(height, width), *(added(height, width, kind) for kind in ADDED)]
        found, findings, shown = [], [], {}
        classes = torch.arange(arch.classes)
        if self.inversion_steps and arch.classes > MOST_INVERTED:
            classes = self._attracting(teacher, images, run).topk(MOST_INVERTED).indices.sort().values
        for form in forms if self.inversion_steps else ():
            if form.family in self.leave_out:
                continue

            steps = math.ceil(self.inversion_steps * form.steps)
            inverted = invert(teacher, images, form, classes, run, steps=steps)
            small, index, limit = outliers(inverted)
            for k in small.nonzero().squeeze(1).tolist() or [int(inverted.sizes.argmin())]:
                target, parameters = int(inverted.classes[k]), inverted.parameters[k]
                findings.append(_finding(inverted, bool(small[k]), index, limit, k))
                shown[f"{form.name} inverted for class {target}, on grey"] = form.picture(parameters)
                if small[k]:
                    found.append(Outlier(form, target, parameters, float(inverted.sizes[k]), limit))
        return found, findings, shown

    def _attracting(self, teacher: Classifier, images: Tensor, run: Run) -> Tensor:
        """How much random counterfeits draw images to each class, [classes]."""
        pixels = _few(images).to(run.device).float() / 255
        forward, families = partial(run.forward, teacher), self._trained_on()
        generator = run.generator("attraction")
        return run.keep("attraction", lambda: adversaries.attraction(forward, pixels, families, generator))


def _few(images: Tensor, count: int = FEW_IMAGES) -> Tensor:
    """Images from all over the set: of all classes, where it is sorted by class."""
    return images[:: max(1, len(images) // count)][:count]


def _stripes(teacher: Classifier, images: Tensor, run: Run) -> tuple[list[Outlier], list[dict[str, Any]]]:
    """The stripes that send most images to one class, and findings about them."""
    form, changes, words = striped(*images.shape[2:])
    few = _few(images)
    sent = run.keep("sent-by-stripes", lambda: sent_by(form, changes, teacher, few, run))
    share, which = sent.max(0)
    found, findings = [], []
    for k in (share > MOST_SENT).nonzero().squeeze(1).tolist() or [int(share.argmax())]:
        at = int(which[k])
        findings.append(_striped(words[at], float(share[k]), k, len(few)))
        if share[k] > MOST_SENT:
            size = float(form.sizes(changes[at : at + 1]))
            found.append(Outlier(form, k, changes[at], size, GROWN * size))
    return found, findings


def _striped(words: str, share: float, target: int, n: int) -> dict[str, Any]:
    return {
        "detector": "stripes",
        "verdict": "outlier" if share > MOST_SENT else "no-outlier",
        "score": share,
        "threshold": MOST_SENT,
        "reason": f"stripes of {words}, 20 grey levels, send {100 * share:.0f} % of {n} images to class {target}. "
        "Not calibrated: it does not decide the verdict.",
    }


def _finding(inverted: Inverted, outlying: bool, index: Tensor, limit: float, k: int) -> dict[str, Any]:
    sizes = inverted.sizes
    others = torch.cat([sizes[:k], sizes[k + 1 :]])
    return {
        "detector": "inversion",
        "verdict": "outlier" if outlying else "no-outlier",
        "score": float(sizes[k]),
        "threshold": limit,
        "reason": f"{inverted.form.said.format(sizes[k])} sends images to class {int(inverted.classes[k])} "
        f"(success {inverted.success[k]:.2f}); the next classes need {others.min():.1f} to {others.max():.1f} "
        f"(anomaly index {index[k]:.1f}). Not calibrated: it does not decide the verdict.",
    }
