"""ResNets for large images: torchvision's ResNets, ResNeXts and Wide ResNets, and such of any other widths.

torchvision builds its own, with any class count. Its code has one stem and four stages of fixed widths; Hugging Face's
has any number of any width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import nn
from torchvision.models import resnet

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import Layers, layers, torchvision_name
from bdclean.networks.families.residual import Block, ResidualNetwork

# (bottleneck, blocks, groups, width per group) -> torchvision's name.
KNOWN: dict[tuple[bool, tuple[int, ...], int, int], str] = {
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
    if read is None or read.stem[2:] != (7, 7):
        return
    name, make = usual(read, shapes) or other_widths(read, shapes)
    if read.bottleneck:
        older = Proposal(f"{name}_stride1x1", partial(stride_first, make), SIZE)
        yield Proposal(
            name, make, SIZE, ((older, "strides on the first 1x1 convolutions, as before torchvision"),)
        )
    else:
        yield Proposal(name, make, SIZE)


def usual(read: Layers, shapes: Shapes) -> tuple[str, Callable[[], nn.Module]] | None:
    """Name and builder of torchvision's own with these blocks; None where it has no such stem or stages."""
    given = tuple((256 if read.bottleneck else 64) << k for k in range(4))
    strided = not read.bottleneck and "layer1.0.downsample.0.weight" in shapes
    if read.stem[0] != 64 or read.outside != given or strided:
        return None
    groups, width = 1, 64
    inner = shapes.get("layer1.0.conv2.weight", ())
    if read.bottleneck and len(inner) == 4 and inner[1] and inner[0] % inner[1] == 0:
        groups, width = inner[0] // inner[1], inner[1]
    name = KNOWN.get((read.bottleneck, read.blocks, groups, width))
    if name is None:
        name = f"resnet{'-'.join(map(str, read.blocks))}" + (f"_{groups}x{width}d" if read.bottleneck else "")
    kind = resnet.Bottleneck if read.bottleneck else resnet.BasicBlock
    return name, partial(make_network, kind, read.blocks, read.classes, groups, width)


def other_widths(read: Layers, shapes: Shapes) -> tuple[str, Callable[[], nn.Module]]:
    """Name and builder of the ResNet with these numbers.

    A shortcut that changes no width is there for a stride: so the first stage has one, too, where it has such.
    """
    first = 2 if read.stem[0] == read.outside[0] and "layer1.0.downsample.0.weight" in shapes else 1
    name = f"resnet{'-'.join(map(str, read.blocks))}-w{'-'.join(map(str, (read.stem[0], *read.outside)))}"
    return name, partial(
        make_other, read.blocks, read.widths, read.outside, read.stem[0], read.classes, read.bottleneck, first
    )


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


def make_other(
    blocks: tuple[int, ...],
    widths: tuple[int, ...],
    outside: tuple[int, ...],
    stem: int,
    classes: int,
    bottleneck: bool,
    first_stride: int,
) -> nn.Module:
    """The residual network with these numbers, torchvision's stem before it: 7x7 with a stride, then a pool."""
    network = ResidualNetwork(
        blocks, widths, stem, classes, bottleneck, outside=outside, first_stride=first_stride
    )
    network.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
    network.act = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return network


def stride_first(make: Callable[[], nn.Module]) -> nn.Module:
    """The same network with each bottleneck's stride moved from its 3x3 to its first 1x1 convolution."""
    network = make()
    for module in network.modules():
        if isinstance(module, (resnet.Bottleneck, Block)) and module.conv2.stride != (1, 1):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    return network


def named_proposals(classes: int) -> Iterator[Proposal]:
    """Every network that torchvision names."""
    for (bottleneck, blocks, groups, width), name in KNOWN.items():
        kind = resnet.Bottleneck if bottleneck else resnet.BasicBlock
        yield Proposal(name, partial(make_network, kind, blocks, classes, groups, width), SIZE)
