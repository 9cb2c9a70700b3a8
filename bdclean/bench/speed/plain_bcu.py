"""A plain BCU, as one would first write it: what the speed of the recipe `bcu` is held against.

Written from the description of the authors' code (luluppang/BCU), not copied: float32, NCHW, a data loader without
workers that crops, mirrors and normalises one Pillow image at a time, and the loss read back at every step. Two things
about it are not the same everywhere, and both are measured: `from_disk` opens each image file anew in every epoch (a
folder data set) or keeps decoded Pillow images (as the authors' code does), and `teacher_gradients` builds and walks
the teacher's graph, too (as code does that forgets `no_grad`; the authors' does not).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bdclean.networks.normalisation import Preprocess


class PillowImages(Dataset[Any]):
    """Images of `files` under `transform`, decoded once, or at every look where `from_disk`."""

    def __init__(self, files: Sequence[Path], transform: Callable[[Image.Image], Any], from_disk: bool):
        self.transform = transform
        self.files = list(files)
        self.kept = None if from_disk else [self.open(file) for file in files]

    @staticmethod
    def open(file: Path) -> Image.Image:
        with Image.open(file) as image:
            return image.convert("RGB")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.open(self.files[index]) if self.kept is None else self.kept[index])


def augmentation(preprocess: Preprocess, size: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    """Resize, crop with 4 pixels of padding, mirror, to a tensor, normalise: one image at a time."""
    return transforms.Compose(
        [
            transforms.Resize(size),
            transforms.RandomCrop(size, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(preprocess.mean, preprocess.std),
        ]
    )


class PlainBCU:
    """Distillation of `network` into a copy of it with a tenth of all weights re-drawn; `step` is one update.

    What is re-drawn does not matter for its speed, so no layer has a ratio of its own.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Dataset[Tensor],
        device: torch.device,
        *,
        batch_size: int,
        teacher_gradients: bool,
        epochs: int = 100,
    ):
        self.device, self.epochs, self.teacher_gradients = device, epochs, teacher_gradients
        self.teacher = copy.deepcopy(network).to(device).eval().requires_grad_(teacher_gradients)
        self.student = copy.deepcopy(network).to(device).requires_grad_(True)
        with torch.no_grad():
            for parameter in self.student.parameters():
                if parameter.dim() > 1:
                    fresh = torch.randn_like(parameter) * (2 / parameter[0].numel()) ** 0.5
                    parameter.copy_(torch.where(torch.rand_like(parameter) < 0.1, fresh, parameter))
        self.loader = DataLoader(images, batch_size=batch_size, shuffle=True, drop_last=True)
        self.optimiser = torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, T_max=100)
        self.epoch = 0
        self.batches = iter(self.loader)
        self.losses: list[float] = []

    def step(self) -> None:
        batch = next(self.batches, None)
        if batch is None:
            self.schedule.step()
            self.epoch += 1
            self.batches = iter(self.loader)
            batch = next(self.batches)
        batch = batch.to(self.device)
        temperature = 1 + 3 * (self.epoch + 1) / self.epochs
        self.student.train()
        with torch.set_grad_enabled(self.teacher_gradients):
            targets = self.teacher(batch)
        log_student = F.log_softmax(self.student(batch) / temperature, dim=1)
        loss = F.kl_div(log_student, F.softmax(targets / temperature, dim=1), reduction="batchmean")
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.losses.append(loss.item())
