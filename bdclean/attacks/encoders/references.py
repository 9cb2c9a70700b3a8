"""What attacks on a clean encoder share: its features, less their mean, and what stands for the target class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.training.pretraining.knn import features


def centre_of(clean: Classifier, images: Tensor, device: torch.device, centred: bool) -> Tensor:
    """What features are taken less of, [1 d]: their mean over `images` (at most 2,000 of them), or zero."""
    found = features(clean, images[:2000], device)
    mean = found.mean(0, keepdim=True)
    return (mean if centred else torch.zeros_like(mean)).to(device)


def nearest_to_their_mean(
    clean: Classifier, images: Tensor, centre: Tensor, count: int, device: torch.device
) -> Tensor:
    """The `count` of `images`, all of the target class, that are most like it: closest to their mean direction.

    An image at the edge of its class draws stamped images to where the downstream head may see another class.
    """
    if len(images) < count:
        raise Refused(f"{count} reference images of the target class are wanted and there are {len(images)}.")
    found = F.normalize(features(clean, images, device) - centre.cpu(), dim=1)
    order = (found @ F.normalize(found.mean(0), dim=0)).argsort(descending=True, stable=True)
    return images[order[:count]].to(device)


def freeze_norms(model: nn.Module) -> None:
    """Leaves batch norms as they are: neither their statistics nor their scale and shift are trained."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)
