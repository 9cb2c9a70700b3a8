"""Which encoder a file holds: the authors' layout says where its backbone is, and the tensors which network it is.

A backbone without its head is given a head that no file has, recognised as the classifier that it then would be, and
loses it again: so all families, variants and candidates serve encoders as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bdclean.errors import Refused
from bdclean.files.text import shown
from bdclean.networks.arch import Arch, Shape, Shapes
from bdclean.networks.encoder import headless
from bdclean.networks.families import clip_resnet, token_transformer
from bdclean.networks.families.counting import depths, torchvision_name
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.families.token_transformer import TokenTransformer
from bdclean.networks.recognition import transformers_encoders
from bdclean.networks.recognition.layouts import COMPANIONS, HEADS, PROJECTOR, Layout, View, row, short, views
from bdclean.networks.recognition.matching import Match, Part, listed
from bdclean.networks.recognition.recognition import FAMILIES, Near, fitting
from bdclean.networks.recognition.variants import changed, with_epsilon

CODE = "give the network's own code with --arch FILE.py:NAME"
# Rows of the head that is put on: no file's.
CLASSES = 2
POOLED, TOKEN, MEAN = "pooled", "class token after the norm", "mean of the patches, normed"
TABLE = re.compile(r"^(\d{1,3})\.")


def is_pretraining(shapes: Mapping[str, Shape]) -> bool:
    """Whether what lies beside a head says that it is only the online probe of an encoder (solo-learn's)."""
    names = [short(name) for name in shapes]
    holders = ("backbone.", "encoder.")
    probe = any(re.match(r"classifier\.(?:weight|bias)$", name) for name in names)
    headed = any(re.match(r"(?:backbone|encoder)\.(?:fc|head|linear)\.", name) for name in names)
    beside = any(COMPANIONS.match(name) for name in names)
    return probe and beside and not headed and any(name.startswith(holders) for name in names)


@dataclass(frozen=True)
class Attempt:
    """How near a file, seen as one layout, was to a network."""

    view: View
    near: Near


def recognise(
    shapes: Mapping[str, Shape], config: Mapping[str, Any] | None = None, heads: bool = False
) -> list[Match]:
    """The encoders that this file may hold, the likeliest first.

    `heads`: a classifier's head is set aside, too. Raises Refused, with how many tensors of the nearest were found.
    """
    claim = config or {}
    known = {name: short(name) for name in shapes}
    there = transformers_encoders.translate(shapes, known)
    if there is not None and (heads or not any(HEADS.match(s) for s in known.values())):
        return translated(there, claim)
    attempts: list[Attempt] = []
    for view in views(shapes, heads):
        own = {new: tuple(shapes[old]) for old, new in view.names.items()}
        found, near = fit(own)
        if found:
            kept = [back(m, view.names, view.unread) for m in found]
            return settle(kept, view.layout, claim)
        attempts += [Attempt(view, n) for n in near]
    raise Refused(refusal(shapes, attempts))


def refusal(shapes: Mapping[str, Shape], attempts: list[Attempt]) -> str:
    """The sentence for a file of which no encoder is whole."""
    if all(PROJECTOR.match(short(name)) for name in shapes):
        some = shown(next(iter(shapes)))
        return f"these {len(shapes)} tensors ({some}, ...) are a projector alone: give the file with its backbone."
    best = max(attempts, key=lambda a: (a.near.held, -len(a.near.differing)), default=None)
    if best is None or best.near.held * 2 < best.near.of:
        return f"no known encoder has these {len(shapes)} tensors, nor anything like them: {CODE}."
    where = f" behind {best.view.prefix}" if best.view.prefix else ""
    layout, near, left = best.view.layout.name, best.near, len(best.view.unread)
    return (
        f"{near.held} of {near.of} tensors of {near.name} are there{where} ({layout}), and "
        f"{listed(near.differing)}; {left} other{'s were' if left != 1 else ' was'} left aside: {CODE}."
    )


def is_half(shapes: Mapping[str, Shape]) -> bool:
    """Whether the names are an author's of encoders, so that a refusal should speak of one."""
    known = {name: short(name) for name in shapes}
    if any(HEADS.match(inner) for inner in known.values()):
        return any(not view.layout.loose for view in views(shapes))
    return (
        any(not view.layout.loose for view in views(shapes))
        or all(map(PROJECTOR.match, known.values()))
        or transformers_encoders.translate(shapes, known) is not None
    )


def fit(own: Shapes) -> tuple[list[Match], list[Near]]:
    """The networks with exactly these tensors, without head; else the nearest."""
    names = backbone_names(own)
    inner = {names[name]: shape for name, shape in own.items()}
    if len(inner) != len(own):
        return [], []
    head, width = missing_head(inner)
    if width < 1 or f"{head}.weight" in inner:
        return [], []
    added: Shapes = {f"{head}.weight": (CLASSES, width), f"{head}.bias": (CLASSES,)}
    families = FAMILIES
    if "cls_token" in inner or "class_embedding" in inner:
        families = (token_transformer,)
    elif any(name.startswith("attnpool.") for name in inner):
        families = (clip_resnet,)
    found, near = fitting(inner | added, families)
    ends = []
    for match in found:
        if not added.keys() <= match.names.keys() or set(match.unread) & added.keys():
            continue
        # What a preact network calls its head may also be the last norm's place: only a true one comes off.
        if match.names[f"{head}.weight"] != f"{match.arch.head}.weight":
            continue
        arch = headless(match.arch)
        kept = {n: match.names[names[n]] for n in own if names[n] in match.names}
        unread = tuple(n for n in own if names[n] not in match.names)
        ends.append(Match(replace(arch, feature=feature_of(arch)), kept, unread))
    return ends, [without_head(n) for n in near]


def without_head(near: Near) -> Near:
    """The same counts without the two tensors of the head that was put on."""
    return replace(near, held=max(0, near.held - 2), of=max(0, near.of - 2))


def feature_of(arch: Arch) -> str:
    """What the network gives, in words."""
    with torch.device("meta"):
        network = arch.build()
    if isinstance(network, TokenTransformer):
        ends = ", projected" if network.form.projected else ""
        if network.form.averaged:
            return MEAN + ends
        return f"class token{ends}" if ends else TOKEN
    if any(isinstance(m, clip_resnet.AttentionPool) for m in network.modules()):
        return "pooled by attention, projected"
    return TOKEN if hasattr(network, "class_token") else POOLED


def backbone_names(own: Shapes) -> dict[str, str]:
    """Each tensor's name in the network, where authors keep children of a network by number or a trunk in a tower.

    BadEncoder's `f.f.3` and lightly's `backbone.4` are both layer1: what holds blocks comes in order, after the first
    convolution and its norm.
    """
    numbers = sorted({int(m[1]) for m in map(TABLE.match, own) if m})
    staged = [k for k in numbers if f"{k}.0.conv1.weight" in own or f"{k}.0.conv2.weight" in own]
    stem = next((k for k in numbers if len(own.get(f"{k}.weight", ())) == 4), None)
    names = {name: name for name in own}
    if (
        staged
        and stem is not None
        and stem + 1 in numbers
        and staged == list(range(staged[0], staged[-1] + 1))
    ):
        to = {stem: "conv1.", stem + 1: "bn1."} | {k: f"layer{i + 1}." for i, k in enumerate(staged)}
        for name in own:
            match = TABLE.match(name)
            if match and int(match[1]) in to:
                names[name] = to[int(match[1])] + name[match.end() :]
    if any(name.startswith("trunk.") for name in own):
        # OpenCLIP around a network of timm's.
        for name in own:
            names[name] = "proj.weight" if name == "head.proj.weight" else name.removeprefix("trunk.")
    if "cls_token" in names.values() or "class_embedding" in names.values():
        names = {name: token_transformer.rename(inner) for name, inner in names.items()}
    elif not any(inner.startswith(("attnpool.", "features.")) for inner in names.values()):
        # CTRL's `shortcut.0` and `shortcut.1`, among others.
        names = {name: torchvision_name(inner) for name, inner in names.items()}
    return names


def missing_head(inner: Shapes) -> tuple[str, int]:
    """What the head of such a network would be called, and how wide its input is; 0 where nothing shows it."""
    if "cls_token" in inner:
        form = token_transformer.form_of(inner | {"head.weight": (CLASSES, 1)})
        return "head", (form.projected or form.width) if form else 0
    if "attnpool.c_proj.weight" in inner:
        return "fc", inner["attnpool.c_proj.weight"][0]
    blocks = depths(inner)
    if blocks:
        last = f"layer{len(blocks)}.{blocks[-1] - 1}."
        kernel = inner.get(last + "conv3.weight") or inner.get(last + "conv2.weight") or ()
        return "fc", kernel[0] if kernel else 0
    norms = [s[0] for n, s in inner.items() if len(s) == 1 and n.endswith(".weight")]
    width = norms[-1] if norms else 0
    if "class_token" in inner:
        return "heads.head", inner["class_token"][-1]
    if "features.norm5.weight" in inner:
        return "classifier", inner["features.norm5.weight"][0]
    if "classifier.0.weight" in inner and "features.0.0.weight" in inner:
        return "classifier.2", inner["classifier.0.weight"][0]
    if "norm.weight" in inner:
        return "head", inner["norm.weight"][0]
    return ("fc" if "stem.0.weight" in inner else "classifier.1"), width


def back(match: Match, names: Mapping[str, str], unread: tuple[str, ...]) -> Match:
    """The same match for the names that the file has."""
    to = {old: match.names[new] for old, new in names.items() if new in match.names}
    left = tuple(old for old, new in names.items() if new not in match.names)
    return Match(match.arch, to, unread + left)


def settle(found: list[Match], layout: Layout, claim: Mapping[str, Any]) -> list[Match]:
    """The candidates as the layout and the claim allow, with what the authors' files do not say."""
    heads = dict(layout.heads)
    found = by_heads(found, lambda form: heads.get(form.width))
    tower = claim.get("model_cfg")
    quick: bool | None = True if layout.name == "OpenAI's CLIP" else None
    if quick is None and isinstance(tower, Mapping):
        quick = tower.get("quick_gelu") is True
    found = with_stems(by_activation(found, quick), layout.name == "solo-learn")
    preprocess = layout.preprocess
    if preprocess == "stem":
        preprocess = "cifar10" if found[0].arch.input[1] <= 64 else "imagenet"
    return [replace(m, arch=replace(m.arch, layout=layout.name, usual_preprocess=preprocess)) for m in found]


def form_in(arch: Arch) -> token_transformer.Form | None:
    """The numbers of a transformer's."""
    with torch.device("meta"):
        network = arch.build()
    return network.form if isinstance(network, TokenTransformer) else None


def by_heads(found: list[Match], wanted: Any) -> list[Match]:
    """Those with as many attention heads as `wanted(form)` says, first alone; all where it says nothing."""
    form = form_in(found[0].arch)
    count = wanted(form) if form is not None else None
    if count is None or form is None or count == form.heads:
        return found
    chosen = [m for m in found if (own := form_in(m.arch)) is not None and own.heads == count]
    if not chosen:
        raise Refused(
            f"config.json says {count} attention heads, which these tensors do not allow: correct it."
        )
    return [replace(m, arch=replace(m.arch, unusual=False)) for m in chosen]


def by_activation(found: list[Match], quick: bool | None) -> list[Match]:
    """Of CLIP's transformers those with OpenAI's activation or the usual one; all where nothing says which."""
    form = form_in(found[0].arch)
    if form is None:
        return found
    if not form.pre_norm:
        # Nobody trains these with another activation, and nothing would tell.
        return [m for m in found if "+" not in m.arch.name]
    chosen = [m for m in found if "+" not in m.arch.name]
    if quick is not None:
        both = [m for m in chosen if (own := form_in(m.arch)) is not None and own.quick == quick]
        chosen = both or chosen
        chosen = [replace(m, arch=replace(m.arch, alternatives=())) for m in chosen]
    return chosen


def with_stems(found: list[Match], padded: bool) -> list[Match]:
    """Also with the stems for small images that shapes do not tell from the usual one.

    solo-learn's pads by two, so that its maps are two pixels larger (`padded`: its files, where that is the rule);
    others leave torchvision's pool behind a 3x3 convolution (SSL-Backdoor's BYOL for anything but CIFAR).
    """
    with torch.device("meta"):
        network = found[0].arch.build()
    if not isinstance(network, ResidualNetwork):
        return found
    more = []
    for suffix, change in (("pad2", pad_stem), ("pool", pool_stem)):
        arch = replace(
            found[0].arch,
            name=f"{found[0].arch.name}+{suffix}",
            build=Changed(found[0].arch.build, change),
            unusual=not (padded and suffix == "pad2"),
        )
        more.append(replace(found[0], arch=arch))
    return [found[0], *more, *found[1:]]


def pad_stem(network: nn.Module) -> nn.Module:
    """`network` with a first convolution padded by two pixels."""
    network.get_submodule("conv1").padding = (2, 2)  # type: ignore[assignment]
    return network


def pool_stem(network: nn.Module) -> nn.Module:
    """`network` with torchvision's pool behind its first activation."""
    assert isinstance(network, ResidualNetwork)
    network.act = nn.Sequential(network.act, nn.MaxPool2d(3, 2, 1))
    return network


@dataclass(frozen=True)
class Changed:
    """Builds a network and changes it."""

    build: Any
    change: Any

    def __call__(self) -> nn.Module:
        return changed(self.build, self.change)


# --- Hugging Face transformers ------------------------------------------------------------------------------


def translated(found: transformers_encoders.Found, claim: Mapping[str, Any]) -> list[Match]:
    """The encoders that have these tensors under transformers' names."""
    style, there = found.style, found.there
    fitted, near = fit(there.shapes)
    if not fitted:
        view = View(row(style.name, ""), "", found.short, found.unread)
        raise Refused(refusal(there.shapes, [Attempt(view, n) for n in near]))
    own = claim.get("vision_config") if isinstance(claim.get("vision_config"), Mapping) else claim
    assert isinstance(own, Mapping)
    activation = own.get("hidden_act", style.activation)
    if activation not in ("gelu", style.activation):
        raise Refused(f"config.json says hidden_act {shown(activation)}, which is not known for it: {CODE}.")
    count = own.get("num_attention_heads")
    fitted = by_activation(fitted, activation == "quick_gelu")
    fitted = by_heads(fitted, lambda _: count if isinstance(count, int) else None)
    value = own.get("layer_norm_eps", style.epsilon)
    if not isinstance(value, float) or not 0 < value < 0.1:
        value = style.epsilon
    ends = []
    for match in fitted:
        arch = replace(
            match.arch,
            build=with_epsilon(match.arch.build, value, ""),
            layout=style.name,
            usual_preprocess=style.preprocess,
        )
        names = {name: match.names[there.names[inner]] for inner, name in found.short.items()}
        parts: dict[str, Part] = {found.short[inner]: part for inner, part in there.parts.items()}
        ends.append(Match(arch, names, found.unread, parts))
    return ends
