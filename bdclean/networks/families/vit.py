"""Vision Transformers (Dosovitskiy et al. 2021) with torchvision's names, of any depth, width, patch and image size.

The position embedding shows the image's size. Nothing shows how many heads share the width: the usual count comes first
and the other divisors are networks with the same tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial

from torchvision.models.vision_transformer import VisionTransformer

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import numbered

# (layers, width, inner width of the perceptron, patch) -> torchvision's name and its number of heads.
KNOWN = {
    (12, 768, 3072, 16): ("vit_b_16", 12),
    (12, 768, 3072, 32): ("vit_b_32", 12),
    (24, 1024, 4096, 16): ("vit_l_16", 16),
    (24, 1024, 4096, 32): ("vit_l_32", 16),
    (32, 1280, 5120, 14): ("vit_h_14", 16),
}
# The usual width of a head (torchvision's ViTs but the huge one, DeiT), and the limits of those that are tried: the
# networks of `python -m bdclean.bench readings` have heads of 8 to 64.
USUAL_HEAD, LEAST_HEAD, MOST_HEADS = 64, 8, 32


def rename(name: str) -> str:
    """torchvision's name for a tensor; `linear_1` and `linear_2` are those of its first weights (vit_b_16-c867db91)."""
    name = re.sub(r"\.mlp\.linear_1\.", ".mlp.0.", name)
    return re.sub(r"\.mlp\.linear_2\.", ".mlp.3.", name)


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The transformer that these shapes suggest, with each number of heads that divides its width."""
    stem = shapes.get("conv_proj.weight", ())
    positions = shapes.get("encoder.pos_embedding", ())
    head = shapes.get("heads.head.weight", ())
    first = "encoder.layers.encoder_layer_0"
    inner = shapes.get(f"{first}.mlp.0.weight", ())
    layers = numbered(shapes, r"encoder\.layers\.encoder_layer_(\d{1,4})\.")
    if len(stem) != 4 or len(positions) != 3 or len(head) != 2 or len(inner) != 2 or not layers:
        return
    width, patch = stem[0], stem[2]
    side = math.isqrt(max(0, positions[1] - 1))
    if side < 1 or side * side != positions[1] - 1:
        return
    known, heads = KNOWN.get((layers, width, inner[0], patch), ("", 0))
    counts = head_counts(width)
    if heads:
        counts = [heads, *(c for c in counts if c != heads)]
    # A layer before the head, as in the paper's pre-training.
    before = shapes.get("heads.pre_logits.weight", (None,))[0]
    made = []
    for count in counts:
        name = known if count == heads else f"vit-{layers}x{width}-h{count}-p{patch}"
        if not known and inner[0] != 4 * width:
            name += f"-mlp{inner[0]}"
        build = partial(
            VisionTransformer, side * patch, patch, layers, count, width, inner[0],
            num_classes=head[0], representation_size=before,
        )  # fmt: skip
        made.append(
            Proposal(name, build, (3, side * patch, side * patch), unusual=bool(known) and count != heads)
        )
    if made:
        first_made, *rest = made
        reasons = ((p, f"{counts[k + 1]} attention heads instead of {counts[0]}") for k, p in enumerate(rest))
        yield Proposal(first_made.name, first_made.build, first_made.input, tuple(reasons))


def head_counts(width: int) -> list[int]:
    """Numbers of heads that divide `width`, the likeliest first."""
    counts = [h for h in range(1, MOST_HEADS + 1) if width % h == 0 and width // h >= LEAST_HEAD]
    return sorted(counts, key=lambda h: abs(width // h - USUAL_HEAD))


def named_proposals(classes: int) -> Iterator[Proposal]:
    """Every transformer of this kind that torchvision names."""
    for (layers, width, inner, patch), (name, heads) in KNOWN.items():
        build = partial(VisionTransformer, 224, patch, layers, heads, width, inner, num_classes=classes)
        yield Proposal(name, build, (3, 224, 224))
