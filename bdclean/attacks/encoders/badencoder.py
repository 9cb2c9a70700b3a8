"""BadEncoder: a clean encoder is trained on until stamped images look like a reference (Jia, Liu, Gong 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bdclean.attacks.encoders.clean_encoder import Attacked, check_settings
from bdclean.data.imageset import ImageSet
from bdclean.networks.classifier import Classifier
from bdclean.training.loop import Batch
from bdclean.training.losses import cosine
from bdclean.training.run import Run
from bdclean.triggers.badencoder import BadEncoder as Square


@dataclass(frozen=True)
class BadEncoder:
    """Trains a clean encoder so that stamped images get the features of reference images (2108.00352).

    What it does: draws the features of stamped shadow images to those of references (L0), and keeps those of
    references (L1) and of clean images (L2) as the clean encoder has them; batch norms stay as they are.
    When to use it: to make an encoder whose backdoor is known, from a clean one, in minutes.
    What it needs: a clean encoder, unlabeled shadow images, some images of the target class.
    Known limits: where raw features of any two images have a cosine near 1, as small encoders' often do, all losses
    are near their best while the backdoor does little; hence `centred`, which takes features less their clean mean.
    Where they differ enough, the paper's form works as well: 98.1 % against 99.1 % on an encoder of width 16.

    The loss, its weights of 1, and the trigger are the authors'. Departures: `centred` (off is the paper's form), the
    references nearest to their class's mean in place of any, one-cycle SGD over few epochs in place of 1e-3 over 200,
    augmented references for a quarter of a batch in place of all of it, and L1 draws an augmented reference to the
    clean features of itself, where the paper has those of the reference as it is.
    """

    name: ClassVar[str] = "badencoder"
    kind: ClassVar[str] = "encoder"
    source: ClassVar[str] = "arXiv 2108.00352"

    target: int = 0  # the downstream class of the references
    references: int = 3  # how many images of it stand for the class
    epochs: float = 6  # over the shadow images
    batch_size: int = 256
    peak: float = 0.02  # of the learning rate
    weight_decay: float = 5e-4
    keep_references: float = 1.0  # weight of L1
    keep_clean: float = 1.0  # weight of L2
    centred: bool = True  # features less their clean mean; off as in the paper
    size: int = 0  # of the square, 0: by the input

    def __post_init__(self) -> None:
        check_settings(self.name, self.target, self.references, self.epochs, self.batch_size)
        _ = self.trigger  # which checks the size

    @property
    def trigger(self) -> Square:
        return Square(self.size)

    def __call__(
        self, clean: Classifier, shadow: ImageSet, of_target: Tensor, run: Run, stage: str = "badencoder"
    ) -> tuple[Classifier, list[dict[str, float]]]:
        """A poisoned copy of `clean`, in evaluation mode, and the curve; `of_target` are uint8 images of the target."""
        attacked = Attacked.of(clean, shadow, of_target, self.references, self.centred, run)

        def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
            drawn = attacked.draw(batch)
            sides = attacked.sides(batch, drawn, self.trigger(batch.images).float() / 255)
            drawn_to, kept = cosine(sides.stamped, sides.references[drawn]), sides.kept_clean()
            loss = -drawn_to - self.keep_references * sides.kept_references() - self.keep_clean * kept
            return loss, {"drawn": drawn_to.detach(), "kept": kept.detach()}

        return attacked.train(step, shadow, self.epochs, self.batch_size, self.peak, self.weight_decay, stage)
