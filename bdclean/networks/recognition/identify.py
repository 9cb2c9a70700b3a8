"""Recognition with what a `config.json` beside the weights says: a claim, held to names, shapes and statistics.

A claim may name the builder (timm) or settle what shapes do not show (heads, strides). It is taken only where its
network has exactly the file's tensors; a network known here that has them, too, and computes something else stays a
candidate, which real images must part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bdclean.errors import Refused, UsageError
from bdclean.files.text import shown
from bdclean.networks.arch import Arch, Shape
from bdclean.networks.encoder import headless, submodule
from bdclean.networks.recognition import encoders, recognition, timm_models
from bdclean.networks.recognition.channels import as_rgb, check_readable, with_channels
from bdclean.networks.recognition.dialects import views
from bdclean.networks.recognition.matching import Match, Part, differences, listed
from bdclean.networks.recognition.prefixed import behind_prefix
from bdclean.networks.recognition.transformers_names import TABLES, Translation, translate
from bdclean.networks.recognition.variants import with_epsilon
from bdclean.networks.stages import describe, describe_encoder, watch

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
NO_HEAD = (
    "the code's network ends without a head of classes: it is read as an encoder of {} features (--kind classifier "
    "says otherwise)."
)
CODE = "give the network's own code with --arch FILE.py:NAME"
# The only activation that the networks read from transformers' names have here; gelu for the other kinds.
ACTIVATIONS = {"resnet": "relu", "regnet": "relu"}
# Whether the first stage lowers the resolution, where a config does not say.
FIRST_STAGE_LOWERS = {"resnet": False, "regnet": True}
# transformers' epsilon of layer norms, of all of them or of the last alone, where a config does not say: that of
# google/vit-base-patch16-224 and facebook/convnext-tiny-224.
EPSILON = {"vit": (1e-12, ""), "convnext": (1e-12, "classifier.0"), "convnextv2": (1e-12, "head.norm")}


def identify(
    shapes: Mapping[str, Shape], arch: str | None, config: Mapping[str, Any] | None, kind: str = "auto"
) -> tuple[list[Match], list[str]]:
    """The networks that fit, the likeliest first, and what to warn of. `arch`: the user's word, above any claim.

    `kind`: classifier, encoder, or auto, where only what is no classifier is tried as an encoder; the online probe of a
    file of self-supervision makes no classifier. What is nothing known is tried under the prefix that most names have.
    """
    coded = arch is not None and ":" in arch and not arch.startswith("timm:")
    try:
        return as_named(shapes, arch, config, kind)
    except (Refused, UsageError) as error:
        if (coded and isinstance(error, UsageError)) or (
            not coded and (kind == "encoder" or encoders.is_half(shapes))
        ):
            raise
        # A prefix of nobody's makes no encoder of a trunk: its head may lie outside.
        within = kind if coded else "classifier"
        with suppress(Refused, UsageError):
            found, notes = behind_prefix(shapes, lambda own: as_named(own, arch, config, within))
            if found:
                return found, notes
        raise


def as_named(
    shapes: Mapping[str, Shape], arch: str | None, config: Mapping[str, Any] | None, kind: str
) -> tuple[list[Match], list[str]]:
    """`identify` under the names that the file has, without known wrappers."""
    if kind == "classifier":
        return classifiers(shapes, arch, config)
    if kind == "encoder":
        return as_encoders(shapes, arch, config)
    coded = arch is not None and ":" in arch
    if not coded and encoders.is_pretraining(shapes):
        with suppress(Refused):
            return named_encoders(shapes, arch, config), []
    try:
        found = classifiers(shapes, arch, config)
        if coded and gives_features(found[0][0].arch):
            made, notes = as_encoders(shapes, arch, config)
            return made, [*notes, NO_HEAD.format(made[0].arch.width)]
        return found
    except (Refused, UsageError) as error:
        if coded:
            raise
        try:
            return named_encoders(shapes, arch, config), []
        except Refused as other:
            if arch is None and encoders.is_half(shapes):
                raise other from None
        raise error from None


def gives_features(arch: Arch) -> bool:
    """Whether the last layer with weights of a user's network is no head: it gives maps or tokens, or a norm follows.

    A head of maps, as SqueezeNet has one, is a convolution of single pixels.
    """
    events, _, _ = watch(arch.build, arch.input)
    last, head = submodule(arch, arch.head), events.get(arch.head)
    if head is None or not isinstance(last, nn.Linear | nn.Conv2d):
        return False
    norms = {name for name, module in arch.build().named_modules() if isinstance(module, NORMS)}
    if any(event.begin > head.end for name, event in events.items() if name in norms):
        return True
    return len(head.shape) != 2 if isinstance(last, nn.Linear) else last.kernel_size != (1, 1)


def named_encoders(
    shapes: Mapping[str, Shape], arch: str | None, config: Mapping[str, Any] | None, heads: bool = False
) -> list[Match]:
    """The encoders that fit; only the one that `arch` names. `heads`: a classifier's head is set aside, too."""
    claim = config or {}
    if arch is not None and arch.startswith("timm:"):
        return [timm_encoder(arch.removeprefix("timm:"), shapes, claim)]
    name = timm_name(claim)
    if arch is None and name is not None and claim.get("num_classes") == 0 and timm_models.registered(name):
        with suppress(Refused):
            return [timm_encoder(name, shapes, claim)]
    found = encoders.recognise(shapes, config, heads)
    if arch is None:
        return found
    chosen = [m for m in found if m.arch.name == arch.lower()]
    if not chosen:
        names = ", ".join(m.arch.name for m in found[:4])
        raise Refused(f"{shown(arch)} does not have these {len(shapes)} tensors: they fit {names}.")
    return chosen


