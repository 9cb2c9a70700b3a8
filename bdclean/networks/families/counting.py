"""What a file's names count up and its shapes say: blocks, widths, classes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bdclean.networks.arch import Shape, Shapes


@dataclass(frozen=True)
class Layers:
    """The numbers of a residual network in `layer1`, `layer2`, ...

    `widths` are those of each one's first kernel, `outside` those of what each gives.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    outside: tuple[int, ...]
    stem: Shape
    classes: int
    bottleneck: bool


def layers(shapes: Shapes) -> Layers | None:
    """The residual network's numbers; None unless stem, head and each layer's first kernel are there."""
    blocks = depths(shapes)
    stem, head = shapes.get("conv1.weight", ()), shapes.get("fc.weight", ())
    first = [shapes.get(f"layer{k + 1}.0.conv1.weight", ()) for k in range(len(blocks))]
    bottleneck = "layer1.0.conv3.weight" in shapes
    last = 3 if bottleneck else 2
    given = [shapes.get(f"layer{k + 1}.0.conv{last}.weight", ()) for k in range(len(blocks))]
    if not blocks or len(stem) != 4 or len(head) != 2 or any(len(f) != 4 for f in (*first, *given)):
        return None
    return Layers(blocks, tuple(f[0] for f in first), tuple(g[0] for g in given), stem, head[0], bottleneck)


def numbered(names: Iterable[str], pattern: str, start: int = 0) -> int:
    """How many numbers `pattern`'s group takes where names begin so; 0 unless they run from `start` without gaps."""
    match = re.compile(pattern).match
    found = {int(m.group(1)) for m in map(match, names) if m}
    return len(found) if found == set(range(start, start + len(found))) else 0


# Names of residual networks by torchvision's.
RESIDUAL = [
    (re.compile(p), to)
    for p, to in (
        (r"^block(\d+)\.layer\.(\d+)\.", r"layer\1.\2."),  # xternalz/WideResNet-pytorch, ABL, TRADES
        (r"\.convShortcut\.", ".downsample.0."),
        (r"^conv2_x\.", "layer1."),  # weiaicunzai/pytorch-cifar100, to residual_function
        (r"^conv3_x\.", "layer2."),
        (r"^conv4_x\.", "layer3."),
        (r"^conv5_x\.", "layer4."),
        (r"^conv1\.0\.", "conv1."),
        (r"^conv1\.1\.", "bn1."),
        (r"\.residual_function\.0\.", ".conv1."),
        (r"\.residual_function\.1\.", ".bn1."),
        (r"\.residual_function\.3\.", ".conv2."),
        (r"\.residual_function\.4\.", ".bn2."),
        (r"\.residual_function\.6\.", ".conv3."),
        (r"\.residual_function\.7\.", ".bn3."),
        (r"\.shortcut\.", ".downsample."),  # kuangliu/pytorch-cifar, akamaster, BackdoorBench
        # meliketoy's WideResNet, rewritten with a single convolution.
        (r"\.downsample\.(?=weight$|bias$)", ".downsample.0."),
        (r"^bn\.", "bn1."),  # the last norm of locuslab/fast_adversarial's and RobustBench's PreActResNet
        # kuangliu (linear), solo-learn (classifier), mmpretrain (head.fc), Cadene's pretrained-models (last_linear);
        # head of a Lightning module beside its backbone.
        (r"^(?:linear|classifier|head|head\.fc|last_linear)\.(?=weight$|bias$)", "fc."),
    )
]


def torchvision_name(name: str) -> str:
    """A residual network's tensor by torchvision's name for it."""
    for pattern, to in RESIDUAL:
        name = pattern.sub(to, name)
    return name


def depths(shapes: Iterable[str]) -> tuple[int, ...]:
    """Number of blocks in `layer1`, `layer2`, ...; empty unless both count from where they should without gaps."""
    seen: dict[int, set[int]] = {}
    for name in shapes:
        match = re.match(r"layer(\d{1,3})\.(\d{1,4})\.", name)
        if match:
            seen.setdefault(int(match.group(1)), set()).add(int(match.group(2)))
    if set(seen) != set(range(1, len(seen) + 1)) or any(b != set(range(len(b))) for b in seen.values()):
        return ()
    return tuple(len(seen[k]) for k in sorted(seen))
