"""inoculate for encoders: a network with new weights learns what the suspect says of many views of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean import registry
from bdclean.data.corruptions import filtered
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.training.encoder_lesson import directions, mean_feature, train
from bdclean.training.inversion import Detected, Outlier, found_above
from bdclean.training.loop import Batch, Measures, halvings
from bdclean.training.patches import Drawn, Patch
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.pulling import Pulling, Side, pulling
from bdclean.training.run import Run
from bdclean.training.students import (
    Curve,
    frozen,
    joined,
    keep_trained,
    one_cycle,
    set_batch_statistics,
    uncorrupted,
    void,
)
from bdclean.training.whitening import crowding

ASKED_AT_ONCE = 256
"""Views that go through the suspect together."""
SEEN = 2
"""Views of each image that the student sees in a step."""
CROWDED, LEAST, MOST = 0.6, 200, 0.1
"""An image is set aside whose third nearest of the other half is, in whitened features, nearer than CROWDED of what is
usual. Of unstamped images of five encoders 0 to 0.09 % were, of stamped ones BadEncoder's 80 to 94 % (CIFAR-10, 1 and
5 % stamped) and 33 to 85 % (signs); none of DRUPE's, which are spread out, or of INACTIVE's. Of fewer than LEAST images
none is judged; where more than a share of MOST crowd, the set is of many near copies, and all stay."""
TELLING = 512
"""Images that show what the suspect minds."""
SAME = 1e-4
"""Cosines that differ by no more are alike: an image may be there twice."""
FAINTEST, STRONGEST, LOOSE = 0.25, 1.5, 0.05
"""Inverted filters are seen at so many times the strength that was found, their numbers off by LOOSE each."""
PULLED = 0.3
"""A patch is taken that pulls the suspect's features together by so much more than the student's, in the mean cosine of
pairs. BadEncoder's square did by 0.80, DRUPE's by 0.58; in an encoder without a backdoor the best one by 0.17."""
MOST_PATCHES, ALIKE = 12, 8
"""So many of them are taken; so many views at a time are under the same one."""
AGAIN, AGAIN_PEAK = 1 / 3, 0.5
"""Of the epochs and of the rate's peak, where the student is trained again under such patches."""
UNMINDED = 0.9
"""A change that the suspect does not mind leaves so large a share of images nearest to themselves. Encoders trained on
mirrored views: 0.99 and more mirrored; others 0.22 to 0.80. Trained on colour changes: 0.93 to 1; a classifier's trunk
that looks at colours 0.69, in grey 0.03."""


