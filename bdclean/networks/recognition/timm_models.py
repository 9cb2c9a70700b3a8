"""timm's networks, by the exact name in its registry: from a `config.json` beside the weights, or `--arch timm:NAME`.

A config is a stranger's: only the settings listed here are passed on, with checked values; nothing is fetched, and no
other name than that of a registered builder is looked up. timm is an optional extra.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bdclean.errors import Refused, UsageError
from bdclean.files.text import shown
from bdclean.networks.arch import Proposal, Shape, Shapes
from bdclean.networks.recognition.channels import check_readable
from bdclean.networks.recognition.dialects import views
from bdclean.networks.recognition.matching import Match, differences, listed, needed
from bdclean.networks.stages import describe, describe_encoder

PRE_LOGITS = "what would go into timm's head"
INSTALL = "pip install 'bdclean[timm]'"
NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,99}(?:\.[a-z0-9][a-z0-9_]{0,99})?")
# Settings of `model_args` that change which network is built, with their largest numbers or known words: what builders
# of timm take, because timm 1.0.31 and later write down all that `create_model` was given.
WHOLE = {
    "img_size": 2048, "patch_size": 256, "embed_dim": 65_536, "depth": 1000, "num_heads": 1024, "window_size": 128,
    "reg_tokens": 256, "num_registers": 256, "stem_width": 4096, "base_width": 4096, "cardinality": 1024,
    "output_stride": 32, "head_hidden_size": 65_536, "num_features": 65_536, "stem_size": 4096,
}  # fmt: skip
LISTS = {"depths": 1000, "dims": 65_536, "embed_dims": 65_536, "layers": 1000, "channels": 65_536}
NUMBERS = ("mlp_ratio", "init_values", "ls_init_value", "expand_ratio", "width_mult", "depth_multiplier",
           "channel_multiplier", "norm_eps")  # fmt: skip
FLAGS = ("qkv_bias", "qk_norm", "class_token", "no_embed_class", "pre_norm", "dynamic_img_size", "use_grn", "conv_mlp",
         "head_norm_first", "fc_norm", "final_norm", "strict_img_size", "always_partition", "avg_down",
         "pos_embed_rope", "use_rot_pos_emb", "use_abs_pos_emb", "use_rel_pos_bias",
         "use_shared_rel_pos_bias")  # fmt: skip
WORDS = {
    "global_pool": ("avg", "max", "token", "map", "catavgmax", "avgmax", "fast", ""),
    "pos_embed": ("learn", "none", ""), "stem_type": ("", "deep", "deep_tiered", "patch", "overlap"),
    "act_layer": ("relu", "relu6", "leaky_relu", "elu", "gelu", "gelu_tanh", "quick_gelu", "silu", "swish", "mish",
                  "hard_swish", "hard_sigmoid", "hard_mish", "prelu", "celu", "selu", "sigmoid", "tanh"),
}  # fmt: skip


def timm_module() -> ModuleType | None:
    """timm, or None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("timm")
    except ImportError:
        return None


def registered(name: str) -> bool:
    """Whether timm builds a network of this name (a tag after a point says only which weights)."""
    timm = timm_module()
    return timm is not None and bool(NAME.fullmatch(name)) and bool(timm.models.is_model(name.split(".")[0]))


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `model_args` says of the network, of known settings with sound values; the rest is dropped."""
    table = config.get("model_args")
    found: dict[str, Any] = {}
    for key, value in table.items() if isinstance(table, Mapping) else ():
        pair = isinstance(value, list) and len(value) == 2
        if key in WHOLE and (
            _whole(value, WHOLE[key]) or (pair and all(_whole(v, WHOLE[key]) for v in value))
        ):
            found[key] = tuple(value) if isinstance(value, list) else value
        elif key in LISTS and isinstance(value, list) and 0 < len(value) <= 16:
            if all(_whole(v, LISTS[key]) for v in value):
                found[key] = tuple(value)
        elif key in NUMBERS and isinstance(value, (int, float)) and not isinstance(value, bool):
            if 0 < value <= 1024:
                found[key] = value
        elif (key in FLAGS and isinstance(value, bool)) or (
            key in WORDS and isinstance(value, str) and value in WORDS[key]
        ):
            found[key] = value
    if "global_pool" not in found and config.get("global_pool") in WORDS["global_pool"]:
        found["global_pool"] = config["global_pool"]
    return found


def _whole(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def create(name: str, given: Mapping[str, Any]) -> nn.Module:
    """timm's network with random weights."""
    timm = timm_module()
    assert timm is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # `pretrained=False` and a registered name: no file is read and nothing is fetched.
        return timm.create_model(name, pretrained=False, **given)


