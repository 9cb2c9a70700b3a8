"""What people call the same tensor: wrappers around a network, and names that families share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# What saves a network inside another module: DataParallel, Lightning, torch.compile, wrappers for features.
WRAPPERS = re.compile(r"^(?:(?:module|model|net|network|_orig_mod|backbone|base_model)\.)+")

# Running counts that old files lack; they change nothing in a prediction.
COUNTER = "num_batches_tracked"

RESIDUAL = [
    (re.compile(p), to)
    for p, to in (
        (r"^block(\d+)\.layer\.(\d+)\.", r"layer\1.\2."),  # xternalz/WideResNet-pytorch
        (r"^conv2_x\.", "layer1."),  # weiaicunzai/pytorch-cifar100
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
        (r"\.convShortcut\.", ".downsample.0."),
        (r"\.(?:shortcut|skip)\.", ".downsample."),
        (r"\.downsample\.(?=weight$|bias$)", ".downsample.0."),
        (r"^bn\.", "bn1."),
        (r"^(?:linear|classifier|head|output|logits|last_linear|head\.fc|fc\.0)\.(?=weight$|bias$)", "fc."),
    )
]


def views(
    names: Iterable[str], expected: Iterable[str] = ()
) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """Ways to read a file's names without their wrappers: name -> short name, and the names left unread.

    First all tensors together (`backbone.conv1.weight` beside `fc.weight`), then each wrapper's own, most first,
    with whatever lies outside it (a projector, a text tower) unread. `expected`: names that need no stripping.
    """
    names = list(names)
    if names and set(names) <= set(expected):
        yield {name: name for name in names}, ()
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        match = WRAPPERS.match(name)
        prefix = match.group(0) if match else ""
        groups.setdefault(prefix, {})[name] = name[len(prefix) :]
    whole = {name: short for group in groups.values() for name, short in group.items()}
    if len(set(whole.values())) == len(whole):
        yield {name: whole[name] for name in names}, ()
    if len(groups) > 1:
        for prefix in sorted(groups, key=lambda p: -len(groups[p])):
            yield groups[prefix], tuple(n for n in names if n not in groups[prefix])


def residual(name: str) -> str:
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