@dataclass(frozen=True)
class InoculateEncoder:
    """A void student learns the suspect's features, averaged over many views of each image (bdclean's own).

    What it does: asks the suspect once for the features of many views of each image, and trains a network with new
    weights to give their mean for any view of it. A trigger, and what looks like one, sits at one place; crops and
    mirrors move it, so that the mean forgets it. Views are mirrored, change colours or turn grey only where the suspect
    does not mind that by itself, or the mean would forget what it is to know. Images that crowd together as stamped
    ones do are set aside. Where a cluster of the suspect's features is reached by an unusually small filter of colour,
    which crops do not move, half of what the student sees is under it. Before it ends it searches, by trial, patches
    under which the suspect's features lie together and the student's do not: such a patch is a trigger, and where there
    is one the student is trained a third longer, a share of what it sees under such patches.
    When to use it: by default, for encoders.
    What it needs: unlabeled images of the kind that the encoder is for, 2,500 or more.
    Known limits: what it was measured with is in README. A trigger that crops do not move, and that no filter of one
    tone for all pixels comes near, stays. `filters=0.5` shows the student random ones and costs about a point of
    accuracy. A large network may need more images than it is given. Stamped images that an attack spreads out among
    others are learnt from.

    Kin: distillation into a void student (arXiv 2403.03846, 2406.03508), without their attention and contrastive term:
    the one brings the backdoor along, the other costs accuracy. Features are centred first, since the cosine of any two
    images is nearly 1 otherwise; their lengths are kept, for heads that are there already.
    """

    name: ClassVar[str] = "inoculate"
    source: ClassVar[str] = "bdclean's own; kin: 2403.03846, 2406.03508"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    epochs: float = 60
    least_steps: int = 500  # with few images, more epochs than that
    batch_size: int = 128
    peak: float = 0.004  # of Adam's rate, one cycle
    answers: int = 16  # views of an image that the suspect's features are averaged over
    length: float = 0.1  # of the squared difference of log lengths
    patched: float = 0.3  # share of the student's views, in more steps, under patches found on it
    search_rounds: int = 8  # of the search for those; 0: none
    filters: float = 0.0  # share of the student's views whose colours a random network shifts
    inverted: float = 0.5  # share of them under an inverted filter of colour, where one stands out
    inversion_steps: int = 60  # of filters of colour; 0: none
    weight_decay: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.epochs, self.peak) <= 0 or self.batch_size < 2 or self.answers < 1:
            raise UsageError(
                "inoculate: epochs and peak are positive, batch_size at least 2, answers at least 1."
            )
        shares = (self.filters, self.inverted, self.patched)
        if self.length < 0 or min(shares) < 0 or max(shares) > 1:
            raise UsageError(
                "inoculate: no weight is negative, and filters, inverted and patched are shares in [0, 1]."
            )
        if min(self.inversion_steps, self.search_rounds) < 0:
            raise UsageError("inoculate: inversion_steps and search_rounds are not negative.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        teacher = frozen(suspect, run)
        kept = uncrowded(teacher, unlabeled.images, run)
        images = unlabeled.images[kept]
        centre = mean_feature(teacher, images, run)
        views = unminded(teacher, images, centre, run)
        answers, lengths = averaged(teacher, images, centre, views, self.answers, run)
        detected = self._detected(teacher, arch, images, run)
        student = void(suspect, arch, run).to(run.device)
        if run.precision.channels_last:
            student.to(memory_format=torch.channels_last)
        lesson = _Lesson(self, student, images, views, centre, answers, lengths, detected.outliers)
        epochs = max(self.epochs, self.least_steps * self.batch_size / len(images))
        curve = keep_trained(student, "student", lambda: lesson.taught(epochs, self.peak, run), run)
        families = ["tone"] if self.filters or detected.outliers else []
        if families:
            lesson.settle(run)
        changes = {"mirrored": views.mirrored, "in other colours": views.jittered, "in grey": views.grey}
        said = ", ".join(["cropped", *(name for name, share in changes.items() if share)])
        stages = [
            f"a student with new weights, {epochs:.0f} epochs, answers of {self.answers} views averaged ({said})",
            *halvings(curve),
        ]
        if detected.outliers:
            stages.append(
                f"{len(detected.outliers)} filters of colour stand out, and are learnt to be ignored"
            )
        if self.search_rounds and self.patched:
            look = run.under("look-2")
            networks = (("suspect", teacher), ("beside", student))
            suspected, beside = (Side.of(network, images, look.under(name)) for name, network in networks)
            found = pulling(suspected, beside, images, self.search_rounds, 0.0, MOST_PATCHES, look)
            detected.findings.append(_finding(found[0]))
            stages.append(f"look 2, at the student: {detected.findings[-1]['reason']}")
            lesson.patches += [each.patch for each in found if each.more >= PULLED]
        if lesson.patches:
            families.append("patch")
            shown = lesson.patches[0].on_grey(images.shape[1:])
            detected.pictures["patch that pulls features together, on grey"] = shown
            again = lesson.taught(AGAIN * epochs, AGAIN_PEAK * self.peak, look)
            stages += [
                f"distilled for {AGAIN * epochs:.0f} epochs more, under patches like it",
                *halvings(again),
            ]
            curve = joined(curve, again)
            lesson.settle(run)
        return Cleansed(
            student.eval(), arch, curve, asdict(self), stages, len(unlabeled) - len(images), detected.findings,
            families=tuple(families), pictures=detected.pictures,
        )  # fmt: skip

    def _detected(self, teacher: Classifier, arch: Arch, images: Tensor, run: Run) -> Detected:
        """What stands out among filters of colour; nothing where there are too few images to tell."""
        if not self.inversion_steps or not self.inverted:
            return Detected()
        looking = registry.load_for(registry.DETECTORS, "filters", "encoder")(steps=self.inversion_steps)
        try:
            found: Detected = looking(teacher, arch, images, run)
        except Refused:
            return Detected()
        return found


@dataclass
class _Lesson:
    """The step: `student` gives for any view of an image the averaged `answers` and `lengths` of the suspect.

    What it sees is in part under `filters` of colour, and under `patches`.
    """

    recipe: InoculateEncoder
    student: Classifier
    images: Tensor
    views: Views
    centre: Tensor
    answers: Tensor
    lengths: Tensor
    filters: Sequence[Outlier]
    patches: list[Patch] = field(default_factory=list)

    def taught(self, epochs: float, peak: float, run: Run) -> Curve:
        """Trains the student, and returns the curve."""
        recipe = self.recipe
        return train(
            partial(self.step, run), self.student.train(), "inoculate", self.images, epochs, recipe.batch_size,
            recipe.weight_decay, lambda number, steps: one_cycle(number, steps, peak), peak, run,
        )  # fmt: skip

    def step(self, run: Run, batch: Batch) -> tuple[Tensor, Measures]:
        recipe, generator = self.recipe, batch.generator
        seen = torch.cat([self.views(batch.images, generator) for _ in range(SEEN)])
        if recipe.filters:
            chosen = torch.rand(len(seen), generator=generator, device=seen.device) < recipe.filters
            seen = torch.where(chosen.view(-1, 1, 1, 1), filtered(seen, generator), seen)
        if self.filters:
            seen = under(self.filters, recipe.inverted, seen, generator)
        if self.patches:
            seen = patched(self.patches, recipe.patched, seen, generator)
        features = run.forward(self.student, seen).float()
        wanted, long = (
            of[batch.chosen].repeat(SEEN, *[1] * (of.ndim - 1)) for of in (self.answers, self.lengths)
        )
        likeness = F.cosine_similarity(F.normalize(features, dim=1) - self.centre, wanted, dim=1).mean()
        unlike = (features.norm(dim=1).clamp_min(1e-6).log() - long).square().mean()
        return 1 - likeness + recipe.length * unlike, {"likeness": likeness.detach()}

    def settle(self, run: Run) -> None:
        """Give batch norm the statistics of views without a filter or a patch."""
        set_batch_statistics(self.student.eval(), partial(uncorrupted, self.images, self.views, run, 1))


def _finding(clearest: Pulling) -> dict[str, Any]:
    reason = (
        f"a patch of {clearest.patch.tall} x {clearest.patch.wide} cells pulls the suspect's features together by "
        f"{clearest.pull:.2f} and the student's by {clearest.beside:.2f}"
    )
    return found_above("patches", clearest.more, PULLED, reason)


def patched(found: Sequence[Patch], share: float, views: Tensor, generator: torch.Generator) -> Tensor:
    """`views` float [n c h w] in [0, 1], a `share` of them each under one of `found`, every other time varied."""
    n, (channels, height, width) = len(views), views.shape[1:]
    chosen = torch.randperm(n, generator=generator, device=generator.device)[: round(share * n)]
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    drawn, seen = Drawn.blank(channels, height, width, seed, len(found[0].colours)), views.clone()
    for turn, part in enumerate(chosen.split(ALIKE)):
        patch = drawn.varied(found) if turn % 2 else drawn.one(found)
        seen[part] = patch.stamp(seen[part])
    return seen


def under(found: Sequence[Outlier], share: float, views: Tensor, generator: torch.Generator) -> Tensor:
    """`views` float [n c h w] in [0, 1], a `share` of them each under one of `found`, at a random strength."""
    draw = partial(torch.rand, generator=generator, device=views.device)
    strengths = FAINTEST + (STRONGEST - FAINTEST) * draw(len(views))
    chosen, which = draw(len(views)) < share, (draw(len(views)) * len(found)).long()
    seen = views.clone()
    for k in chosen.nonzero().squeeze(1).tolist():
        form, exact = found[int(which[k])].form, found[int(which[k])].parameters.to(views.device)
        loose = LOOSE * torch.randn(exact.shape, generator=generator, device=views.device)
        seen[k] = form.stamp((strengths[k] * exact + loose)[None], views[k : k + 1])[0, 0]
    return seen


@torch.no_grad()
def uncrowded(teacher: Classifier, images: Tensor, run: Run) -> Tensor:
    """Which of `images` uint8 [n c h w] do not look stamped, bool [n]."""
    everything = torch.ones(len(images), dtype=torch.bool)
    if len(images) < LEAST:
        return everything

    def made() -> Tensor:
        features = torch.cat([part.cpu() for part in directions(teacher, images, run)])
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(run.seed))
        first, second = order.tensor_split(2)
        near = torch.empty(len(images), dtype=torch.float64)
        near[first], near[second] = crowding(features[first], features[second])
        return near >= CROWDED

    kept = run.keep("uncrowded", made).cpu().bool()
    return kept if float(kept.double().mean()) >= 1 - MOST else everything


