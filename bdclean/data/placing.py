"""Where a set of images lies while a network is trained on it: on the device if it fits there, else on the host."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE_SHARE = 0.3
"""Of a device's free memory that images may take: activations and gradients need the rest."""


def place(images: Tensor, device: torch.device) -> Tensor:
    """`images` on `device` if they take little of what is free there, else as they are (perhaps paged from disk)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if images.nbytes > DEVICE_SHARE * free:
            return images
    return images.to(device)


def take(images: Tensor, chosen: Tensor, device: torch.device) -> Tensor:
    """The images at `chosen` on `device`, through page-locked memory where they come from the host."""
    part = images[chosen.to(images.device)]
    if part.device == device or device.type == "cpu":
        return part
    return part.pin_memory().to(device, non_blocking=True)
