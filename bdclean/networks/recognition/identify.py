"""Recognition with what a `config.json` beside the weights says: a claim, held to names, shapes and statistics.

A claim may name the builder (timm) or settle what shapes do not show (heads, strides). It is taken only where its
network has exactly the file's tensors; a network known here that has them, too, and computes something else stays a
candidate, which real images must part.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bdclean.errors import Refused, UsageError
from bdclean.files.text import shown
from bdclean.networks.arch import Arch, Shape
from bdclean.networks.encoder import headless, submodule
from bdclean.networks.recognition import encoders, recognition, timm_models
from bdclean.networks.recognition.matching import Match
from bdclean.networks.recognition.prefixed import behind_prefix
from bdclean.networks.recognition.transformers_models import CODE, translated
from bdclean.networks.recognition.transformers_names import TABLES
from bdclean.networks.stages import describe_encoder, watch

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
NO_HEAD = (
    "the code's network ends without a head of classes: it is read as an encoder of {} features (--kind classifier "
    "says otherwise)."
)


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
