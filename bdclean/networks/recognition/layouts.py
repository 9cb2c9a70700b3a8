"""Where authors of self-supervised encoders keep the backbone in their files, and what lies beside it.

Prefixes are matched whole, from the beginning: `backbone.` must not be found in `momentum_backbone.`. Rows come in the
order in which they are tried; one whose prefix other authors use as well says what must lie beside it or inside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bdclean.networks.recognition.dialects import BESIDE, LONGEST, bare

# BadEncoder's and its successors' values for CIFAR-10.
CIFAR10_IMAGE_STD = "mean=0.4914/0.4822/0.4465,std=0.2023/0.1994/0.2010"
# Tables that a training script saves its networks in; VISSL's is three deep.
TABLES = re.compile(r"^(?:(?:state_dict|model_state_dict|classy_state_dict|base_model\.model)\.)+")
PROJECTOR = re.compile(
    r"^(?:[\w]*projector|[\w]*projection_head|[\w]*prediction_head|proj_head|predictor|prototypes|head\.(?:mlp|last_layer)"
    r"|g(?=\.\d)|fc(?=\.\d)|heads(?=\.\d)|queue|queue_ptr|(?:dino|ibot|student|teacher)_head)(?:\.|$)"
)
HEADS = re.compile(r"^(?:fc|linear|head|heads|classifier|last_linear)\.")


@dataclass(frozen=True)
class Layout:
    """One authors' way. `prefix`: before the backbone's names; `beside`: what another of the file's names begins with.

    `inside`: what one of the names behind the prefix begins with; `aside`: what there is no part of the backbone.
    `heads`: number of attention heads by width, where it is not the usual one. `loose`: the names say nothing of
    authors, so that whatever lies outside must be known to be no part of a network.
    """

    name: str
    prefix: re.Pattern[str]
    beside: re.Pattern[str] | None = None
    inside: re.Pattern[str] | None = None
    aside: re.Pattern[str] | None = None
    preprocess: str = "imagenet"
    heads: tuple[tuple[int, int], ...] = ()
    loose: bool = False


@dataclass(frozen=True)
class View:
    """A file seen as one layout: the file's names of the backbone's tensors -> theirs without prefix, and the rest."""

    layout: Layout
    prefix: str
    names: dict[str, str]
    unread: tuple[str, ...]


def row(
    name: str,
    prefix: str,
    beside: str = "",
    inside: str = "",
    aside: str = "",
    preprocess: str = "imagenet",
    heads: tuple[tuple[int, int], ...] = (),
    loose: bool = False,
) -> Layout:
    """A Layout from texts."""

    def pattern(text: str) -> re.Pattern[str] | None:
        return re.compile(f"(?:{text})") if text else None

    begins = re.compile(f"(?:{prefix})")
    return Layout(name, begins, pattern(beside), pattern(inside), pattern(aside), preprocess, heads, loose)


FC, HEAD = r"fc\.", r"head\."
# MoCo v3's small ViT has heads of 32.
NARROW = ((384, 12),)
LAYOUTS = (
    row("MoCo v1 or v2, the query encoder", r"encoder_q\.", aside=FC),
    row("MoCo v3, the base encoder", r"base_encoder\.", aside=FC + "|" + HEAD, heads=NARROW),
    row("BadEncoder, DRUPE or MIMIC", r"f\.f\.(?=\d)", preprocess=CIFAR10_IMAGE_STD),
    row("DECREE", r"f\.(?=\d)", preprocess=CIFAR10_IMAGE_STD),
    row("CTRL", r"backbone\.", r"proj_head\.|backbone_k\.|projector_q\.", aside=FC, preprocess=""),
    row("DINOv2, the teacher", r"teacher\.backbone\.", r"(?:teacher\.)?(?:dino|ibot)_head\."),
    row("DINOv2, the teacher", r"teacher\.backbone\.", inside=r"blocks\.\d+\.(?:\d+\.)?ls1|mask_token"),
    row("DINO, the teacher", r"teacher\.backbone\.", aside=FC + "|" + HEAD),
    row("DINO, the student", r"student\.backbone\.", aside=FC + "|" + HEAD),
    row("DINO", r"backbone\.", r"head\.last_layer\.|head\.mlp\.", aside=FC),
    row("lightly, the teacher", r"teacher_backbone\.(?:vit\.)?", preprocess=""),
    row("lightly, the student", r"student_backbone\.(?:vit\.)?", preprocess=""),
    row("lightly", r"backbone\.(?=\d+\.)|backbone\.vit\.", preprocess=""),
    row("Barlow Twins", r"backbone\.", r"bn\.running_mean", aside=FC),
    row("SimSiam", r"encoder\.", r"predictor\.", r"fc\.0\.", FC),
    row("SimCLR (Spijkervet)", r"encoder\.", r"projector\.0\.", aside=FC, preprocess=""),
    row("SimCLR (sthalles)", r"backbone\.", inside=r"fc\.0\.weight", aside=FC, preprocess="none"),
    row(
        "solo-learn",
        r"(?:backbone|encoder)\.",
        # Its online probe, `classifier`, alone tells nothing: a classifier has one, too.
        r"momentum_\w+\.|projector\.|predictor\.|queue$|prototypes\.|decoder\.(?:mask_token|decoder_\w+)",
        aside=FC,
        preprocess="stem",
    ),
    row("SSL-Backdoor or SSL-Cleanse, BYOL", r"model\.", r"model_t\.|pred\.|head_t\.", aside=FC, preprocess="stem"),
    row("BYOL (lucidrains)", r"net\.", r"(?:online|target)_encoder\.|online_predictor\.", aside=FC, preprocess=""),
    row("BYOL (lucidrains), the online encoder", r"online_encoder\.net\.", aside=FC, preprocess=""),
    row("VISSL", r"(?:trunk\.)?(?:base_model\.)?_feature_blocks\."),
    row("SwAV", "", inside=r"projection_head\.|prototypes\.", aside=r"projection_head\.|prototypes\."),
    row("MAE", "", inside=r"decoder_blocks\.", aside=r"decoder_\w+(?:\.|$)"),
    row("OpenAI's CLIP", r"visual\.", r"input_resolution$|context_length$|vocab_size$", preprocess="clip"),
    row("CLIP or OpenCLIP", r"visual\.", preprocess="clip"),
    row("CLIP, the image encoder alone", "", inside=r"attnpool\.|ln_pre\.|norm_pre\.", preprocess="clip", loose=True),
    row("DINOv2", "", inside=r"blocks\.\d+\.(?:\d+\.)?ls1\.", loose=True),
    row("a transformer of DINO, MAE or timm without its head", "", inside=r"cls_token$", loose=True),
    row("a network without its head", "", preprocess="stem", loose=True),
    row(
        "a network without its head",
        r"(?:model|net|network|backbone|encoder|base_model|online_model|trunk)\.(?:vit\.)?",
        preprocess="stem",
        loose=True,
    ),
)  # fmt: skip
PROBE = re.compile(
    r"^(?:fc|linear|head|heads\.head|classifier|classification_head|last_linear)\.(?:weight|bias)$"
)
# What only files of self-supervision hold; beside an online probe (solo-learn's `classifier`) they tell an encoder.
COMPANIONS = re.compile(
    r"^(?:encoder_k|momentum_(?:backbone|encoder|projector)|target_encoder|[\w]*projector|predictor|projection_head|proj_head"
    r"|prototypes|queue|queue_ptr)(?:\.|$)"
)


def short(name: str) -> str:
    """The name without what wraps modules wherever they stand, and without the tables that hold a network."""
    return name if len(name) > LONGEST else TABLES.sub("", bare(name))


def views(names: Iterable[str], heads: bool = False) -> Iterator[View]:
    """The file as each layout that its names allow. `heads`: a classifier's head is left aside as well."""
    known = {name: short(name) for name in names}
    for layout in LAYOUTS:
        prefixes: dict[str, None] = {}
        for inner in known.values():
            match = layout.prefix.match(inner)
            if match:
                prefixes[match.group()] = None
        for prefix in sorted(prefixes, key=len, reverse=True)[:8]:
            view = seen_as(layout, prefix, known, heads)
            if view is not None:
                yield view