def timm_encoder(name: str, shapes: Mapping[str, Shape], claim: Mapping[str, Any]) -> Match:
    """timm's network without a head."""
    match = timm_models.fit_timm(name, shapes, {**claim, "num_classes": 0})
    return replace(match, arch=replace(match.arch, layout="timm"))


def as_encoders(
    shapes: Mapping[str, Shape], arch: str | None, config: Mapping[str, Any] | None
) -> tuple[list[Match], list[str]]:
    """The encoders that a file holds, a classifier's trunk among them; user code gives the features itself."""
    if arch is not None and ":" in arch and not arch.startswith("timm:"):
        match = recognition.recognise_as(shapes, arch)[0]
        size, name = match.arch.input, match.arch.name
        made = describe_encoder(name, match.arch.build, size, "what the code returns")
        return [replace(match, arch=replace(made, layout="the user's code"))], []
    if not encoders.is_pretraining(shapes):
        try:
            found, notes = classifiers(shapes, arch, config)
        except (Refused, UsageError):
            pass
        else:
            return [trunk(m) for m in found if m.arch.kind == "classifier"] or found, notes
    return named_encoders(shapes, arch, config, heads=True), []


def trunk(match: Match) -> Match:
    """The encoder that a classifier is without its head, whose tensors stay in the file as they are."""
    try:
        arch = headless(match.arch)
    except ValueError as error:
        raise Refused(f"{match.arch.name} has no encoder: {error}.") from None
    head = f"{match.arch.head}."
    names = {name: to for name, to in match.names.items() if not to.startswith(head)}
    unread = tuple(name for name in match.names if name not in names)
    parts = {name: part for name, part in match.parts.items() if name in names}
    arch = replace(arch, layout="a classifier without its head", usual_preprocess="")
    return Match(arch, names, match.unread + unread, parts)


def classifiers(
    shapes: Mapping[str, Shape], arch: str | None, config: Mapping[str, Any] | None
) -> tuple[list[Match], list[str]]:
    """The classifiers that fit; timm's encoders, too, where a config of its own says that one has no classes."""
    claim = config or {}
    if arch is not None and arch.startswith("timm:"):
        return [timm_models.fit_timm(arch.removeprefix("timm:"), shapes, claim)], []
    if arch is not None and ":" in arch:
        return recognition.recognise_as(shapes, arch), []
    found = translated(shapes, arch, claim)
    if found is not None:
        return found
    name = timm_name(claim)
    if arch is None and name is not None:
        if claim.get("num_classes") == 0:
            raise Refused("config.json says num_classes 0, an encoder: it has no classes to tell apart.")
        return claimed_by_timm(name, shapes, claim)
    try:
        return recognition.recognise_as(shapes, arch), []
    except Refused as error:
        kind = claim.get("model_type")
        if arch is None and isinstance(kind, str) and kind not in (*TABLES, "timm_wrapper"):
            known_kinds = ", ".join(TABLES)
            raise Refused(
                f"config.json says model_type {shown(kind)}; of transformers' networks {known_kinds} are known: "
                f"{CODE}."
            ) from None
        raise error


def timm_name(claim: Mapping[str, Any]) -> str | None:
    """The network that a timm config names, without the tag of its weights."""
    name = claim.get("architecture")
    return name.split(".")[0] if isinstance(name, str) and timm_models.NAME.fullmatch(name) else None


