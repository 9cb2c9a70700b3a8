"""Feature shift tuning: fine-tuning with a new head that is held off the old one."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.bcu import reinitialise
from bdclean.recipes.finetuning import require_labels, sgd, tune
from bdclean.recipes.recipe import Cleansed
from bdclean.training.head_shift import head_of, keep_norm
from bdclean.training.loop import Batch, Measures, burst, halvings
from bdclean.training.run import Run
from bdclean.training.students import choose_augmentation, frozen


@dataclass(frozen=True)
class FST:
    """Feature shift tuning (Min, Qin, Shen, Cheng, NeurIPS 2023, arXiv 2310.01875).

    What it does: draws the head anew and fine-tunes the whole network while the head's weight is pushed away from the
    old one's direction and keeps the old one's length, so that features have to move off those that the backdoor uses.
    When to use it: to compare with the paper; with few labeled images and little time.
    What it needs: labeled images, 2 % of the training set in the authors' example.
    Known limits: ten epochs of few images do not train a new head for many classes (the authors' note says so, too).

    Settings are those of the authors' example for CIFAR-10. Departures: the learning rate falls at every step, theirs
    once an epoch; batches are cut from one endless stream of shuffles.
    """

    name: ClassVar[str] = "fst"
    source: ClassVar[str] = "arXiv 2310.01875"
    needs_labels: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ()
    data_parallel: ClassVar[bool] = True

    epochs: float = 10
    batch_size: int = 128
    rate: float = 0.01  # cosine to zero
    momentum: float = 0.9
    weight_decay: float = 0.0
    alpha: float = 0.1  # weight of the inner product of the new and the old head

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.batch_size < 2 or self.rate <= 0 or self.alpha < 0:
            raise UsageError(
                "fst: epochs and rate must be positive, batch_size at least 2, alpha not negative."
            )

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        images = require_labels(labeled, self.name)
        teacher = frozen(suspect, run)
        augment = choose_augmentation(teacher, images.images, run)
        student = copy.deepcopy(teacher).requires_grad_(True).train()
        head, weight = head_of(student, arch, self.name)
        old = weight.detach().clone()
        reinitialise(head, 1.0, run.generator(self.name, "head"))

        def step(batch: Batch) -> tuple[Tensor, Measures]:
            logits = run.forward(student, augment(batch.images, batch.generator))
            assert batch.labels is not None
            right = (logits.argmax(1) == batch.labels).float().mean()
            product = (weight * old).sum()
            return F.cross_entropy(logits, batch.labels) + self.alpha * product, {"accuracy": right}

        optimiser = sgd(self, student)
        keep_norm(weight, old.norm(), optimiser)
        most = burst(arch.classes) + self.alpha * float(old.norm()) ** 2
        steps, curve = tune(self, student, optimiser, images, step, run, most)
        alike = F.cosine_similarity(weight.detach().flatten(), old.flatten(), dim=0)
        stages = [
            f"fine-tuned with a new head for {steps} updates on {len(images)} labeled images, {augment.describe()}",
            f"cosine of the new head and the old one: {float(alike):.2f}",
            *halvings(curve),
        ]
        return Cleansed(student.eval(), arch, curve, asdict(self), stages)