def seen_as(layout: Layout, prefix: str, known: dict[str, str], heads: bool) -> View | None:
    """The file as this layout with this prefix; None where what must be there is not."""
    inside = {n: s[len(prefix) :] for n, s in known.items() if s.startswith(prefix)}
    outside = {n: s for n, s in known.items() if n not in inside}
    if layout.beside is not None and not any(map(layout.beside.match, outside.values())):
        return None
    if layout.inside is not None and not any(map(layout.inside.match, inside.values())):
        return None
    # A linear layer beside the backbone is a classifier's (leftthomas' `f` and `fc`, lightly's linear probe), unless
    # something that only self-supervision has says that it is an online probe.
    if not heads and layout.beside is None and any(map(PROBE.match, outside.values())):
        if not any(map(COMPANIONS.match, outside.values())):
            return None
    if layout.loose and not all(
        BESIDE.match(s) or PROJECTOR.match(s) or (heads and HEADS.match(s)) for s in outside.values()
    ):
        return None
    # What stands for hidden patches in training (DINOv2, MAE) never runs on an image.
    own = {
        n: s for n, s in inside.items() if s != "mask_token" and not (layout.aside and layout.aside.match(s))
    }
    if not prefix:
        own = {n: s for n, s in own.items() if not BESIDE.match(s)}
    if heads:
        own = {n: s for n, s in own.items() if not HEADS.match(s)}
    if not own or len(set(own.values())) != len(own):
        return None
    return View(layout, prefix, own, tuple(n for n in known if n not in own))
