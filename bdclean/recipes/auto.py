"""bdclean's own choice among its recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from bdclean import registry
from bdclean.data.imageset import ImageSet
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.inoculate import Inoculate
from bdclean.recipes.inoculate_encoder import InoculateEncoder
from bdclean.recipes.recipe import Cleansed
from bdclean.training.known import Known
from bdclean.training.run import Run

CHOSEN = "auto chose inoculate"


@dataclass(frozen=True)
class Auto:
    """Runs `inoculate`, with its defaults, and unlearns the triggers that fired on the suspect in this very run.

    What it does: hands everything to `inoculate`, together with the triggers that were just seen firing, of which it
    is told alone: their stamps, and others of their place and strength, are learnt to be ignored on the given images,
    of which those are set aside that carry one. Where a trigger still fires on the written file, it goes on once with
    more of it. Labels, where there are any, are not used, since no recipe that needs them left less of a backdoor in
    what was measured.
    When to use it: unless you know better.
    What it needs: unlabeled images.
    Known limits: those of `inoculate`. A trigger that it was told says nothing of others: rows of it are shown apart.
    """

    name: ClassVar[str] = "auto"
    source: ClassVar[str] = "bdclean's own"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = registry.FAMILIES
    data_parallel: ClassVar[bool] = True

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        return self.unlearn((), suspect, arch, unlabeled, run)

    def unlearn(
        self, known: Sequence[Known], suspect: Classifier, arch: Arch, unlabeled: ImageSet, run: Run
    ) -> Cleansed:
        cleansed = Inoculate().against(known, suspect, arch, unlabeled, run)
        return replace(cleansed, stages=[CHOSEN, *cleansed.stages])

    def insist(
        self, known: Sequence[Known], begun: Cleansed, suspect: Classifier, unlabeled: ImageSet, run: Run
    ) -> Cleansed:
        return Inoculate().insist(known, begun, suspect, unlabeled, run)


@dataclass(frozen=True)
class AutoEncoder:
    """Runs `inoculate` for encoders, with its defaults, whatever images are given.

    What it does: hands everything to `inoculate`; labels, where there are any, are not used.
    When to use it: unless you know better.
    What it needs: unlabeled images.
    Known limits: those of `inoculate`. Triggers that fired on the suspect are not used: the student has new weights and
    learns what the suspect says of images without them.
    """

    name: ClassVar[str] = "auto"
    source: ClassVar[str] = "bdclean's own"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        cleansed = InoculateEncoder()(suspect, arch, unlabeled, labeled, run)
        return replace(cleansed, stages=[CHOSEN, *cleansed.stages])