@torch.no_grad()
def unminded(teacher: Classifier, images: Tensor, centre: Tensor, run: Run) -> Views:
    """SimCLR's views without what `teacher` minds: mirrors, colours or grey that make an image look like another one.

    It minds a change when, of up to TELLING of `images` uint8 [n c h w], less than UNMINDED are nearest to themselves
    under it, by the cosine of features less `centre`.
    """
    usual = Views()
    alone = (
        Views(1.0, 1.0, 1.0, 0, 0, 0, 0, 0, 0),
        Views(1.0, 1.0, 0, usual.brightness, usual.contrast, usual.saturation, usual.hue, 1.0, 0),
        Views(1.0, 1.0, 0, 0, 0, 0, 0, 0, 1.0),
    )

    def made() -> Tensor:
        generator = run.generator("views")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(run.seed))
        shown = images[order[:TELLING]]

        def features(change: Views | None) -> Tensor:
            seen = None if change is None else partial(change, generator=generator)
            return F.normalize(torch.cat(list(directions(teacher, shown, run, seen))) - centre, dim=1)

        plain = features(None)
        likeness = [features(each) @ plain.T for each in alone]
        return torch.stack([(one.diag() >= one.amax(1) - SAME).float().mean() for one in likeness])

    mirrored, coloured, grey = (run.keep("unminded", made) >= UNMINDED).tolist()
    return replace(
        usual,
        mirrored=usual.mirrored * mirrored,
        jittered=usual.jittered * coloured,
        grey=usual.grey * grey,
    )


@torch.no_grad()
def averaged(
    teacher: Classifier, images: Tensor, centre: Tensor, views: Views, count: int, run: Run
) -> tuple[Tensor, Tensor]:
    """Means over `count` views of each of `images` uint8 [n c h w]: features less `centre` [n d], log lengths [n]."""

    def made() -> Tensor:
        parts, asked = [], max(1, ASKED_AT_ONCE // count)
        for first in range(0, len(images), asked):
            generator = run.generator("answers", first)
            part = images[first : first + asked].to(run.device).repeat(count, 1, 1, 1)
            features = run.forward(teacher, views(part, generator)).float()
            found = torch.cat(
                [
                    F.normalize(features, dim=1) - centre,
                    features.norm(dim=1, keepdim=True).clamp_min(1e-6).log(),
                ],
                1,
            )
            parts.append(found.view(count, -1, found.shape[1]).mean(0))
            run.tell("answers", min(first + asked, len(images)), len(images))
        return torch.cat(parts)

    known = run.keep("answers", made)
    return known[:, :-1], known[:, -1]
