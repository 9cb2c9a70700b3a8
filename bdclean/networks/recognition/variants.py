"""Other networks with the same tensors that any network allows: shapes show no activation, no pooling and no stride.

Each is the usual network with modules exchanged, so that names and shapes stay.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from bdclean.networks.arch import Arch, Proposal

# What networks of the same shapes are trained with: ReLU of most, SiLU and GELU of EfficientNets and ConvNeXts, a leak
# of 0.1 of FixMatch's WideResNets, ELU of I-BAU's networks, hardswish of MobileNetV3. Those of ResNets and VGGs are
# told apart by `python -m bdclean.bench readings`. ReLU6 and a leak of 0.01 answer like ReLU, GELU's approximations
# like GELU: no variant of their own.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "leaky": partial(nn.LeakyReLU, 0.1),
    "elu": nn.ELU,
    "hardswish": nn.Hardswish,
}
# The end of the name of a network for images of another side.
SIZED = re.compile(r"\+\d+px$")
# Which of ACTIVATIONS a module is; ReLU6 is MobileNetV2's.
KINDS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.LeakyReLU: "leaky",
    nn.ELU: "elu",
    nn.Hardswish: "hardswish",
}


def variants(proposal: Proposal, network: nn.Module) -> tuple[tuple[Proposal, str], ...]:
    """The network with another activation, without the pool behind its stem, and with a stem that keeps the resolution.

    No pool: Lightning Bolts' ResNets for STL-10. A stem of stride 1: torchvision's MobileNets and EfficientNets, set so
    for CIFAR. Both: chenyaofo/pytorch-cifar-models' ShuffleNetV2.
    """
    found = []
    usual = activation(network)
    for name in ACTIVATIONS if usual else ():
        if name != usual:
            found.append(
                variant(proposal, name, partial(exchange, usual, name), f"{name} instead of {usual}")
            )
    stem = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    pool = pool_behind_stem(network)
    if pool:
        found.append(variant(proposal, "no-pool", drop_pool, "no pool behind the stem"))
    # A kernel no larger than its stride cuts patches: those cannot overlap.
    if stem is not None and stem.stride == (2, 2) and stem.kernel_size[0] > 2:
        found.append(variant(proposal, "stride1", keep_stem, "a stem that keeps the resolution"))
        if pool:
            both = "a stem that keeps the resolution, and no pool behind it"
            found.append(variant(proposal, "stride1-no-pool", keep_stem_and_drop_pool, both))
    return tuple(found)


def keeps_resolution(arch: Arch) -> bool:
    """Whether it is a variant with another stem, which people use for small images alone: it costs up to 16 times."""
    return SIZED.sub("", arch.name).endswith(("+no-pool", "+stride1", "+stride1-no-pool"))


def variant(
    proposal: Proposal, suffix: str, change: Callable[[nn.Module], nn.Module], reason: str
) -> tuple[Proposal, str]:
    """`resnet18+silu`: the proposal's network after `change`."""
    build = partial(changed, proposal.build, change)
    return Proposal(f"{proposal.name}+{suffix}", build, proposal.input, unusual=True), reason


def at_size(arch: Arch, side: int) -> Arch:
    """`resnet18+32px`: the same network for images of another side."""
    return replace(arch, name=f"{SIZED.sub('', arch.name)}+{side}px", input=(arch.input[0], side, side))


def changed(build: Callable[[], nn.Module], change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The network that `build` returns, changed."""
    return change(build())


def activation(network: nn.Module) -> str:
    """The activation that most modules are; empty where there is none."""
    kinds = Counter(KINDS[type(m)] for m in network.modules() if type(m) in KINDS)
    return kinds.most_common(1)[0][0] if kinds else ""


def exchange(usual: str, name: str, network: nn.Module) -> nn.Module:
    """`network` with every activation of the one kind replaced by the other."""
    for module in network.modules():
        for child, held in module.named_children():
            if KINDS.get(type(held)) == usual:
                setattr(module, child, ACTIVATIONS[name]())
    return network


def pool_behind_stem(network: nn.Module) -> str:
    """The name of a max pool that comes before the second convolution; empty where there is none."""
    convolutions = 0
    for name, module in network.named_modules():
        convolutions += isinstance(module, nn.Conv2d)
        if convolutions > 1:
            return ""
        if isinstance(module, nn.MaxPool2d) and convolutions == 1:
            return name
    return ""


def drop_pool(network: nn.Module) -> nn.Module:
    """`network` without the pool behind its stem."""
    parent, _, child = pool_behind_stem(network).rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network


def keep_stem(network: nn.Module) -> nn.Module:
    """`network` with a first convolution of stride 1."""
    stem = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    stem.stride = (1, 1)
    return network


def keep_stem_and_drop_pool(network: nn.Module) -> nn.Module:
    """`network` with a first convolution of stride 1 and no pool behind it."""
    return keep_stem(drop_pool(network))


def with_epsilon(build: Callable[[], nn.Module], value: float, last: str) -> Callable[[], nn.Module]:
    """The same network with another epsilon in all its layer norms, or in the one called `last`."""

    def changed() -> nn.Module:
        network = build()
        for name, module in network.named_modules():
            if isinstance(module, nn.LayerNorm) and (not last or name == last):
                module.eps = value
        return network

    return changed
