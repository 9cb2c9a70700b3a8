"""Recipes take a backdoor out. One file each; `bdclean.registry` knows their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from bdclean.data.imageset import ImageSet
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.training.known import Known
from bdclean.training.run import Run


@dataclass
class Cleansed:
    """What a recipe hands back: the network as its last step left it, and how it got there."""

    model: Classifier
    arch: Arch
    curve: list[dict[str, float]]
    settings: dict[str, Any]
    stages: list[str] = field(default_factory=list)
    """What was done, one sentence each, with the values that were chosen on the way."""
    set_aside: int = 0
    """Images of `unlabeled` or `labeled` that were left out because they look stamped."""
    findings: list[dict[str, Any]] = field(default_factory=list)
    """Fields of `record.Finding`, for what the recipe saw of a backdoor on its way."""
    families: tuple[str, ...] = ()
    """Corruption families that it was trained on: rows of their triggers are marked `seen_family`."""
    trained_on: tuple[str, ...] = ()
    """SPECs of triggers that it was told and trained on: their rows are marked `trained_on`."""
    pictures: dict[str, Tensor] = field(default_factory=dict)
    """Caption -> float [c h w] in [0, 1]: what the recipe made on its way, such as inverted masks; never an image."""


class Recipe(Protocol):
    """A frozen dataclass whose fields are its settings. It never sees a trigger, a target class or held-out images.

    One that says `data_parallel: ClassVar[bool] = True` may be run by several processes of torchrun at once. That asks
    of it: all that is random comes from the batch's generator or the run's; weights are trained by the gradients of a
    loss that a step of `fit` returns; what a hook sees in `run.forward` is put together by `run.whole`.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs_labels: ClassVar[bool]
    families: ClassVar[tuple[str, ...]]
    """Corruption families that it can train on; those that it did are in `Cleansed`."""

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed: ...


@runtime_checkable
class Informed(Recipe, Protocol):
    """What only `auto` is: a recipe that may be told the triggers that fired on the suspect in this very run."""

    def unlearn(
        self, known: Sequence[Known], suspect: Classifier, arch: Arch, unlabeled: ImageSet, run: Run
    ) -> Cleansed:
        """As a recipe is called, with the triggers that are `known` to fire on the suspect, which may be none."""

    def insist(
        self, known: Sequence[Known], begun: Cleansed, suspect: Classifier, unlabeled: ImageSet, run: Run
    ) -> Cleansed:
        """Goes on from what `unlearn` left, where `known` triggers fire on it, with stronger settings."""
