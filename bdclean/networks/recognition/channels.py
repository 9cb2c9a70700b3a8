"""Known networks whose first convolution takes another number of channels than three: those of grey images have one.

Families know their networks for RGB images. The weight of the first convolution alone shows how many channels it takes,
and nothing else of a network depends on that.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from bdclean.errors import Refused
from bdclean.networks.arch import CHANNELS, Proposal, Shapes
from bdclean.networks.recognition.variants import changed

# The weights of first convolutions in all families here; a test holds them against every named network.
STEMS = (
    "conv1.weight",
    "features.0.0.weight",
    "features.0.weight",
    "stem.0.weight",
    "conv_proj.weight",
    "features.conv0.weight",
    "layers.0.weight",
    "conv1.0.weight",
    "stem.0.0.weight",
    "conv1.conv.weight",
    "Conv2d_1a_3x3.conv.weight",
    "patch_embed.proj.weight",
)
# MNIST and its kin have 28 pixels a side where coloured sets of small images have 32.
SMALL, SMALL_GREY = 32, 28


def as_rgb(shapes: Shapes) -> tuple[Shapes, int]:
    """The shapes that the network would have for RGB images, and how many channels its own first convolution takes."""
    stem = next((name for name in STEMS if len(shapes.get(name, ())) == 4), None)
    if stem is None:
        return shapes, 3
    width, channels, *kernel = shapes[stem]
    return shapes | {stem: (width, 3, *kernel)}, channels


def with_channels(proposal: Proposal, channels: int) -> Proposal:
    """The same network with a first convolution that takes `channels` channels."""
    if channels == 3:
        return proposal
    change = partial(first_convolution_takes, channels)
    return replace(
        proposal,
        build=partial(changed, proposal.build, change),
        input=(channels, *proposal.input[1:]),
        others=tuple((with_channels(other, channels), reason) for other, reason in proposal.others),
        whole=partial(changed, proposal.whole, change) if proposal.whole else None,
    )


def first_convolution_takes(channels: int, network: nn.Module) -> nn.Module:
    """`network` with a first convolution of so many channels, whose weights keep the law that they were drawn from."""
    first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    repeats = -(-channels // first.in_channels)
    weight = first.weight.detach().repeat(1, repeats, 1, 1)[:, :channels]
    first.weight = nn.Parameter(weight.contiguous())
    first.in_channels = channels
    return network


def at_usual_size(proposal: Proposal, network: nn.Module) -> Proposal:
    """`proposal` at the side of MNIST where it is one for small grey images and can be run on those.

    `network`: what it builds, on the meta device.
    """
    channels, side, _ = proposal.input
    if channels != 1 or side != SMALL:
        return proposal
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, channels, SMALL_GREY, SMALL_GREY, device="meta"))
    except (RuntimeError, ValueError, AssertionError):  # too small for its pools
        return proposal
    size = (channels, SMALL_GREY, SMALL_GREY)
    others = tuple((replace(other, input=size), reason) for other, reason in proposal.others)
    return replace(proposal, input=size, others=others)


def check_readable(name: str, channels: int) -> None:
    """Raises Refused unless images are read in so many channels."""
    if channels not in CHANNELS:
        raise Refused(
            f"{name} takes images of {channels} channels: bdclean reads images as grey (1 channel) or RGB (3)."
        )
