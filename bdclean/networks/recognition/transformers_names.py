"""Hugging Face transformers' names of image classifiers, by torchvision's (ConvNeXt V2: timm's) for the same tensors.

Some keep apart what the other library fuses (query, key and value), or give a vector another shape; a file is written
back in its own form. Read off transformers' `modeling_*.py` and held to its outputs by recorded numbers in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isqrt

from bdclean.networks.arch import Shape, Shapes
from bdclean.networks.recognition.matching import Part


@dataclass(frozen=True)
class Rule:
    """A tensor's name here and there. `part`: which of how many; `shape`: what its shape becomes."""

    pattern: re.Pattern[str]
    name: Callable[[re.Match[str]], str]
    part: tuple[int, int] = (0, 1)
    shape: Callable[[Shape], Shape] | None = None


@dataclass(frozen=True)
class Translation:
    """A file's names and shapes as the other library has them. `kind`: transformers' `model_type`."""

    kind: str
    names: dict[str, str]
    shapes: Shapes
    parts: dict[str, Part] = field(default_factory=dict)


def rule(
    pattern: str,
    name: str | Callable[[re.Match[str]], str],
    part: tuple[int, int] = (0, 1),
    shape: Callable[[Shape], Shape] | None = None,
) -> Rule:
    """A Rule; `name` may use \\1, \\2, ..."""
    make = (lambda m: m.expand(name)) if isinstance(name, str) else name
    return Rule(re.compile(pattern), make, part, shape)


def more(match: re.Match[str], group: int, factor: int = 1, add: int = 1) -> int:
    """A number in a name, counted from elsewhere."""
    return factor * int(match.group(group)) + add


# What query, key and value are called on disk, and in the memory of version 5, which plain saving writes as it is.
ON_DISK, IN_MEMORY = ("query", "key", "value"), ("q_proj", "k_proj", "v_proj")


def three(pattern: str, name: str, words: tuple[str, str, str] = ON_DISK) -> list[Rule]:
    """Query, key and value, which the other library keeps as one tensor."""
    return [rule(pattern.replace("QKV", word), name, (k, 3)) for k, word in enumerate(words)]


def column(shape: Shape) -> Shape:
    """[c] as [c 1 1]."""
    return (*shape, 1, 1) if len(shape) == 1 else shape


def row(shape: Shape) -> Shape:
    """[1 1 1 c] as [c]."""
    return shape[3:] if shape[:3] == (1, 1, 1) else shape


VIT = r"^vit\.(?:encoder\.layer|layers)\.(\d+)\."
VIT_TO = r"encoder.layers.encoder_layer_\1."
STAGE = r"^(?:resnet|regnet|convnext|convnextv2)\.encoder\.stages\.(\d+)\."
LAYER = STAGE + r"layers\.(\d+)\."
SWIN = r"^swin\.encoder\.layers\.(\d+)\."
BLOCK = SWIN + r"blocks\.(\d+)\."


def swin_block(rest: str) -> Callable[[re.Match[str]], str]:
    """Where a Swin block lies: torchvision counts stages and what merges patches between them together."""
    return lambda m: f"features.{more(m, 1, 2)}.{m[2]}.{m.expand(rest)}"


def regnet_block(rest: str) -> Callable[[re.Match[str]], str]:
    """Where a RegNet block lies."""
    return lambda m: f"trunk_output.block{more(m, 1)}.block{more(m, 1)}-{m[2]}.{m.expand(rest)}"