def on_meta(build: Callable[[], nn.Module]) -> tuple[nn.Module, Shapes]:
    """A network without memory for its weights, and their shapes."""
    try:
        with torch.device("meta"):
            network = build()
    except (NotImplementedError, RuntimeError):
        # Builders that look at values while they build: transformers of older timm, at rates of stochastic depth.
        with torch.random.fork_rng(devices=[]):
            network = build()
    return network, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def fit_timm(name: str, shapes: Mapping[str, Shape], config: Mapping[str, Any] | None = None) -> Match:
    """timm's network `name` if its tensors are exactly these, under any wrappers.

    `config` may give the class count, settings and input size. Raises UsageError for a name that timm does not have,
    Refused where the tensors are others or timm is not installed.
    """
    if timm_module() is None:
        raise Refused(f"timm:{shown(name)} needs timm, which is not installed: {INSTALL}.")
    if not registered(name):
        raise UsageError(f"timm has no network {shown(name)}: see timm.list_models().")
    config = config or {}
    nearest: list[str] = []
    for given in ways_to_build(config, shapes):
        match, differing = held_against(name, given, shapes, config)
        corrected = given | as_the_file_has(differing, given)
        if match is None and corrected != given:
            match, differing = held_against(name, corrected, shapes, config)
        if match is not None:
            check_readable(match.arch.name, match.arch.input[0])
            return match
        if not nearest or len(differing) < len(nearest):
            nearest = differing
    raise Refused(f"timm:{name} does not have these {len(shapes)} tensors ({listed(nearest)}).")


