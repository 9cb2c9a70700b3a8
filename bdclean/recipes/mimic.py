"""MIMIC: a void student clones an encoder, and looks where those stages look that know most of the features."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.networks.taps import seeing
from bdclean.recipes.recipe import Cleansed
from bdclean.training.encoder_lesson import EncoderLesson, Terms, train_encoder
from bdclean.training.loop import halvings
from bdclean.training.map_losses import attention, scaled_attention
from bdclean.training.mutual_information import ESTIMATORS, mutual_information
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.run import Run
from bdclean.training.students import void

POOLED = 2
"""The side that a stage's maps are pooled to before their information is estimated."""


@dataclass(frozen=True)
class Mimic:
    """Mutual-information guided mimicry (Han et al., arXiv 2406.03508).

    What it does: trains a network with new weights to have the suspect's features on clean images, and to look where
    its stages look, each stage weighted by the mutual information of its maps with the features.
    When to use it: to compare with the paper. `mi=uniform` weights all stages alike; `least=0 shared=0 contrast=0` is a
    clone alone, `clone=0 contrast=0` attention alone.
    What it needs: unlabeled images of the kind that the encoder is for, 2,000 in the paper, and long training.
    Known limits: loses accuracy with few images, as every student with new weights.

    Settings are the authors' code's. Departures: `mi=teacher` is the paper's abstract, the code estimates on the
    untrained student (`mi=student`); maps are pooled to 2 x 2 before (the code's first layer has 34 million weights);
    estimates are read off on held-out images; attention is on a scale that does not depend on a map's size
    (`weights=paper` is the code's).
    """

    name: ClassVar[str] = "mimic"
    source: ClassVar[str] = "arXiv 2406.03508"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    mi: Literal["teacher", "student", "uniform", "random"] = "teacher"
    estimator: Literal["dv", "infonce", "club"] = "dv"
    mi_epochs: int = 200
    weights: Literal["even", "paper"] = "even"
    least: float = 2.5  # of a stage's attention; with weights=paper 1000
    shared: float = 25.0  # times a stage's share of the information; with weights=paper 10000
    clone: float = 1.0
    contrast: float = 1.0  # of SimCLR's loss, which the code has and the abstract does not name
    epochs: float = 1000
    batch_size: int = 128
    rate: float = 1e-3
    weight_decay: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.epochs, self.rate, self.mi_epochs) <= 0 or self.batch_size < 2:
            raise UsageError("mimic: epochs and rate are positive, batch_size at least 2.")
        if min(self.least, self.shared, self.clone, self.contrast) < 0:
            raise UsageError("mimic: no weight is negative.")
        assert self.estimator in ESTIMATORS

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        student = void(suspect, arch, run)
        shares = self._shares(suspect, student, arch, unlabeled.images, run)
        paper = self.weights == "paper"
        least, shared = (1000.0, 10000.0) if paper else (self.least, self.shared)
        weights = {tap: least + shared * share for tap, share in zip(arch.taps, shares, strict=True)}
        terms = Terms(
            clone=self.clone, contrast=self.contrast, maps=attention if paper else scaled_attention, map_weights=weights
        )  # fmt: skip
        lesson = EncoderLesson(suspect, student, arch, unlabeled.images, terms, Views(), run)
        curve = train_encoder(
            lesson, "mimic", unlabeled.images, self.epochs, self.batch_size, self.weight_decay,
            lambda step, steps: self.rate, self.rate, run,
        )  # fmt: skip
        said = ", ".join(f"{tap} {100 * share:.0f} %" for tap, share in zip(arch.taps, shares, strict=True))
        stages = [f"shares of the information ({self.mi}, {self.estimator}): {said}", *halvings(curve)]
        return Cleansed(lesson.student.eval(), arch, curve, asdict(self), stages)

    def _shares(
        self, suspect: Classifier, student: Classifier, arch: Arch, images: Tensor, run: Run
    ) -> list[float]:
        """Each stage's share of the information, in the order of the taps; they sum to one."""
        count = max(1, len(arch.taps))
        if self.mi == "uniform":
            return [1 / count] * len(arch.taps)
        if self.mi == "random":
            drawn = torch.rand(count, generator=run.generator("mi"), device=run.device)
            return (drawn / drawn.sum()).tolist()[: len(arch.taps)]

        def made() -> Tensor:
            maps, features = pooled(suspect if self.mi == "teacher" else student, arch, images, run)
            found = []
            for number, each in enumerate(maps):
                found.append(mutual_information(each, features, self.estimator, self.mi_epochs, run.seed))
                run.tell("mutual information", number + 1, len(maps))
            return torch.tensor(found)

        known = run.keep("mutual information", made).cpu()
        total = float(known.sum())
        return (known / total).tolist() if total > 0 else [1 / count] * len(arch.taps)


def pooled(model: Classifier, arch: Arch, images: Tensor, run: Run) -> tuple[list[Tensor], Tensor]:
    """The maps at each tap, pooled and in rows [n c p p], and the features of length one [n d], on the CPU."""
    model = model.to(run.device).eval()
    maps: dict[str, list[Tensor]] = {tap: [] for tap in arch.taps}
    features = []
    with torch.no_grad(), seeing(model.network, arch) as seen:
        for part in images.split(256):
            found = run.forward(model, part.to(run.device).float() / 255)
            features.append(F.normalize(found.float(), dim=1).cpu())
            for tap in arch.taps:
                pooled_maps = F.adaptive_avg_pool2d(seen.maps[tap].float(), POOLED).flatten(1)
                maps[tap].append(run.whole(pooled_maps, len(part)).cpu())
    return [torch.cat(maps[tap]) for tap in arch.taps], torch.cat(features)
