"""RegNets X and Y (Radosavovic et al. 2020) with torchvision's names, of any depth and width.

Stem, blocks, widths and group widths are in the shapes; the bottleneck's factor and the share of
squeeze-and-excitation are those of torchvision's and Hugging Face's files. torchvision's own builders compute widths
with tensors, which the meta device cannot, so its table is kept here as it came out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn
from torchvision.models.regnet import BlockParams, RegNet

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import numbered

Plan = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]

# Blocks, widths and group widths of the stages, whether there is squeeze-and-excitation -> torchvision's name.
KNOWN: dict[Plan, str] = {
    ((1, 2, 7, 12), (32, 64, 160, 400), (16, 16, 16, 16), False): "regnet_x_400mf",
    ((1, 3, 7, 5), (64, 128, 288, 672), (16, 16, 16, 16), False): "regnet_x_800mf",
    ((2, 4, 10, 2), (72, 168, 408, 912), (24, 24, 24, 24), False): "regnet_x_1_6gf",
    ((2, 6, 15, 2), (96, 192, 432, 1008), (48, 48, 48, 48), False): "regnet_x_3_2gf",
    ((2, 5, 15, 1), (80, 240, 720, 1920), (80, 120, 120, 120), False): "regnet_x_8gf",
    ((2, 6, 13, 1), (256, 512, 896, 2048), (128, 128, 128, 128), False): "regnet_x_16gf",
    ((2, 7, 13, 1), (336, 672, 1344, 2520), (168, 168, 168, 168), False): "regnet_x_32gf",
    ((1, 3, 6, 6), (48, 104, 208, 440), (8, 8, 8, 8), True): "regnet_y_400mf",
    ((1, 3, 8, 2), (64, 144, 320, 784), (16, 16, 16, 16), True): "regnet_y_800mf",
    ((2, 6, 17, 2), (48, 120, 336, 888), (24, 24, 24, 24), True): "regnet_y_1_6gf",
    ((2, 5, 13, 1), (72, 216, 576, 1512), (24, 24, 24, 24), True): "regnet_y_3_2gf",
    ((2, 4, 10, 1), (224, 448, 896, 2016), (56, 56, 56, 56), True): "regnet_y_8gf",
    ((2, 4, 11, 1), (224, 448, 1232, 3024), (112, 112, 112, 112), True): "regnet_y_16gf",
    ((2, 5, 12, 1), (232, 696, 1392, 3712), (232, 232, 232, 232), True): "regnet_y_32gf",
    ((2, 7, 17, 1), (528, 1056, 2904, 7392), (264, 264, 264, 264), True): "regnet_y_128gf",
}
SIZE = (3, 224, 224)
# Channels of the stem of all of them.
STEM = 32


def rename(name: str) -> str:
    """torchvision's name for a tensor."""
    return name


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The RegNet that these shapes suggest."""
    head = shapes.get("fc.weight", ())
    if len(head) != 2:
        return
    blocks: list[int] = []
    widths: list[int] = []
    groups: list[int] = []
    while depth := numbered(shapes, rf"trunk_output\.block{len(blocks) + 1}\.block\d+-(\d{{1,4}})\."):
        k = len(blocks) + 1
        at = f"trunk_output.block{k}.block{k}-0.f"
        grouped, last = shapes.get(f"{at}.b.0.weight", ()), shapes.get(f"{at}.c.0.weight", ())
        if len(grouped) != 4 or len(last) != 4:
            return
        blocks.append(depth)
        widths.append(last[0])
        groups.append(grouped[1])
    if not blocks or not all(widths) or not all(groups):
        return
    squeezes = "trunk_output.block1.block1-0.f.se.fc1.weight" in shapes
    stem = shapes.get("stem.0.weight", ())
    if len(stem) != 4:
        return
    plan: Plan = (tuple(blocks), tuple(widths), tuple(groups), squeezes)
    # A stage that neither widens nor has a stride needs no projection.
    first_stride = 2 if "trunk_output.block1.block1-0.proj.0.weight" in shapes else 1
    usual = f"regnet_{'y' if squeezes else 'x'}-{'-'.join(map(str, blocks))}-w{'-'.join(map(str, widths))}"
    known = KNOWN.get(plan) if (stem[0], first_stride) == (STEM, 2) else None
    build = partial(make_network, plan, head[0], stem[0], first_stride)
    yield Proposal(known or usual, build, SIZE)


def make_network(plan: Plan, classes: int, stem: int = STEM, first_stride: int = 2) -> nn.Module:
    """torchvision's RegNet with these numbers."""
    blocks, widths, groups, squeezes = plan
    count = len(blocks)
    share = 0.25 if squeezes else None
    parameters = BlockParams(
        list(blocks),
        list(widths),
        list(groups),
        [1.0] * count,
        [first_stride] + [2] * (count - 1),
        se_ratio=share,
    )
    return RegNet(parameters, num_classes=classes, stem_width=stem)


def named_proposals(classes: int) -> Iterator[Proposal]:
    """Every RegNet that torchvision names."""
    for plan, name in KNOWN.items():
        yield Proposal(name, partial(make_network, plan, classes), SIZE)