def claimed_by_timm(
    name: str, shapes: Mapping[str, Shape], claim: Mapping[str, Any]
) -> tuple[list[Match], list[str]]:
    """timm's network if it fits, then those known here that fit as well and compute something else."""
    refusal: Refused | None = None
    first: Match | None = None
    if timm_models.registered(name):
        try:
            first = timm_models.fit_timm(name, shapes, claim)
        except Refused as error:
            refusal = error
    try:
        others = recognition.recognise(shapes)
    except Refused as error:
        if first is not None:
            return [first], []
        if timm_models.timm_module() is None:
            raise Refused(
                f"config.json says that this is timm's {name}: {timm_models.INSTALL}, then run again."
            ) from None
        raise refusal or error from None
    if first is None:
        if others[0].arch.name == name:
            return others[:1], []
        if timm_models.timm_module() is None:
            raise Refused(
                f"config.json says that this is timm's {name}, and the tensors also fit {others[0].arch.name}: "
                f"{timm_models.INSTALL}, or pass --arch."
            )
        return others, [f"config.json says {name}, which does not have these tensors: it was not believed."]
    # The other networks with these tensors that are known here differ in ways that a config which names its builder
    # does not leave open.
    kin = [m for m in others[:1] if m.names == first.names and not same_function(m.arch, first.arch)]
    if kin:
        rest = tuple((m.arch.name, "fits the same tensors; config.json says another") for m in kin)
        first = replace(first, arch=replace(first.arch, alternatives=rest))
    return [first, *kin], []


def accepts(arch: Arch, size: tuple[int, int]) -> bool:
    """Whether the network runs on images of this height and width."""
    if size == arch.input[1:]:
        return True
    try:
        watch(arch.build, (arch.input[0], *size))
    except Exception:  # a network may refuse a size in any way
        return False
    return True


def same_function(one: Arch, other: Arch) -> bool:
    """Whether two networks give the same logits with the same weights, on noise at the smaller usual size."""
    side = min(one.input[1], other.input[1])
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        first, second = one.build().eval(), other.build().eval()
        for tensor in first.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.3) if tensor.ndim < 2 else tensor.normal_(0, tensor[0].numel() ** -0.5)
        try:
            second.load_state_dict(first.state_dict())
            x = torch.randn(1, one.input[0], side, side)
            a, b = first(x), second(x)
        except (RuntimeError, AssertionError, ValueError):
            return False
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max() + 1)))


# --- Hugging Face transformers ------------------------------------------------------------------------------


def translated(
    shapes: Mapping[str, Shape], arch: str | None, claim: Mapping[str, Any]
) -> tuple[list[Match], list[str]] | None:
    """The networks that have these tensors under transformers' names; None where the names are not transformers'."""
    for short, unread in views(shapes):
        there = translate({new: tuple(shapes[old]) for old, new in short.items()})
        if there is None:
            continue
        found = known(there, arch)
        own = claim if claim.get("model_type", there.kind) == there.kind else {}
        notes = []
        if own is not claim:
            notes.append(f"config.json says {shown(claim['model_type'])}, the names are {there.kind}'s.")
        # What the user says is above any claim.
        found = settle(found, there.kind, own if arch is None else {})
        return [back(m, short, unread, there) for m in found], notes
    return None


def known(there: Translation, arch: str | None) -> list[Match]:
    """The networks for names that were translated."""
    if there.kind != "convnextv2":
        found = recognition.recognise_as(there.shapes, arch)
        if found[0].unread:
            raise Refused(f"{shown(found[0].unread[0])} is not part of a {there.kind} that is known: {CODE}.")
        return found
    rgb, channels = as_rgb(there.shapes)
    proposal = timm_models.convnextv2(rgb)
    differing = ["its stages or its head are not whole"]
    if proposal is not None:
        proposal = with_channels(proposal, channels)
        try:
            network, expected = timm_models.on_meta(proposal.build)
        except Exception as error:  # a builder may refuse numbers in any way
            raise Refused(f"no ConvNeXt V2 has these numbers ({shown(error)}): {CODE}.") from None
        differing = differences(there.shapes, expected)
        if not differing:
            check_readable(f"this {proposal.name}", channels)
            made = describe(proposal.name, proposal.build, proposal.input, (), network)
            return [Match(made, {name: name for name in there.shapes}, ())]
    raise Refused(f"these {len(there.shapes)} tensors are no ConvNeXt V2 ({listed(differing)}): {CODE}.")


