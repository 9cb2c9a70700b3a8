"""Swin Transformers (Liu et al. 2021) and their second version (2022) with torchvision's names, of any depth and width.

All numbers are in the shapes: heads and window in the table of relative positions. The usual image is the least that
every stage's windows fill.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from torch import nn
from torchvision.models import swin_transformer as swin

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import numbered

# (second version, width, depths, window) -> torchvision's name.
KNOWN: dict[tuple[bool, int, tuple[int, ...], int], str] = {
    (False, 96, (2, 2, 6, 2), 7): "swin_t",
    (False, 96, (2, 2, 18, 2), 7): "swin_s",
    (False, 128, (2, 2, 18, 2), 7): "swin_b",
    (True, 96, (2, 2, 6, 2), 8): "swin_v2_t",
    (True, 96, (2, 2, 18, 2), 8): "swin_v2_s",
    (True, 128, (2, 2, 18, 2), 8): "swin_v2_b",
}
HEADS = {96: (3, 6, 12, 24), 128: (4, 8, 16, 32)}


def rename(name: str) -> str:
    """torchvision's name for a tensor."""
    return name


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The Swin Transformer that these shapes suggest."""
    stem = shapes.get("features.0.0.weight", ())
    head = shapes.get("head.weight", ())
    inner = shapes.get("features.1.0.mlp.0.weight", ())
    depths: list[int] = []
    heads: list[int] = []
    window = 0
    second = "features.1.0.attn.logit_scale" in shapes
    while depth := numbered(shapes, rf"features\.{2 * len(depths) + 1}\.(\d{{1,4}})\.attn\."):
        at = f"features.{2 * len(depths) + 1}.0.attn"
        if second:
            scale, table = (shapes.get(f"{at}.{n}", ()) for n in ("logit_scale", "relative_coords_table"))
            count, reach = (scale or (0,))[0], table[1] if len(table) == 4 else 0
        else:
            table = shapes.get(f"{at}.relative_position_bias_table", ())
            count, reach = (table[1], math.isqrt(table[0])) if len(table) == 2 else (0, 0)
        window = window or (reach + 1) // 2
        depths.append(depth)
        heads.append(count)
    if len(stem) != 4 or len(head) != 2 or len(inner) != 2 or not inner[1] or not window or sum(depths) < 2:
        return
    name = KNOWN.get((second, stem[0], tuple(depths), window))
    if name is None or HEADS[stem[0]] != tuple(heads):
        name = f"swin{'_v2' if second else ''}-{'-'.join(map(str, depths))}-w{stem[0]}-window{window}"
    make = partial(
        make_network,
        second,
        stem[2],
        stem[0],
        tuple(depths),
        tuple(heads),
        window,
        inner[0] / inner[1],
        head[0],
    )
    side = stem[2] * window << (len(depths) - 1)
    yield Proposal(name, make, (3, side, side))


def make_network(
    second: bool,
    patch: int,
    width: int,
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    window: int,
    ratio: float,
    classes: int,
) -> nn.Module:
    """torchvision's Swin Transformer with these numbers."""
    kind = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if second else {}
    return swin.SwinTransformer(
        [patch, patch], width, list(depths), list(heads), [window, window], ratio, num_classes=classes, **kind
    )


def named_proposals(classes: int) -> Iterator[Proposal]:
    """Every Swin Transformer that torchvision names."""
    for (second, width, depths, window), name in KNOWN.items():
        make = partial(make_network, second, 4, width, depths, HEADS[width], window, 4.0, classes)
        yield Proposal(name, make, (3, 32 * window, 32 * window))
