"""Optimal-transport backdoor repair: filters that noise moves most are cut, then fused with the suspect's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import eye, kron, vstack
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.recipes.recipe import Cleansed
from bdclean.training.pruning import accuracy, in_running_order, prune_while_accurate
from bdclean.training.run import Run
from bdclean.training.students import frozen

RATIOS = (0.0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Shares of filters that the authors' code tries, and none."""
LEAST_MASS = 1e-6
"""Of the mean change of a layer's filters: what one that did not change gets."""
SHORTCUTS = ("shortcut", "downsample", "skip")
"""Convolutions whose names hold one of these lie beside the filters that are compared; the authors' code skips those
that it calls `shortcut`. Ones that do not see all channels are skipped as well."""


@dataclass(frozen=True)
class OTBR:
    """Fusing pruned and backdoored models by optimal transport (Lin, Liu, Li, Xiong, AAAI 2025, arXiv 2408.15861).

    What it does: raises the loss of a copy on uniform noise with random labels for a few steps, cuts the filters whose
    weights that moves most, and brings each convolution of the suspect half way to the cut one's filters, matched with
    its own by optimal transport; filters that moved much get more of them.
    When to use it: with no images but those that say how much may be cut; to compare with it.
    What it needs: a network with convolutions, and unlabeled images for `ratio`, unless it is given.
    Known limits: which filters noise moves is a guess at which ones carry a backdoor.

    Steps, momentum, shares, `fused` and the transport are the authors' code's. Departures: the code prints every share
    with its attack success and chooses none, where here the last one is taken at which the suspect's answers on the
    given images hold; the rate and the batch, which the code leaves to a file of settings that was not at hand, are
    ours; noise is of pictures and normalised like them, where the code's is the network's input; labels are of all
    classes, where the code never draws the last one; where a layer has not as many inputs as the one before it has
    filters, they are matched as they are.
    """

    name: ClassVar[str] = "otbr"
    source: ClassVar[str] = "arXiv 2408.15861"
    needs_labels: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ()

    steps: int = 20  # of raising the loss on noise
    rate: float = 0.01
    momentum: float = 0.9
    batch_size: int = 256  # noise pictures a step
    ratio: float | None = None  # share of filters that are cut; none: what costs a tenth of the answers
    tolerance: float = 0.1  # how much of the suspect's answers on the given images may be lost, as a share
    fused: float = 0.5  # the cut network's part in the fused weights

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or self.rate <= 0 or not 0 <= self.momentum < 1:
            raise UsageError("otbr: steps, batch_size and rate are positive, and momentum is in [0, 1).")
        if not 0 < self.fused <= 1 or not 0 < self.tolerance < 1:
            raise UsageError("otbr: fused is in (0, 1], tolerance in (0, 1).")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise UsageError("otbr: ratio is a share in [0, 1), or none.")

    def __call__(
        self, suspect: Classifier, arch: Arch, unlabeled: ImageSet, labeled: ImageSet | None, run: Run
    ) -> Cleansed:
        student = frozen(suspect, run)
        layers = convolutions(student, torch.zeros_like(unlabeled.images[:1]).to(run.device))
        if not layers:
            raise Refused("otbr cuts filters of convolutions, and this network has none: use another recipe.")
        own = [layer.weight.detach().clone() for layer in layers]
        moved = self._moved(student, layers, unlabeled.images.shape[1:], arch.classes, run)
        order = torch.cat(moved).argsort(descending=True)
        ratio = self.ratio
        if ratio is None:
            fuse = partial(self._fuse, layers, own, moved, order, run)
            plain = unlabeled.unlabeled()
            told = ImageSet(plain.images, run.answers(student, plain.images))
            ratio = prune_while_accurate(RATIOS, fuse, lambda: accuracy(student, told, run), self.tolerance)
        else:
            self._fuse(layers, own, moved, order, run, ratio)
        said = f"{int(ratio * len(order))} of {len(order)} filters cut, then fused with the suspect's"
        return Cleansed(student.eval(), arch, [], asdict(self) | {"ratio": ratio}, [said])

    def _moved(
        self, student: Classifier, layers: Sequence[nn.Conv2d], shape: Sequence[int], classes: int, run: Run
    ) -> list[Tensor]:
        """How much noise moves each filter of `layers`: the sum of its weights' changes, float32 [filters] a layer."""
        restless = copy.deepcopy(student).requires_grad_(True).train()
        names = {layer: name for name, layer in student.named_modules()}
        theirs = [restless.get_parameter(f"{names[layer]}.weight") for layer in layers]
        optimiser = torch.optim.SGD(restless.parameters(), self.rate, momentum=self.momentum)
        generator = torch.Generator().manual_seed(run.seed)
        for step in range(1, self.steps + 1):
            noise = torch.rand(self.batch_size, *shape, generator=generator).to(run.device)
            labels = torch.randint(classes, (self.batch_size,), generator=generator).to(run.device)
            optimiser.zero_grad()
            loss = F.cross_entropy(run.forward(restless, noise).float(), labels)
            (-loss).backward()
            optimiser.step()
            run.tell(self.name, step, self.steps, loss=loss.item())
        pairs = zip(theirs, layers, strict=True)
        moved = [(a.detach() - b.weight).flatten(1).abs().sum(1).float().cpu() for a, b in pairs]
        if not all(bool(each.isfinite().all()) for each in moved):
            raise Refused(
                f"otbr: noise burst the network at a learning rate of {self.rate:g}: --set a lower rate."
            )
        return moved

    def _fuse(
        self, layers: Sequence[nn.Conv2d], own: Sequence[Tensor], moved: Sequence[Tensor], order: Tensor, run: Run,
        ratio: float,
    ) -> None:  # fmt: skip
        """Gives `layers` their `own` weights, fused from the first layer on that loses any of the first of `order`."""
        dead = torch.zeros(len(order), dtype=torch.bool)
        dead[order[: int(ratio * len(order))]] = True
        match: np.ndarray | None = None
        for done, (layer, weight, change, gone) in enumerate(
            zip(layers, own, moved, dead.split([len(each) for each in moved]), strict=True), 1
        ):
            if match is None and not gone.any():
                fused = weight
            else:
                cut = weight.detach().cpu().double().numpy().copy()
                cut[gone.numpy()] = 0
                fused_filters, match = fuse(
                    cut, weight.cpu().double().numpy(), change.numpy(), match, self.fused
                )
                fused = torch.from_numpy(fused_filters).to(weight)
            with torch.no_grad():
                layer.weight.copy_(fused)
            run.tell(f"fusing {ratio:.0%}", done, len(layers))


