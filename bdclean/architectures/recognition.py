"""Which network a file's tensors belong to: exact names and shapes after the dialect's renaming, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bdclean.architectures import imagenet_resnet, preact, residual, vgg
from bdclean.architectures.arch import Family, Proposal, Shape, Shapes
from bdclean.architectures.dialects import views
from bdclean.architectures.matching import Match, differences, shown
from bdclean.architectures.staging import describe
from bdclean.architectures.user_code import fit_user_code
from bdclean.errors import Refused

FAMILIES: tuple[Family, ...] = (imagenet_resnet, residual, preact, vgg)


def recognise(shapes: Mapping[str, Shape]) -> list[Match]:
    """All networks that have exactly these tensors, the likeliest first.

    Raises Refused, naming the nearest network and what differs.
    """
    nearest: tuple[int, str, list[str]] | None = None
    for names, unread in views(shapes):
        for family in FAMILIES:
            renamed = {name: family.rename(short) for name, short in names.items()}
            if len(set(renamed.values())) < len(renamed):
                continue
            own = {renamed[name]: tuple(shapes[name]) for name in names}
            for proposal in family.propose(own):
                found = build_shapes(proposal)
                if found is None:
                    continue
                network, expected = found
                differing = differences(own, expected)
                if not differing:
                    return matches(proposal, network, renamed, unread)
                if nearest is None or len(differing) < nearest[0]:
                    nearest = (len(differing), proposal.name, differing)
    raise Refused(refusal(len(shapes), nearest))


def identify(shapes: Mapping[str, Shape], arch: str | None = None) -> list[Match]:
    """The networks that fit, `arch` first where one is named; user code only where `arch` says FILE.py:NAME."""
    if arch is not None and ":" in arch and not arch.startswith("torchvision:"):
        return [fit_user_code(arch, shapes)]
    found = recognise(shapes)
    if arch is None:
        return found
    wanted = arch.removeprefix("torchvision:").lower()
    chosen = [m for m in found if m.arch.name == wanted]
    if not chosen:
        fitting = ", ".join(m.arch.name for m in found)
        raise Refused(f"these {len(shapes)} tensors are not those of {shown(arch)}: they fit {fitting}.")
    return chosen + [m for m in found if m is not chosen[0]]


def build_shapes(proposal: Proposal) -> tuple[torch.nn.Module, Shapes] | None:
    """The network on the meta device and its tensors' shapes; None when no network has such numbers."""
    try:
        with torch.device("meta"):
            network = proposal.build()
    except (ValueError, RuntimeError, ZeroDivisionError, TypeError, OverflowError):
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


def refusal(count: int, nearest: tuple[int, str, list[str]] | None) -> str:
    """The sentence that refuses a file of `count` tensors."""
    tensors = f"{count} tensor{'s' if count != 1 else ''}"
    advice = "give the network's own code with --arch FILE.py:NAME"
    if nearest is None:
        return f"no known architecture has these {tensors}, nor anything like them: {advice}."
    number, name, differing = nearest
    listed = "; ".join(differing[:3]) + ("; ..." if number > 3 else "")
    return (
        f"no known architecture has these {tensors}; "
        f"nearest is {name} ({number} differ{'s' if number == 1 else ''}: {listed}): {advice}."
    )