def settle(found: list[Match], kind: str, claim: Mapping[str, Any]) -> list[Match]:
    """The candidates that the claim allows, with its epsilon; raises Refused for what is not built here."""
    activation = claim.get("hidden_act", ACTIVATIONS.get(kind, "gelu"))
    if activation != ACTIVATIONS.get(kind, "gelu"):
        usual_one = ACTIVATIONS.get(kind, "gelu")
        raise Refused(
            f"config.json says hidden_act {shown(activation)}; only {usual_one} is known for {kind}: {CODE}."
        )
    lowers = claim.get("downsample_in_first_stage")
    if kind in FIRST_STAGE_LOWERS and isinstance(lowers, bool) and lowers != FIRST_STAGE_LOWERS[kind]:
        found = [with_first_stride(m, kind, 2 if lowers else 1) for m in found]
    if claim.get("model_type") == kind:
        found = [chosen(found, kind, claim)]
    side = claim.get("image_size")
    if kind != "vit" and isinstance(side, int) and 32 <= side <= 2048:
        # A transformer's position embedding shows it; for the others it is what the network was trained at.
        found = [replace(m, arch=replace(m.arch, input=(m.arch.input[0], side, side))) for m in found]
    if kind not in EPSILON:
        return found
    usual, last = EPSILON[kind]
    value = claim.get("layer_norm_eps", usual)
    if not isinstance(value, float) or not 0 < value < 0.1:
        value = usual
    return [replace(m, arch=replace(m.arch, build=with_epsilon(m.arch.build, value, last))) for m in found]


def with_first_stride(match: Match, kind: str, stride: int) -> Match:
    """The network with this stride in its first stage, which shapes show only where that changes no width."""
    arch = match.arch
    if kind == "regnet":
        block, strided, shortcut = "trunk_output.block1.block1-0", "f.b.0", "proj.0"
    else:
        inner = "layer1.0.conv3.weight" in match.names.values() and "stride1x1" not in arch.name
        block, strided, shortcut = "layer1.0", "conv2" if inner else "conv1", "downsample.0"
    places = [f"{block}.{place}" for place in (strided, shortcut)]
    places = [place for place in places if f"{place}.weight" in match.names.values()]
    build = partial(restrided, arch.build, places, stride)
    made = describe(arch.name, build, arch.input, arch.alternatives)
    return replace(match, arch=replace(made, unusual=arch.unusual))


def restrided(build: Callable[[], nn.Module], places: Sequence[str], stride: int) -> nn.Module:
    """The network with this stride in the convolutions at `places`."""
    network = build()
    for place in places:
        convolution = network.get_submodule(place)
        assert isinstance(convolution, nn.Conv2d)
        convolution.stride = (stride, stride)
    return network


def chosen(found: list[Match], kind: str, claim: Mapping[str, Any]) -> Match:
    """The candidate that the claim names; the others stay among its alternatives."""
    if kind == "resnet":
        first_convolution = claim.get("downsample_in_bottleneck") is True
        return next((m for m in found if ("stride1x1" in m.arch.name) == first_convolution), found[0])
    heads = claim.get("num_attention_heads")
    if kind == "vit" and isinstance(heads, int):
        for match in found:
            if attention_heads(match.arch) == heads:
                return match
        if (made := with_heads(found[0], heads)) is not None:
            return made
        raise Refused(
            f"config.json says {heads} attention heads, which these tensors do not allow: correct it."
        )
    return found[0]


def with_heads(match: Match, heads: int) -> Match | None:
    """The transformer with this number of heads, more or narrower ones than are tried unasked; None where none fits."""
    arch = match.arch
    with torch.device("meta"):
        first = next(m for m in arch.build().modules() if isinstance(m, nn.MultiheadAttention))
    if heads < 1 or first.embed_dim % heads:
        return None

    def build() -> nn.Module:
        network = arch.build()
        for module in network.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.num_heads, module.head_dim = heads, module.embed_dim // heads
        return network

    return replace(match, arch=replace(arch, name=re.sub(r"-h\d+-", f"-h{heads}-", arch.name), build=build))


def attention_heads(arch: Arch) -> int | None:
    """The number of heads of the first attention that says so."""
    with torch.device("meta"):
        network = arch.build()
    return next((int(m.num_heads) for m in network.modules() if isinstance(m, nn.MultiheadAttention)), None)


def back(match: Match, short: dict[str, str], unread: tuple[str, ...], there: Translation) -> Match:
    """The same match for the names that the file has."""
    names: dict[str, str] = {}
    parts: dict[str, Part] = {}
    left = list(unread)
    for name, inner in short.items():
        to = match.names.get(there.names[inner])
        if to is None:
            left.append(name)
            continue
        names[name] = to
        if inner in there.parts:
            parts[name] = there.parts[inner]
    return Match(match.arch, names, tuple(left), parts)
