"""Which network a file's tensors belong to: exact names and shapes after the dialect's renaming, or a refusal."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from bdclean.architectures import imagenet_resnet, preact, residual, vgg
from bdclean.architectures.arch import Family, Proposal, Shape, Shapes
from bdclean.architectures.dialects import views
from bdclean.architectures.matching import Match, differences, listed, shown
from bdclean.architectures.staging import describe
from bdclean.architectures.user_code import fit_user_code
from bdclean.errors import Refused, UsageError

FAMILIES: tuple[Family, ...] = (imagenet_resnet, residual, preact, vgg)


def recognise(shapes: Mapping[str, Shape]) -> list[Match]:
    """All networks that have exactly these tensors, the likeliest first.

    Raises Refused, naming the nearest network and what differs.
    """
    near: list[Near] = []
    for family, renamed, unread in readings(shapes):
        own = {new: tuple(shapes[name]) for name, new in renamed.items()}
        for proposal in family.propose(own):
            found = build_shapes(proposal)
            if found is None:
                continue
            network, expected = found
            differing = differences(own, expected)
            if not differing:
                return matches(proposal, network, renamed, unread)
            near.append(Near(proposal.name, differing))
    near += compare(shapes)
    raise Refused(refusal(len(shapes), min(near, key=lambda n: len(n.differing), default=None)))


@dataclass(frozen=True)
class Near:
    """A network that a file's tensors do not fit, and a phrase for each that differs."""

    name: str
    differing: list[str]


def readings(shapes: Mapping[str, Shape]) -> Iterator[tuple[Family, dict[str, str], tuple[str, ...]]]:
    """Each family's names for a file's tensors, without wrappers, and what is left unread."""
    for names, unread in views(shapes):
        for family in FAMILIES:
            renamed = {name: family.rename(short) for name, short in names.items()}
            if len(set(renamed.values())) == len(renamed):
                yield family, renamed, unread


def compare(shapes: Mapping[str, Shape]) -> Iterator[Near]:
    """How each well-known network differs from a file's tensors, where at least half of the names are the same."""
    rows = [s[0] for n, s in shapes.items() if len(s) == 2 and n.endswith("weight")]
    classes = max(1, min(rows[-1], 100_000)) if rows else 10
    for family, renamed, _ in readings(shapes):
        own = {new: tuple(shapes[name]) for name, new in renamed.items()}
        for name, expected in well_known(FAMILIES.index(family), classes).items():
            if len(own.keys() & expected.keys()) * 2 >= len(own.keys() | expected.keys()):
                yield Near(name, differences(own, expected))


@lru_cache(maxsize=16)
def well_known(family: int, classes: int) -> dict[str, Shapes]:
    """The tensors of a family's named networks; building them takes a quarter of a second."""
    built = ((p.name, build_shapes(p)) for p in FAMILIES[family].named_proposals(classes))
    return {name: found[1] for name, found in built if found is not None}


def identify(shapes: Mapping[str, Shape], arch: str | None = None) -> list[Match]:
    """The networks that fit, `arch` first where one is named; user code only where `arch` says FILE.py:NAME."""
    if arch is not None and ":" in arch and not arch.startswith("torchvision:"):
        return [fit_user_code(arch, shapes)]
    if arch is None:
        return recognise(shapes)
    wanted = arch.removeprefix("torchvision:").lower()
    names = [p.name for family in FAMILIES for p in family.named_proposals(10)]
    try:
        found = recognise(shapes)
    except Refused:
        if wanted not in names:
            raise UsageError(unknown(arch, names)) from None
        differing = [n.differing for n in compare(shapes) if n.name == wanted]
        what = f" ({listed(min(differing, key=len))})" if differing else ""
        raise Refused(f"{wanted} does not have these {len(shapes)} tensors{what}.") from None
    chosen = [m for m in found if m.arch.name == wanted]
    if not chosen:
        fitting = [m.arch.name for m in found]
        if wanted not in names:
            raise UsageError(unknown(arch, fitting + names))
        raise Refused(f"{wanted} does not have these {len(shapes)} tensors: they fit {', '.join(fitting)}.")
    # The user has said which reading it is: the others are no candidates any more.
    return chosen


def unknown(arch: str, names: list[str]) -> str:
    """The sentence for a name that is neither a network's nor the user's own code."""
    near = ", ".join(difflib.get_close_matches(arch.lower(), sorted(set(names)), 3, 0.5))
    hint = f"did you mean {near}?" if near else "see bdclean ls architectures, or give FILE.py:NAME."
    return f"--arch {shown(arch)} is not a known architecture: {hint}"


def build_shapes(proposal: Proposal) -> tuple[torch.nn.Module, Shapes] | None:
    """The network on the meta device and its tensors' shapes; None when no network has such numbers."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # Layers without a single weight are built with a warning.
            warnings.simplefilter("error")
            network = proposal.build()
    except (ValueError, RuntimeError, ZeroDivisionError, TypeError, OverflowError, UserWarning):
        return None
    return network, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def matches(
    proposal: Proposal, network: torch.nn.Module, names: dict[str, str], unread: tuple[str, ...]
) -> list[Match]:
    """The proposal and the other readings of the same tensors."""
    others = tuple((p.name, reason) for p, reason in proposal.others)
    first = describe(proposal.name, proposal.build, proposal.input, others, network)
    found = [Match(first, names, unread)]
    for other, _ in proposal.others:
        rest = tuple((p.name, r) for p, r in proposal.others if p is not other)
        kin = (proposal.name, f"the usual reading of the same tensors ({proposal.name})")
        found.append(Match(describe(other.name, other.build, other.input, (kin, *rest)), names, unread))
    return found


def refusal(count: int, nearest: Near | None) -> str:
    """The sentence that refuses a file of `count` tensors."""
    tensors = f"these {count} tensors" if count != 1 else "this 1 tensor"
    advice = "give the network's own code with --arch FILE.py:NAME"
    if nearest is None:
        return f"no known architecture has {tensors}, nor anything like them: {advice}."
    near = f"nearest is {nearest.name} ({listed(nearest.differing)})"
    return f"no known architecture has {tensors}; {near}: {advice}."
