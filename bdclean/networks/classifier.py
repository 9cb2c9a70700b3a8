"""The network that takes pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdclean.networks.normalisation import Preprocess


class Classifier(nn.Module):
    """A network that takes pixels: uint8 [n c h w], or float in [0, 1] (differentiable), to fp32 logits [n classes]."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.network = network
        self.preprocess = preprocess
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        shape = (1, -1, 1, 1)
        self.register_buffer(
            "mean", torch.tensor(preprocess.mean, device=device).view(shape), persistent=False
        )
        self.register_buffer("std", torch.tensor(preprocess.std, device=device).view(shape), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """What the network takes: float [n c h w]."""
        x = images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images
        if self.preprocess.bgr:
            x = x.flip(1)
        if self.preprocess.raw255:
            x = x * 255
        return (x - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalise(images)).float()
