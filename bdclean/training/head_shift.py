"""A head that is drawn anew and kept from going back to where it was: what `fst` and `d3` do to a classifier."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from bdclean.errors import Refused
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier


def head_of(model: Classifier, arch: Arch, name: str) -> tuple[nn.Module, nn.Parameter]:
    """The head of `model` and its weight; raises Refused, in the name of the recipe `name`, where it has none."""
    head = model.network.get_submodule(arch.head)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise Refused(
            f"{name} draws a head's weight anew, and {arch.name}'s head, {arch.head or 'none'}, has no weight: "
            "use another recipe."
        )
    return head, weight


def keep_norm(weight: Tensor, norm: Tensor, optimiser: Optimizer) -> None:
    """From now on `weight` is scaled to the Frobenius `norm` after each step of `optimiser`."""

    def project(*_: object) -> None:
        weight.data.mul_(norm / weight.data.norm())

    optimiser.register_step_post_hook(project)
