"""Second copies of a network's tensors in its file: those that are equal stay equal, others are said."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bdclean.files.text import shown
from bdclean.networks.recognition.dialects import AVERAGE, LONGEST, MOST_WRAPPERS, bare, inmost
from bdclean.networks.recognition.matching import Match

# A tensor of fewer numbers, or of one number repeated, may equal another by chance.
TELLING = 16


def copies(
    tensors: Mapping[str, Tensor], types: Mapping[str, str], match: Match
) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """Unread names -> the read tensors that they repeat bit for bit; what to warn of; other copies, as `averages`.

    A group of unread tensors under one wrapper is tied only as a whole: a half of it cleansed would be neither network.
    Another copy, such as a moving average, is left as it is, and said: it may hold the backdoor.
    """
    by_form = {(match_form(tensors[k], types[k])): k for k in match.names if tells(tensors[k])}
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name in match.unread:
        twin = by_form.get(match_form(tensors[name], types[name])) if tells(tensors[name]) else None
        if twin is not None and same(tensors[name], tensors[twin]):
            ending = common_ending(name, twin)
            key = (name.removesuffix(ending), twin.removesuffix(ending))
            groups.setdefault(key, {})[name] = twin
    tied: dict[str, str] = {}
    for (prefix, other), found in groups.items():
        whole = dict(found)
        for name in match.unread:
            if not name.startswith(prefix) or name in found:
                continue
            twin = other + name[len(prefix) :]
            if twin not in match.names:
                continue
            if types[twin] != types[name] or not same(tensors[name], tensors[twin]):
                break
            whole[name] = twin
        else:
            tied |= whole
    warnings = []
    if tied:
        warnings.append(
            f"{len(tied)} tensors are copies of others ({shown(min(tied))}, ...): they stay equal."
        )
    others = averages(tensors, match, tied)
    return tied, [*warnings, *others.values()], others


def averages(tensors: Mapping[str, Tensor], match: Match, tied: Mapping[str, str]) -> dict[str, str]:
    """Prefix -> a warning, where unread tensors are the network once more, with other values, under whatever prefix."""
    # An encoder's own holder (`encoder_q`) may be none that wraps classifiers.
    common = holder(match.names)
    reading = {inmost(k.removeprefix(common)): tensors[k].shape for k in match.names if tensors[k].ndim > 1}
    endings = {name.rpartition(".")[2] for name in reading}
    groups: dict[str, set[str]] = {}
    for name in match.unread:
        if (
            name in tied
            or tensors[name].ndim < 2
            or len(name) > LONGEST
            or name.rpartition(".")[2] not in endings
        ):
            continue
        parts = inmost(name).split(".")
        for cut in range(min(len(parts), MOST_WRAPPERS)):
            inner = ".".join(parts[cut:])
            if reading.get(inner) == tensors[name].shape:
                groups.setdefault(name.removesuffix(inner), set()).add(inner)
                break
    wrapper, again = max(groups.items(), key=lambda group: len(group[1]), default=("", set()))
    if len(again) * 2 <= len(reading):
        return {}
    words = ("teacher", "momentum", "encoder_k", "target", "model_t", "backbone_k")
    average = AVERAGE.match(wrapper[:LONGEST]) or bare(wrapper).startswith(words)
    kind = "an average of the weights" if average else "a second copy of the network"
    where = shown(wrapper) if wrapper else "the part of the file without a prefix"
    return {
        where: f"{where} holds {kind} ({len(again)} matrices), which was neither measured nor cleansed: "
        "work on a file of it alone before anybody uses it."
    }


def holder(names: Iterable[str]) -> str:
    """The whole words, up to a point, that all names begin with."""
    first, *rest = names
    common = os.path.commonprefix([first, *rest]) if rest else ""
    return common[: common.rfind(".") + 1]


def tells(tensor: Tensor) -> bool:
    """Whether an equal tensor cannot be so by chance."""
    return tensor.numel() >= TELLING and bool((tensor.reshape(-1)[0] != tensor.reshape(-1)).any())


def match_form(tensor: Tensor, kind: str) -> tuple[object, ...]:
    """Equal for equal tensors, and for few others."""
    flat = tensor.reshape(-1)[:TELLING].contiguous()
    return kind, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    a, b = (
        (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)) if one.numel() else (one, other)
    )
    return torch.equal(a, b)


def common_ending(one: str, other: str) -> str:
    """The longest ending of whole words, between points, that two names share."""
    a, b = one.split("."), other.split(".")
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return ".".join(a[len(a) - count :]) if count else ""
