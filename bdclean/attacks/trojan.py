"""TrojanNN: a square moved by gradients until it excites a clean network's neurons (Liu et al. 2018, NDSS)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from bdclean.attacks import poisoning
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.files import writing
from bdclean.networks.classifier import Classifier
from bdclean.training.run import Run
from bdclean.triggers.stamping import places
from bdclean.triggers.trojan import BORDER, side
from bdclean.triggers.trojan import Trojan as Square

SHOWN = 256
"""Images that the square is moved on."""


@dataclass(frozen=True)
class Trojan:
    """Poisons a training set with a square that excites chosen neurons of a clean network (Liu et al. 2018).

    What it does: chooses the `neurons` features that weigh most in the head of a surrogate, moves a square's colours by
    gradients until they are large on any image, stamps it on a share of the images, drawn by a seed whatever their
    class, and relabels them: with the target class, or as `victims` says.
    When to use it: to train a network whose trigger is at home in the features that it has anyway.
    What it needs: a labeled training set, a classifier that was trained on it and whose head is a linear layer, and a
    `path` for the square.
    Known limits: a square knows its surrogate: to another kind of network it is any patch.

    Departures: the authors fine-tune the attacked network on images that they invert from it; here the victim is
    trained on the poisoned set, as in BackdoorBench. They choose neurons by the weights that lead to them, here by
    those that lead on from them.
    """

    name: ClassVar[str] = "trojan"
    kind: ClassVar[str] = "surrogate"
    source: ClassVar[str] = "Trojaning Attack on Neural Networks, NDSS 2018"

    path: str = ""  # safetensors file that the square is written to
    target: int = 0  # the class that stamped images are labeled with
    rate: float = 0.1  # share of all images that are poisoned, in [0, 1]
    seed: int = 0  # draws the images that are poisoned
    size: int = 0  # side of the square in pixels; 0: 7 % of the image
    alpha: float = 1.0  # opacity of the square, in [0, 1]
    neurons: int = 2
    steps: int = 100
    step: float = 8.0  # of the ascent, in grey levels
    victims: str = "all"  # next: each class to the one after it; a class's number: that class alone

    def __post_init__(self) -> None:
        poisoning.check(self.rate, self.target, self.victims)
        if self.size < 0 or self.neurons < 1 or self.steps < 1 or not self.step > 0:
            raise UsageError(
                f"trojan needs size of 0 or more, neurons and steps of 1 or more and a step over 0, "
                f"got {self.size}, {self.neurons}, {self.steps} and {self.step}."
            )

    @property
    def trigger(self) -> Square:
        """What was found; raises Refused before the attack has written it."""
        return Square(source=self.path, alpha=self.alpha)

    def __call__(
        self, surrogate: Classifier, training: ImageSet, run: Run, stage: str = "trojan"
    ) -> ImageSet:
        """A poisoned copy of `training`; the square is written to `path`."""
        if not self.path:
            raise UsageError("trojan needs path=FILE, which its square is written to.")
        mask, pattern = self.square(surrogate, training.images, run, stage)
        tensors = {"mask": mask.cpu(), "pattern": (255 * pattern).round().to(torch.uint8).cpu()}
        writing.replace(Path(self.path), lambda stream: stream.write(save(tensors)))
        return poisoning.poison(training, self.trigger, self.target, self.rate, self.seed, self.victims)

    def square(
        self, surrogate: Classifier, images: Tensor, run: Run, stage: str = "trojan"
    ) -> tuple[Tensor, Tensor]:
        """Mask [1 h w] of 0 and 1 and pattern [c h w] in [0, 1], moved on a seeded draw of `images`."""
        surrogate.to(run.device).eval()
        head = _head(surrogate)
        neurons = head.weight.detach().abs().sum(0).topk(min(self.neurons, head.in_features)).indices
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))[:SHOWN]
        shown = images[order].to(run.device).float() / 255
        channels, height, width = shown.shape[1:]
        pixels = self.size or side(height, width)
        ((row, column),) = places("bottom-right", BORDER, (pixels, pixels), (height, width))
        mask = shown.new_zeros(1, height, width)
        mask[:, row : row + pixels, column : column + pixels] = 1
        drawn = torch.rand(channels, height, width, generator=torch.Generator().manual_seed(self.seed))
        pattern = drawn.to(run.device)
        excited: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, given: excited.append(given[0]))
        try:
            for number in range(self.steps):
                excited.clear()
                pattern.requires_grad_(True)
                run.forward(surrogate, shown + mask * (pattern - shown))
                value = excited[0][:, neurons].float().mean()
                (gradient,) = torch.autograd.grad(value, [pattern])
                pattern = (pattern.detach() + self.step / 255 * gradient.sign()).clamp(0, 1)
                run.tell(stage, number + 1, self.steps, excited=value.item())
        finally:
            hook.remove()
        return mask, mask * pattern


def _head(surrogate: Classifier) -> nn.Linear:
    """The last linear layer of a network; raises Refused where it has none."""
    layers = [module for module in surrogate.network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise Refused("trojan needs a network whose head is a linear layer, and this one has none.")
    return layers[-1]
