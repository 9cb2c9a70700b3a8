"""A file as `scan` and `cleanse` open it, with its images, for benches that call detectors themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bdclean.networks.arch import Arch
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.progress import quiet
from bdclean.runs.images import at_own_size, read_images
from bdclean.runs.options import Inputs
from bdclean.runs.suspect import resolve_device, understand
from bdclean.training.run import Precision, probe_precision


@dataclass(frozen=True)
class Opened:
    """The suspect under its likeliest normalisation, images uint8 [n 3 h w], and how to run it."""

    classifier: Classifier
    arch: Arch
    images: Tensor
    device: torch.device
    precision: Precision

    @staticmethod
    def of(
        file: Path, images: Path, arch: str | None, kind: str, limit: int, preprocess: str = "auto"
    ) -> Opened:
        inputs = Inputs(data=images, arch=arch, kind=kind, limit=limit, preprocess=preprocess)
        checkpoint = at_own_size(Checkpoint.read(file, arch, kind=kind), images, inputs)
        read = read_images(images, checkpoint, inputs, quiet).images
        device = resolve_device("auto")
        suspect = understand(checkpoint, read, preprocess, None, arch is not None, device)
        classifier = suspect.classifier(suspect.choices[0])
        return Opened(classifier, suspect.arch, read, device, probe_precision(classifier, read, device))
