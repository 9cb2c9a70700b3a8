"""VGGs (Simonyan and Zisserman 2014): torchvision's own, and those for small images, with batch norm or without.

A VGG is one `features` sequence, so its plan is read off the numbers: a convolution (its norm, its activation), then
one place more where the image is pooled. Only ReLU after the norm is read so; anything else is for --arch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models import vgg

from bdclean.networks.arch import Proposal, Shapes

Plan = tuple[int | str, ...]

# Plans of torchvision, whose table has the paper's letters.
KNOWN: dict[Plan, str] = {
    tuple(plan): {"A": "vgg11", "B": "vgg13", "D": "vgg16", "E": "vgg19"}[letter]
    for letter, plan in vgg.cfgs.items()
}
# Where the plan leaves the input's side open, the first of these that fits is the likeliest: CIFAR and GTSRB, ImageNet,
# Tiny ImageNet.
USUAL_SIDES = (32, 224, 64)


class SmallVGG(nn.Module):
    """Convolutions and pools by `plan`, average pooling to `side`, then a linear layer or a perceptron.

    `places`: (index in `classifier`, in, out) of each linear layer; no index: `classifier` is one linear layer itself.
    """

    def __init__(
        self,
        plan: Plan,
        norm: bool,
        side: int,
        places: tuple[tuple[int | None, int, int], ...],
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for step in plan:
            if step == "M":
                layers.append(nn.MaxPool2d(2, 2))
                continue
            width = int(step)
            layers.append(nn.Conv2d(inside, width, 3, padding=1, bias=conv_bias))
            layers += [nn.BatchNorm2d(width)] if norm else []
            layers.append(nn.ReLU(inplace=True))
            inside = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        if places[0][0] is None:
            self.classifier: nn.Module = nn.Linear(places[0][1], places[0][2])
        else:
            self.classifier = perceptron([(int(k or 0), a, b) for k, a, b in places])

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def perceptron(places: list[tuple[int, int, int]]) -> nn.Sequential:
    """Linear layers at the given places, a ReLU after each but the last, dropout at every other place."""
    layers: list[nn.Module] = [nn.Dropout() for _ in range(places[-1][0] + 1)]
    for index, inside, outside in places:
        layers[index] = nn.Linear(inside, outside)
    for index, _, _ in places[:-1]:
        layers[index + 1] = nn.ReLU(inplace=True)
    return nn.Sequential(*layers)


def rename(name: str) -> str:
    """kuangliu's name for a tensor: the `classifier` is `fc` or `linear` in networks after his."""
    return re.sub(r"^(?:fc|linear)\.(?=weight$|bias$|\d+\.(?:weight|bias)$)", "classifier.", name)


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The VGG that these shapes suggest; torchvision's where its plan, pooling and classifier are the same."""
    convs = {int(m.group(1)): s for n, s in shapes.items() if len(s) == 4 and (m := _place("features", n))}
    if not convs:
        return
    indices = sorted(convs)
    norm = f"features.{indices[0] + 1}.running_mean" in shapes
    places = _classifier(shapes)
    steps = 3 if norm else 2
    plan: list[int | str] = []
    for here, following in pairwise([*indices, None]):
        plan.append(convs[here or 0][0])
        # More room than conv, norm, activation and one pool need is code that this family does not know.
        if following is not None and following - (here or 0) == steps + 1:
            plan.append("M")
    if not places or indices[0] != 0 or len(indices) < 3:
        return
    inside, last = places[0][1], convs[indices[-1]][0]
    side = round((inside / last) ** 0.5) if last else 0
    if side < 1 or side * side * last != inside:
        side = 1
    pools = plan.count("M")
    open_end = side << pools
    closed = side << (pools + 1)
    ends = {closed: (*plan, "M"), open_end: tuple(plan)}
    whole, other = sorted(ends, key=_rank)
    bias = f"features.{indices[0]}.bias" in shapes
    known = KNOWN.get((*plan, "M"))
    sizes = [(p[0], p[2]) for p in places]
    if (
        known
        and side == 7
        and bias
        and [k for k, _ in sizes] == [0, 3, 6]
        and [n for _, n in sizes[:2]] == [4096] * 2
    ):
        name = known + ("_bn" if norm else "")
        yield Proposal(name, partial(getattr(vgg, name), num_classes=sizes[-1][1]), (3, 224, 224))
        return
    if side == 1 and max(ends) < min(USUAL_SIDES):
        # Averaged over what maps are left: nobody trains on pictures so small that one pixel is.
        yield from _averaged(name_of(known, len(indices), norm, plan, 32), plan, norm, places, bias)
        return
    made = [
        Proposal(
            name_of(known, len(indices), norm, plan, s),
            partial(SmallVGG, ends[s], norm, side, places, bias),
            (3, s, s),
        )
        for s in (whole, other)
    ]
    reason = f"images of {other} pixels, {'with' if other == closed else 'without'} a pool after the last convolution"
    yield replace(made[0], others=((made[1], reason),) if other in USUAL_SIDES else ())


def _averaged(
    name: str, plan: list[int | str], norm: bool, places: tuple[tuple[int | None, int, int], ...], bias: bool
) -> Iterator[Proposal]:
    """The networks of 32 pixels that end in an average over the whole map, with a pool before it or without."""
    first, other = (
        Proposal(f"{name}{end}", partial(SmallVGG, tuple(ends), norm, 1, places, bias), (3, 32, 32))
        for end, ends in (("", plan), ("-pooled", [*plan, "M"]))
    )
    yield replace(first, others=((other, "a pool after the last convolution"),))


def name_of(known: str | None, convs: int, norm: bool, plan: list[int | str], side: int) -> str:
    """`vgg16-bn-cifar`; `vgg-8x64-512-bn-cifar` for a plan that the paper does not have."""
    end = ("-bn" if norm else "") + ("-cifar" if side == 32 else f"-{side}px")
    if known:
        return known + end
    widths = [int(w) for w in plan if w != "M"]
    return f"vgg-{convs}x{widths[0]}-{widths[-1]}{end}"


def named_proposals(classes: int) -> Iterator[Proposal]:
    """Every network that torchvision names, and the same plans for small images."""
    for plan, known in KNOWN.items():
        for name in (known, f"{known}_bn"):
            yield Proposal(name, partial(getattr(vgg, name), num_classes=classes), (3, 224, 224))
        small = partial(SmallVGG, plan, True, 1, ((None, 512, classes),))
        yield Proposal(f"{known}-bn-cifar", small, (3, 32, 32))


def _place(part: str, name: str) -> re.Match[str] | None:
    return re.fullmatch(rf"{part}\.(\d{{1,3}})\.weight", name)


def _classifier(shapes: Shapes) -> tuple[tuple[int | None, int, int], ...]:
    """(index, in, out) of the classifier's linear layers; empty where they cannot follow one another."""
    single = shapes.get("classifier.weight", ())
    if len(single) == 2:
        return ((None, single[1], single[0]),)
    found = sorted(
        (int(m.group(1)), s[1], s[0])
        for n, s in shapes.items()
        if len(s) == 2 and (m := _place("classifier", n))
    )
    # Neighbouring linear layers leave no room for the activation between them.
    fits = all(b[0] - a[0] > 1 and b[1] == a[2] for a, b in pairwise(found))
    return tuple(found) if fits else ()


def _rank(side: int) -> int:
    return USUAL_SIDES.index(side) if side in USUAL_SIDES else len(USUAL_SIDES)