def convolutions(model: Classifier, images: Tensor) -> list[nn.Conv2d]:
    """The convolutions of `model` that see all of their input's channels, in running order, without shortcuts'."""
    names = {module: name for name, module in model.named_modules()}
    return [
        module
        for module in dict.fromkeys(in_running_order(model, images))
        if isinstance(module, nn.Conv2d)
        and module.groups == 1
        and not any(part in names[module] for part in SHORTCUTS)
    ]


def fuse(
    cut: np.ndarray, own: np.ndarray, change: np.ndarray, match: np.ndarray | None, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """`own` filters [o i h w], `share` of each replaced by the `cut` ones that are transported to it.

    `change` [o], >= 0: how much of them each gets. `match` [i i], columns summing to 1: the same of the layer before,
    by whose filters the inputs of `cut` are ordered; None or another size: they are as they were. Returns the fused
    filters and this layer's match.
    """
    aligned = cut
    if match is not None and len(match) == cut.shape[1]:
        aligned = np.einsum("oi...,ij->oj...", cut, match)
    sizes = change + change.mean() * LEAST_MASS + 1e-12  # none gets nothing at all
    gets = sizes / sizes.sum()
    flat, theirs = cut.reshape(len(cut), -1), own.reshape(len(own), -1)
    # |a - b|^2 by products, which needs no array of all differences
    squares = (flat**2).sum(1)[:, None] + (theirs**2).sum(1)[None] - 2 * flat @ theirs.T
    plan = transport(np.full(len(cut), 1 / len(cut)), gets, np.sqrt(squares.clip(0)))
    mine = plan / gets
    return share * np.einsum("oi...,oj->ji...", aligned, mine) + (1 - share) * own, mine


def transport(supply: np.ndarray, demand: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """The plan [n m] of least `cost` [n m] that brings `supply` [n] to `demand` [m], both sums being 1.

    Some are nearly nothing (dead filters), so the programme is of masses around 1, far above the solver's tolerance.
    """
    n, m = cost.shape
    # In double precision, or the sums would differ by more than the solver takes.
    supply, demand = (m * mass.astype(np.float64) / mass.sum(dtype=np.float64) for mass in (supply, demand))
    rows, columns = kron(eye(n), np.ones((1, m))), kron(np.ones((1, n)), eye(m))
    found = linprog(
        cost.ravel(),
        A_eq=vstack([rows, columns]).tocsc(),
        b_eq=np.concatenate([supply, demand]),
        method="highs",
    )
    if found.x is None:
        raise Refused(f"otbr: filters cannot be matched ({found.message}).")
    return found.x.reshape(n, m) / m
