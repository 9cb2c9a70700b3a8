"""torchvision's ResNets, ResNeXts and Wide ResNets, built by torchvision, with any class count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import nn
from torchvision.models import resnet

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import layers, torchvision_name

# (bottleneck, blocks, groups, width per group) -> torchvision's name.
KNOWN = {
    (False, (2, 2, 2, 2), 1, 64): "resnet18",
    (False, (3, 4, 6, 3), 1, 64): "resnet34",
    (True, (3, 4, 6, 3), 1, 64): "resnet50",
    (True, (3, 4, 23, 3), 1, 64): "resnet101",
    (True, (3, 8, 36, 3), 1, 64): "resnet152",
    (True, (3, 4, 6, 3), 32, 4): "resnext50_32x4d",
    (True, (3, 4, 23, 3), 32, 8): "resnext101_32x8d",
    (True, (3, 4, 23, 3), 64, 4): "resnext101_64x4d",
    (True, (3, 4, 6, 3), 1, 128): "wide_resnet50_2",
    (True, (3, 4, 23, 3), 1, 128): "wide_resnet101_2",
}
SIZE = (3, 224, 224)


def rename(name: str) -> str:
    """torchvision's name for a tensor."""
    return torchvision_name(name)


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The ResNet with a 7x7 stem that these shapes suggest; bottlenecks also with the older place of their stride.

    That is where Caffe's ResNets have it, also as Hugging Face's (`downsample_in_bottleneck`).
    """
    read = layers(shapes)
    if read is None or len(read.blocks) != 4 or read.stem[2:] == (3, 3):
        return
    blocks, bottleneck = read.blocks, read.bottleneck
    groups, width = 1, 64
    inner = shapes.get("layer1.0.conv2.weight", ())
    if bottleneck and len(inner) == 4 and inner[1] and inner[0] % inner[1] == 0:
        groups = inner[0] // inner[1]
        width = inner[1]
    kind = resnet.Bottleneck if bottleneck else resnet.BasicBlock
    make = partial(make_network, kind, blocks, read.classes, groups, width)
    name = KNOWN.get((bottleneck, blocks, groups, width))
    if name is None:
        name = f"resnet{'-'.join(map(str, blocks))}" + (f"_{groups}x{width}d" if bottleneck else "")
    if bottleneck:
        older = Proposal(f"{name}_stride1x1", partial(stride_first, make), SIZE)
        yield Proposal(
            name, make, SIZE, ((older, "strides on the first 1x1 convolutions, as before torchvision"),)
        )
    else:
        yield Proposal(name, make, SIZE)


def make_network(
    kind: type[resnet.BasicBlock | resnet.Bottleneck],
    blocks: tuple[int, ...],
    classes: int,
    groups: int,
    width: int,
) -> nn.Module:
    """torchvision's ResNet with these numbers."""
    if kind is resnet.BasicBlock:
        return resnet.ResNet(kind, list(blocks), num_classes=classes)
    return resnet.ResNet(kind, list(blocks), num_classes=classes, groups=groups, width_per_group=width)


def stride_first(make: Callable[[], nn.Module]) -> nn.Module:
    """The same network with each bottleneck's stride moved from its 3x3 to its first 1x1 convolution."""
    network = make()
    for module in network.modules():
        if isinstance(module, resnet.Bottleneck) and module.stride != 1:
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    return network


def named_proposals(classes: int) -> Iterator[Proposal]:
    """Every network that torchvision names."""
    for (bottleneck, blocks, groups, width), name in KNOWN.items():
        kind = resnet.Bottleneck if bottleneck else resnet.BasicBlock
        yield Proposal(name, partial(make_network, kind, blocks, classes, groups, width), SIZE)
