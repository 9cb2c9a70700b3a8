"""Hugging Face transformers' names of self-supervised encoders, by timm's for the same tensors.

DINOv2 with and without registers, ViT (Hugging Face's DINO), MAE, and CLIP's image tower; the names that version 4
writes to disk, and those that version 5 has in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bdclean.networks.arch import Shape
from bdclean.networks.recognition.transformers_names import Rule, Translation, renamed, rule

# The network within a larger one (a classifier's, MAE's with its decoder, CLIP's two towers).
HOLDER = re.compile(r"^(?:dinov2|dinov2_with_registers|vit|vision_model)\.")
# No part of what gives the feature: MAE's decoder, CLIP's text tower, what DINOv2 and MAE put for hidden patches, a
# pooler that no authors trained, and indices that older versions wrote down.
ASIDE = re.compile(
    r"^(?:decoder\.|text_model\.|text_projection\.|logit_scale$|pooler\.|classifier\.)|mask_token$|position_ids$"
)
BLOCK = r"^(?:encoder\.)?layers?\.(\d+)\."
TO = r"blocks.\1."


def three(pattern: str, words: tuple[str, str, str]) -> list[Rule]:
    """Query, key and value under these words, one tensor in timm."""
    return [
        rule(BLOCK + pattern.replace("QKV", word) + r"\.(weight|bias)$", TO + r"attn.qkv.\2", (k, 3))
        for k, word in enumerate(words)
    ]


OLD, NEW = ("query", "key", "value"), ("q_proj", "k_proj", "v_proj")
VIT = [
    rule(r"^embeddings\.cls_token$", "cls_token"),
    rule(r"^embeddings\.position_embeddings$", "pos_embed"),
    rule(r"^embeddings\.register_tokens$", "register_tokens"),
    rule(r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    *three(r"attention\.attention\.QKV", OLD),
    *three(r"attention\.QKV", NEW),
    rule(BLOCK + r"attention\.(?:output\.dense|o_proj)\.", TO + "attn.proj."),
    rule(BLOCK + r"layer_scale([12])\.lambda1$", TO + r"ls\2.gamma"),
    rule(BLOCK + r"norm([12])\.", TO + r"norm\2."),
    rule(BLOCK + r"layernorm_before\.", TO + "norm1."),
    rule(BLOCK + r"layernorm_after\.", TO + "norm2."),
    rule(BLOCK + r"intermediate\.dense\.", TO + "mlp.fc1."),
    rule(BLOCK + r"output\.dense\.", TO + "mlp.fc2."),
    rule(BLOCK + r"mlp\.weights_in\.", TO + "mlp.w12."),
    rule(BLOCK + r"mlp\.weights_out\.", TO + "mlp.w3."),
    rule(BLOCK + r"mlp\.gate_proj\.(weight|bias)$", TO + r"mlp.w12.\2", (0, 2)),
    rule(BLOCK + r"mlp\.up_proj\.(weight|bias)$", TO + r"mlp.w12.\2", (1, 2)),
    rule(BLOCK + r"mlp\.down_proj\.", TO + "mlp.w3."),
    rule(BLOCK + r"mlp\.fc([12])\.", TO + r"mlp.fc\2."),
    rule(r"^layernorm\.", "norm."),
]
CLIP = [
    rule(r"^embeddings\.class_embedding$", "cls_token"),
    rule(r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    rule(r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    rule(r"^pre_layrnorm\.", "norm_pre."),  # sic
    *three(r"self_attn\.QKV", NEW),
    rule(BLOCK + r"self_attn\.out_proj\.", TO + "attn.proj."),
    rule(BLOCK + r"layer_norm([12])\.", TO + r"norm\2."),
    rule(BLOCK + r"mlp\.fc([12])\.", TO + r"mlp.fc\2."),
    rule(r"^post_layernorm\.", "norm."),
    rule(r"^visual_projection\.weight$", "proj.weight"),
]


@dataclass(frozen=True)
class Style:
    """A kind of network in transformers. `models`: its `model_type`s; `epsilon`: its layer norms' without a config."""

    name: str
    models: tuple[str, ...]
    rules: list[Rule]
    epsilon: float
    preprocess: str
    activation: str


DINOV2 = Style("DINOv2 (transformers)", ("dinov2", "dinov2_with_registers"), VIT, 1e-6, "imagenet", "gelu")
MAE = Style("MAE (transformers)", ("vit_mae",), VIT, 1e-12, "imagenet", "gelu")
PLAIN = Style("ViT (transformers)", ("vit", "vit_mae"), VIT, 1e-12, "", "gelu")
CLIP_TOWER = Style("CLIP (transformers)", ("clip", "clip_vision_model"), CLIP, 1e-5, "clip", "quick_gelu")


@dataclass(frozen=True)
class Found:
    """A file by timm's names. `short`: the file's names of the backbone's tensors by those that were translated."""

    style: Style
    short: dict[str, str]
    unread: tuple[str, ...]
    there: Translation


def style_of(names: set[str]) -> Style | None:
    """Which of transformers' networks has these names, without holders."""
    if "embeddings.class_embedding" in names and "embeddings.patch_embedding.weight" in names:
        return CLIP_TOWER
    if "embeddings.cls_token" not in names or "embeddings.patch_embeddings.projection.weight" not in names:
        return None
    if any(re.match(BLOCK + r"layer_scale1\.", name) for name in names):
        return DINOV2
    return MAE if any(name.startswith("decoder.") for name in names) else PLAIN


def translate(shapes: Mapping[str, Shape], known: Mapping[str, str]) -> Found | None:
    """The backbone by timm's names, or None where the names are not transformers'. `known`: names without wrappers."""
    bare = {HOLDER.sub("", inner): name for name, inner in known.items()}
    style = style_of(set(bare))
    if style is None or len(bare) != len(known):
        return None
    short = {inner: name for inner, name in bare.items() if not ASIDE.search(inner)}
    there = renamed(
        style.models[0], style.rules, {inner: tuple(shapes[name]) for inner, name in short.items()}
    )
    if there is None:
        return None
    unread = tuple(name for inner, name in bare.items() if inner not in short)
    return Found(style, short, unread, there)
