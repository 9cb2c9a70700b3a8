"""bdclean's own choice among its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from bdclean import registry
from bdclean.data.imageset import ImageSet
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.registry import FAMILIES
from bdclean.training.run import Run


@dataclass(frozen=True)
class Auto:
    """Runs `inoculate`, with its defaults, whatever images are given.

    What it does: hands everything to `inoculate`; labels, where there are any, are not used, since no recipe that needs
    them left less of a backdoor in what was measured.
    When to use it: unless you know better.
    What it needs: unlabeled images.
    Known limits: those of `inoculate`.
    """

    name: ClassVar[str] = "auto"
    source: ClassVar[str] = "bdclean's own"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = FAMILIES

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        recipe = registry.load_recipe("inoculate", arch.kind)()
        cleansed: Cleansed = recipe(suspect, arch, unlabeled, labeled, run)
        return replace(cleansed, stages=["auto chose inoculate", *cleansed.stages])