def ways_to_build(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Iterator[dict[str, Any]]:
    """Settings to build with: as the config says, then with its input size, where older ones say no other."""
    bare = config.get("num_classes") == 0
    given = {"num_classes": 0 if bare else claimed_classes(config) or last_rows(shapes)} | settings(config)
    yield given
    size = input_size(config)
    if size is not None and "img_size" not in given:
        yield given | {"img_size": size[0] if size[0] == size[1] else size}


def claimed_classes(config: Mapping[str, Any]) -> int | None:
    """The class count that the config says."""
    count = config.get("num_classes")
    return count if _whole(count, 1_000_000) else None


def last_rows(shapes: Mapping[str, Shape]) -> int:
    """Rows of the last matrix: the head, where no config says its rows and names are in the network's order."""
    rows = [shape[0] for shape in shapes.values() if len(shape) == 2 and shape[0] > 0]
    return min(rows[-1], 1_000_000) if rows else 1000


def input_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width that the config says: in `pretrained_cfg`, or beside the name as timm 0.4 wrote it."""
    inner = config.get("pretrained_cfg")
    for table in (inner if isinstance(inner, Mapping) else {}, config):
        size = table.get("input_size")
        if isinstance(size, list) and len(size) == 3 and all(_whole(v, 2048) for v in size):
            return size[1], size[2]
    return None


def as_the_file_has(differing: list[str], given: Mapping[str, Any]) -> dict[str, int]:
    """The class count and the channels of images that the file has, where differences show them.

    In a sorted file (`head.fc` before `stages`) the last matrix is no head, and a config may be that of another head.
    Channels show in a first convolution, which differs from the built one in nothing else.
    """
    rows = re.compile(rf" is \[(\d{{1,7}})[^\]]*\], expected \[{given['num_classes']}[,\]]")
    stem = re.compile(r" is \[(\d+), (\d{1,3}), (\d+), (\d+)\], expected \[\1, 3, \3, \4\]$")
    found: dict[str, int] = {}
    for phrase in differing:
        if match := stem.search(phrase):
            found.setdefault("in_chans", int(match[2]))
        elif match := rows.search(phrase):
            found.setdefault("num_classes", int(match[1]))
    return found


def held_against(
    name: str, given: Mapping[str, Any], shapes: Mapping[str, Shape], config: Mapping[str, Any]
) -> tuple[Match | None, list[str]]:
    """The network with these settings if it fits, else what differs under the nearest view of the names."""
    build = partial(create, name, dict(given))
    try:
        network, expected = on_meta(build)
    except Exception as error:  # a builder may refuse settings in any way
        return None, [f"it cannot be built with these settings ({shown(f'{type(error).__name__}: {error}')})"]
    best: list[str] = []
    for names, unread in views(shapes, expected):
        own = {new: tuple(shapes[old]) for old, new in names.items()}
        differing = differences(own, needed(expected, own, network))
        if not differing:
            channels = given.get("in_chans", 3)
            return match_at_size(f"timm:{name}", build, network, names, unread, config, channels), []
        if not best or len(differing) < len(best):
            best = differing
    return None, best


def match_at_size(
    name: str,
    build: Callable[[], nn.Module],
    network: nn.Module,
    names: dict[str, str],
    unread: tuple[str, ...],
    config: Mapping[str, Any],
    channels: int,
) -> Match:
    """The Match at the input size that the config says, else at the network's usual one, with so many channels."""
    own = getattr(network, "pretrained_cfg", None) or {}
    usual = own.get("input_size") if isinstance(own, Mapping) else None
    patches = getattr(getattr(network, "patch_embed", None), "img_size", None)
    # Older configs say an input size that the network was not built for: its patches tell.
    sizes = [input_size(config), patches, usual[1:] if usual else None]
    failure = ""
    for size in dict.fromkeys(tuple(s) for s in sizes if s):
        try:
            full = (channels, size[0], size[1])
            if config.get("num_classes") == 0:
                arch = describe_encoder(name, build, full, PRE_LOGITS)
                return Match(replace(arch, head_place=head_place(network)), names, unread)
            return Match(describe(name, build, full, (), network), names, unread)
        except Exception as error:  # a network may refuse a size in any way
            failure = failure or f"{type(error).__name__}: {error}"
    raise Refused(f"{name} cannot be run as a classifier of images ({shown(failure)}).")


def head_place(network: nn.Module) -> str:
    """The identity that timm left in place of the head; empty where there is none."""
    place = (getattr(network, "pretrained_cfg", None) or {}).get("classifier")
    if not isinstance(place, str) or place not in dict(network.named_modules()):
        return ""
    return place if isinstance(network.get_submodule(place), nn.Identity) else ""


def convnextv2(shapes: Shapes) -> Proposal | None:
    """ConvNeXt V2 with these tensors under timm's names, which torchvision does not build; None for other shapes."""
    depths: list[int] = []
    widths: list[int] = []
    while first := shapes.get(f"stages.{len(depths)}.blocks.0.conv_dw.weight"):
        stage = f"stages.{len(depths)}.blocks."
        depths.append(len({n[len(stage) :].split(".")[0] for n in shapes if n.startswith(stage)}))
        widths.append(first[0])
    head = shapes.get("head.fc.weight", ())
    if not depths or len(head) != 2:
        return None
    if timm_module() is None:
        raise Refused(f"this is a ConvNeXt V2, which needs timm: {INSTALL}.")

    def build() -> nn.Module:
        module = importlib.import_module("timm.models.convnext")
        return module.ConvNeXt(
            num_classes=head[0], depths=tuple(depths), dims=tuple(widths), use_grn=True, ls_init_value=None
        )

    name = f"convnextv2-{'-'.join(map(str, depths))}-w{'-'.join(map(str, widths))}"
    return Proposal(name, build, (3, 224, 224))
