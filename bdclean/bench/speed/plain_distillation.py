"""A plain distillation of an encoder, as one would first write it: what `distill` and `mimic` are held against.

Written from what the facts say of the authors' code (wssun/SSLBackdoorMitigation, wssun/MIMIC), not copied: float32,
NCHW, a data loader without workers that draws two views of one Pillow image at a time, three passes of the student (two
views, and the first again for its maps), the teacher's graph kept, and hooks set anew for every batch. Departure: the
hooks are taken off again, where the code leaves them all in place and slows down from step to step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bdclean.networks.normalisation import Preprocess

WEIGHT = 3500.0
"""Of each stage's attention: MIMIC's with the same information in all four stages."""


def views(preprocess: Preprocess, side: int) -> Callable[[Image.Image], tuple[Tensor, Tensor]]:
    """Two SimCLR views of an image, normalised [3 h w]: one image at a time."""
    one = transforms.Compose(
        [
            transforms.RandomResizedCrop(side),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.ToTensor(),
            transforms.Normalize(preprocess.mean, preprocess.std),
        ]
    )
    return lambda image: (one(image), one(image))


class PlainDistillation:
    """Distillation of `network`, an encoder with features of `width`, into one with new weights; `step` is one update.

    `images` gives pairs of views; `taps` are the names of the stages whose attention is compared.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Dataset[Any],
        taps: Sequence[str],
        width: int,
        device: torch.device,
        batch_size: int = 128,
    ):
        self.device, self.taps = device, taps
        self.teacher = copy.deepcopy(network).to(device).eval()
        self.student = copy.deepcopy(network).to(device).train()
        for module in self.student.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm):
                module.reset_parameters()
        self.projector = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 128)
        ).to(device)
        parameters = [*self.student.parameters(), *self.projector.parameters()]
        self.optimiser = torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-6)
        self.loader = DataLoader(images, batch_size=batch_size, shuffle=True, drop_last=True)
        self.batches = iter(self.loader)
        self.losses: list[float] = []

    def step(self) -> None:
        pair = next(self.batches, None)
        if pair is None:
            self.batches = iter(self.loader)
            pair = next(self.batches)
        first, second = (view.to(self.device) for view in pair)
        ours, theirs = self.student(first), self.teacher(first)
        contrast = self._nt_xent(ours, self.student(second))
        student, teacher = self._maps(self.student, first), self._maps(self.teacher, first)
        attention = sum(
            WEIGHT * F.mse_loss(self._attention(s), self._attention(t.detach()))
            for s, t in zip(student, teacher, strict=True)
        )
        loss = contrast + attention - F.cosine_similarity(ours, theirs.detach(), dim=1).mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.losses.append(loss.item())

    def _maps(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        """The maps [n c h w] of each stage, from a pass of their own."""
        found: list[Tensor] = []
        hooks = [
            network.get_submodule(tap).register_forward_hook(lambda _m, _i, out: found.append(out))
            for tap in self.taps
        ]
        network(images)
        for hook in hooks:
            hook.remove()
        return found

    @staticmethod
    def _attention(maps: Tensor) -> Tensor:
        return F.normalize(maps.square().sum(1).flatten(1), dim=1)

    def _nt_xent(self, first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
        rows = F.normalize(self.projector(torch.cat([first, second])), dim=1)
        likeness = rows @ rows.T / temperature
        likeness.fill_diagonal_(-torch.inf)
        n = len(first)
        return F.cross_entropy(likeness, torch.cat([torch.arange(n, 2 * n), torch.arange(n)]).to(rows.device))