# By `model_type`, the names of google/vit-base-patch16-224, microsoft/resnet-50, facebook/regnet-y-040,
# facebook/convnext-tiny-224, facebook/convnextv2-tiny-1k-224 and microsoft/swin-tiny-patch4-window7-224.
TABLES: dict[str, list[Rule]] = {
    "vit": [
        rule(r"^vit\.embeddings\.cls_token$", "class_token"),
        rule(r"^vit\.embeddings\.position_embeddings$", "encoder.pos_embedding"),
        rule(r"^vit\.embeddings\.patch_embeddings\.projection\.", "conv_proj."),
        *three(VIT + r"attention\.attention\.QKV\.(weight|bias)$", VIT_TO + r"self_attention.in_proj_\2"),
        *three(VIT + r"attention\.QKV\.(weight|bias)$", VIT_TO + r"self_attention.in_proj_\2", IN_MEMORY),
        rule(VIT + r"attention\.(?:output\.dense|o_proj)\.", VIT_TO + "self_attention.out_proj."),
        rule(VIT + r"(?:intermediate\.dense|mlp\.fc1)\.", VIT_TO + "mlp.0."),
        rule(VIT + r"(?:output\.dense|mlp\.fc2)\.", VIT_TO + "mlp.3."),
        rule(VIT + r"layernorm_before\.", VIT_TO + "ln_1."),
        rule(VIT + r"layernorm_after\.", VIT_TO + "ln_2."),
        rule(r"^vit\.layernorm\.", "encoder.ln."),
        rule(r"^classifier\.", "heads.head."),
    ],
    "resnet": [
        rule(r"^resnet\.embedder\.embedder\.convolution\.", "conv1."),
        rule(r"^resnet\.embedder\.embedder\.normalization\.", "bn1."),
        rule(LAYER + r"shortcut\.convolution\.", lambda m: f"layer{more(m, 1)}.{m[2]}.downsample.0."),
        rule(LAYER + r"shortcut\.normalization\.", lambda m: f"layer{more(m, 1)}.{m[2]}.downsample.1."),
        rule(LAYER + r"layer\.(\d)\.convolution\.", lambda m: f"layer{more(m, 1)}.{m[2]}.conv{more(m, 3)}."),
        rule(LAYER + r"layer\.(\d)\.normalization\.", lambda m: f"layer{more(m, 1)}.{m[2]}.bn{more(m, 3)}."),
        rule(r"^classifier\.1\.", "fc."),
    ],
    "regnet": [
        rule(r"^regnet\.embedder\.embedder\.convolution\.", "stem.0."),
        rule(r"^regnet\.embedder\.embedder\.normalization\.", "stem.1."),
        rule(LAYER + r"shortcut\.convolution\.", regnet_block("proj.0.")),
        rule(LAYER + r"shortcut\.normalization\.", regnet_block("proj.1.")),
        rule(LAYER + r"layer\.0\.convolution\.", regnet_block("f.a.0.")),
        rule(LAYER + r"layer\.0\.normalization\.", regnet_block("f.a.1.")),
        rule(LAYER + r"layer\.1\.convolution\.", regnet_block("f.b.0.")),
        rule(LAYER + r"layer\.1\.normalization\.", regnet_block("f.b.1.")),
        rule(LAYER + r"layer\.2\.attention\.0\.", regnet_block("f.se.fc1.")),
        rule(LAYER + r"layer\.2\.attention\.2\.", regnet_block("f.se.fc2.")),
        rule(LAYER + r"layer\.[23]\.convolution\.", regnet_block("f.c.0.")),
        rule(LAYER + r"layer\.[23]\.normalization\.", regnet_block("f.c.1.")),
        rule(r"^classifier\.1\.", "fc."),
    ],
    "convnext": [
        rule(r"^convnext\.embeddings\.patch_embeddings\.", "features.0.0."),
        rule(r"^convnext\.embeddings\.layernorm\.", "features.0.1."),
        rule(STAGE + r"downsampling_layer\.([01])\.", lambda m: f"features.{more(m, 1, 2, 0)}.{m[2]}."),
        *(
            rule(LAYER + name, lambda m, to=to: f"features.{more(m, 1, 2)}.{m[2]}.block.{to}.")  # type: ignore[misc]
            for name, to in ((r"dwconv\.", 0), (r"layernorm\.", 2), (r"pwconv1\.", 3), (r"pwconv2\.", 5))
        ),
        rule(
            LAYER + r"layer_scale_parameter$",
            lambda m: f"features.{more(m, 1, 2)}.{m[2]}.layer_scale",
            shape=column,
        ),
        rule(r"^convnext\.layernorm\.", "classifier.0."),
        rule(r"^classifier\.", "classifier.2."),
    ],
    "convnextv2": [
        rule(r"^convnextv2\.embeddings\.patch_embeddings\.", "stem.0."),
        rule(r"^convnextv2\.embeddings\.layernorm\.", "stem.1."),
        rule(STAGE + r"downsampling_layer\.", r"stages.\1.downsample."),
        rule(LAYER + r"dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
        rule(LAYER + r"layernorm\.", r"stages.\1.blocks.\2.norm."),
        rule(LAYER + r"pwconv([12])\.", r"stages.\1.blocks.\2.mlp.fc\3."),
        rule(LAYER + r"grn\.", r"stages.\1.blocks.\2.mlp.grn.", shape=row),
        rule(r"^convnextv2\.layernorm\.", "head.norm."),
        rule(r"^classifier\.", "head.fc."),
    ],
    "swin": [
        rule(r"^swin\.embeddings\.patch_embeddings\.projection\.", "features.0.0."),
        rule(r"^swin\.embeddings\.norm\.", "features.0.2."),
        rule(SWIN + r"downsample\.", lambda m: f"features.{more(m, 1, 2, 2)}."),
        *(
            Rule(r.pattern, swin_block(r"attn.qkv.\3"), r.part)
            for r in (
                *three(BLOCK + r"attention\.self\.QKV\.(weight|bias)$", ""),
                *three(BLOCK + r"attention\.QKV\.(weight|bias)$", "", IN_MEMORY),
            )
        ),
        rule(
            BLOCK + r"attention\.(?:self|relative_position_bias)\.relative_position_bias_table$",
            swin_block("attn.relative_position_bias_table"),
        ),
        rule(
            BLOCK + r"attention\.self\.relative_position_index$",
            swin_block("attn.relative_position_index"),
            shape=lambda s: (s[0] * s[1],) if len(s) == 2 else s,
        ),
        rule(BLOCK + r"attention\.(?:output\.dense|o_proj)\.", swin_block("attn.proj.")),
        rule(BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.", swin_block("mlp.0.")),
        rule(BLOCK + r"(?:output\.dense|mlp\.fc2)\.", swin_block("mlp.3.")),
        rule(BLOCK + r"layernorm_before\.", swin_block("norm1.")),
        rule(BLOCK + r"layernorm_after\.", swin_block("norm2.")),
        rule(r"^swin\.layernorm\.", "norm."),
        rule(r"^classifier\.", "head."),
    ],
}


def translate(shapes: Mapping[str, Shape]) -> Translation | None:
    """The file's tensors by the other library's names, or None where the names are not transformers'.

    A name that no rule knows stays as it is, so that comparing says which one is in the way.
    """
    kind = next((k for k in TABLES if any(name.startswith(k + ".em") for name in shapes)), None)
    there = None if kind is None else renamed(kind, TABLES[kind], shapes)
    if there is not None and kind == "swin":
        there = replace(there, shapes=there.shapes | constant_indices(there.shapes))
    return there


def renamed(kind: str, rules: list[Rule], shapes: Mapping[str, Shape]) -> Translation | None:
    """The tensors by these rules; None where two have one place, or not all that belong together are there."""
    names: dict[str, str] = {}
    found: dict[str, dict[int, str]] = {}
    reshaped: dict[str, Shape] = {}
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        to, (which, count), reshaped[name] = name, (0, 1), tuple(shape)
        for known in rules:
            match = known.pattern.match(name)
            if match:
                to, (which, count) = known.name(match) + name[match.end() :], known.part
                reshaped[name] = known.shape(tuple(shape)) if known.shape else tuple(shape)
                break
        names[name], counts[to] = to, count
        if found.setdefault(to, {}).setdefault(which, name) != name:
            return None
    whole: Shapes = {}
    parts: dict[str, Part] = {}
    for to, pieces in found.items():
        own = [reshaped[pieces[k]] for k in sorted(pieces)]
        if len(own) != counts[to] or any(s[1:] != own[0][1:] or not s for s in own[1:]):
            # Not all that belong together are there, or not of one width.
            return None
        at = 0
        for k, shape in zip(sorted(pieces), own, strict=True):
            if len(own) > 1 or shape != tuple(shapes[pieces[k]]):
                parts[pieces[k]] = Part(at, shape)
            at += shape[0] if shape else 0
        whole[to] = (at, *own[0][1:]) if len(own) > 1 else own[0]
    return Translation(kind, names, whole, parts)


def constant_indices(shapes: Shapes) -> Shapes:
    """Shapes of Swin's tables of indices, constants of the window that transformers' newer files leave out."""
    ending = "relative_position_bias_table"
    return {
        name.removesuffix(ending) + "relative_position_index": (((isqrt(shape[0]) + 1) // 2) ** 4,)
        for name, shape in shapes.items()
        if name.endswith(ending) and len(shape) == 2
    }
