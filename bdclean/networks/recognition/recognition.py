"""Which network a file's tensors belong to: exact names and shapes after the dialect's renaming, or a refusal."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from bdclean.errors import Refused, UsageError
from bdclean.files.text import shown
from bdclean.networks.arch import COUNTER, Family, Proposal, Shape, Shapes
from bdclean.networks.families import (
    builders,
    clip_resnet,
    convnext,
    densenet,
    imagenet_resnet,
    known,
    maxvit,
    preact,
    regnet,
    residual,
    scaled,
    swin,
    token_transformer,
    vgg,
    vit,
)
from bdclean.networks.recognition.channels import as_rgb, at_usual_size, check_readable, with_channels
from bdclean.networks.recognition.dialects import LONGEST, unwrapped, views
from bdclean.networks.recognition.matching import NO_PART, Match, differences, listed
from bdclean.networks.recognition.replaced_heads import replaced_heads
from bdclean.networks.recognition.user_code import fit_user_code
from bdclean.networks.recognition.variants import at_size, variants
from bdclean.networks.recognition.wrapped import kind_of_tensors
from bdclean.networks.stages import describe

FAMILIES: tuple[Family, ...] = (
    imagenet_resnet,
    residual,
    preact,
    vgg,
    vit,
    swin,
    convnext,
    maxvit,
    regnet,
    densenet,
    builders,
    scaled,
)
# Networks that are mostly found as encoders, and have a head once one was trained on them. None is known by name.
OF_ENCODERS: tuple[Family, ...] = (token_transformer, clip_resnet)
# What names of timm's networks begin with and those of torchvision's and the CIFAR networks' do not.
TIMM = re.compile(r"(?:conv_stem|stem|patch_embed|stages\.\d+|head\.fc|conv1\.0)\.")


def recognise(shapes: Mapping[str, Shape]) -> list[Match]:
    """All networks that have exactly these tensors, the likeliest first.

    Raises Refused, naming the nearest network and what differs.
    """
    found, near = fitting(shapes, (*FAMILIES, *OF_ENCODERS))
    if found:
        return found
    for names in replaced_heads(shapes):
        found, _ = fitting({new: shapes[old] for old, new in names.items()}, (*FAMILIES, *OF_ENCODERS))
        if found:
            return [_by_file_names(match, names) for match in found]
    near += near_misses(shapes)
    raise Refused(refusal(shapes, min(near, key=lambda n: len(n.differing), default=None)))


def _by_file_names(match: Match, names: Mapping[str, str]) -> Match:
    """The match of renamed tensors for the file's own names: file name -> renamed."""
    own = {new: old for old, new in names.items()}
    found = {own[name]: to for name, to in match.names.items()}
    return Match(match.arch, found, tuple(own[name] for name in match.unread))


def fitting(
    shapes: Mapping[str, Shape], families: tuple[Family, ...] = FAMILIES
) -> tuple[list[Match], list[Near]]:
    """The networks of `families` with exactly these tensors, and if there are none, what these were nearest to.

    Raises Refused where a network fits whose images have neither one channel nor three.
    """
    near: list[Near] = []
    for family, renamed, unread in renamings(shapes, families):
        own = {new: tuple(shapes[name]) for name, new in renamed.items()}
        rgb, channels = as_rgb(own)
        for for_rgb in family.propose(rgb):
            proposal = with_channels(for_rgb, channels)
            found = build_shapes(proposal)
            if found is None:
                continue
            network, expected = found
            idle = {name for name in own if name.startswith(proposal.idle)} if proposal.idle else set()
            differing = differences(own, expected | (idle_shapes(proposal) if idle else {}))
            if not differing:
                check_readable(f"this {proposal.name}", channels)
                read = {name: new for name, new in renamed.items() if new not in idle}
                aside = tuple(name for name, new in renamed.items() if new in idle)
                # Tensors can be those of a network whose layers do not fit one another.
                try:
                    return matches(at_usual_size(proposal, network), network, read, unread + aside), []
                except (RuntimeError, ValueError):
                    differing = ["it cannot be run on images: its layers do not fit one another"]
            near.append(Near.of_shapes(proposal.name, differing, own, expected))
    return [], near


@dataclass(frozen=True)
class Near:
    """A network that a file's tensors do not fit, and a phrase for each that differs.

    `held`: how many of its `of` tensors the file has as they should be, without batch counters.
    """

    name: str
    differing: list[str]
    held: int = 0
    of: int = 0

    @staticmethod
    def of_shapes(name: str, differing: list[str], own: Shapes, expected: Shapes) -> Near:
        counted = {n: s for n, s in expected.items() if not n.endswith(COUNTER)}
        return Near(name, differing, sum(own.get(n) == s for n, s in counted.items()), len(counted))


def renamings(
    shapes: Mapping[str, Shape], families: tuple[Family, ...] = FAMILIES
) -> Iterator[tuple[Family, dict[str, str], tuple[str, ...]]]:
    """Each family's names for a file's tensors, without wrappers, and what is left unread."""
    for names, unread in views(shapes):
        for family in families:
            renamed = {name: family.rename(short) for name, short in names.items()}
            if len(set(renamed.values())) == len(renamed):
                yield family, renamed, unread


def near_misses(shapes: Mapping[str, Shape], only: str | None = None) -> Iterator[Near]:
    """How a file's tensors differ from the nearest known networks (or from `only`), by the shipped fingerprint."""
    tried = set()
    for family, renamed, _ in renamings(shapes):
        own = {new: tuple(shapes[name]) for name, new in renamed.items()}
        rgb, channels = as_rgb(own)
        for name in [only] if only else [row.name for row in known.nearest(rgb)]:
            proposal = named(family, name, classes_of(own))
            found = build_shapes(with_channels(proposal, channels)) if proposal is not None else None
            if found is None or (name, frozenset(own)) in tried:
                continue
            tried.add((name, frozenset(own)))
            expected = found[1]
            common = sum(n in expected for n in own)
            if only or common * 2 >= len(own.keys() | expected.keys()):
                yield Near.of_shapes(name, differences(own, expected), own, expected)


def classes_of(shapes: Mapping[str, Shape]) -> int:
    """The rows of what is likeliest the head: a tensor with a known head's name, else the last matrix."""
    heads = {name for row in known.table() for name in row.head}
    rows = [s[0] for n, s in shapes.items() if len(s) == 2 and n.endswith("weight")]
    rows += [s[0] for n, s in shapes.items() if s and n in heads]
    return max(1, min(rows[-1], 100_000)) if rows else 10


def named(family: Family, name: str, classes: int) -> Proposal | None:
    """The family's network of this name."""
    return next((p for p in family.named_proposals(classes) if p.name == name), None)


def well_known(classes: int) -> Iterator[Proposal]:
    """Every named network of every family."""
    for family in FAMILIES:
        yield from family.named_proposals(classes)


def recognise_as(shapes: Mapping[str, Shape], arch: str | None = None) -> list[Match]:
    """The networks that fit; only the one that `arch` names, and user code only where it says FILE.py:NAME."""
    if arch is not None and ":" in arch:
        return [fit_user_code(arch, shapes)]
    if arch is None:
        return recognise(shapes)
    wanted = arch.lower()
    if sized := re.fullmatch(r"(.+)\+(\d{1,4})px", wanted):
        return [replace(m, arch=at_size(m.arch, int(sized[2]))) for m in recognise_as(shapes, sized[1])]
    names = [row.name for row in known.table()]
    try:
        found = recognise(shapes)
    except Refused:
        if wanted not in names:
            raise UsageError(unknown(arch, names)) from None
        differing = [n.differing for n in near_misses(shapes, wanted)]
        what = f" ({listed(min(differing, key=len))})" if differing else ""
        raise Refused(f"{wanted} does not have these {len(shapes)} tensors{what}.") from None
    chosen = [m for m in found if m.arch.name == wanted]
    if not chosen:
        fitting = [m.arch.name for m in found]
        if wanted not in names:
            raise UsageError(unknown(arch, fitting + names))
        raise Refused(f"{wanted} does not have these {len(shapes)} tensors: they fit {', '.join(fitting)}.")
    # The user has said which it is: the others are no candidates any more.
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
    except (
        ValueError, RuntimeError, ZeroDivisionError, TypeError, OverflowError, AssertionError, UserWarning,
    ):  # fmt: skip
        return None
    return network, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def idle_shapes(proposal: Proposal) -> Shapes:
    """Shapes of the auxiliary heads' tensors."""
    assert proposal.whole is not None
    found = build_shapes(replace(proposal, build=proposal.whole))
    assert found is not None
    return {name: shape for name, shape in found[1].items() if name.startswith(proposal.idle)}


def matches(
    proposal: Proposal, network: torch.nn.Module, names: dict[str, str], unread: tuple[str, ...]
) -> list[Match]:
    """The proposal and the other networks with its tensors, which differ in no module that holds weights."""
    same_tensors = (*proposal.others, *variants(proposal, network))
    others = tuple((p.name, reason) for p, reason in same_tensors if not p.unusual)
    first = describe(proposal.name, proposal.build, proposal.input, others, network)
    found = [Match(first, names, unread)]
    kin = (proposal.name, f"the usual reading of the same tensors ({proposal.name})")
    for other, _ in same_tensors:
        rest = tuple((p.name, r) for p, r in same_tensors if p is not other and not p.unusual)
        arch = replace(
            first,
            name=other.name,
            build=other.build,
            input=other.input,
            alternatives=(kin, *rest),
            unusual=other.unusual,
        )
        found.append(Match(arch, names, unread))
    return found


def refusal(names: Collection[str], nearest: Near | None) -> str:
    """The sentence that refuses a file with tensors of these `names`."""
    count = len(names)
    tensors = f"these {count} tensors" if count != 1 else "this 1 tensor"
    advice = "give the network's own code with --arch FILE.py:NAME"
    if any(TIMM.match(unwrapped(name[:LONGEST])) for name in names):
        advice += ", or --arch timm:NAME if timm made it"
    kind = kind_of_tensors(names)
    if kind is not None:
        tensors, advice = f"{tensors} ({kind[0]})", kind[1]
    if nearest is None:
        return f"no known architecture has {tensors}, nor anything like them: {advice}."
    near = f"nearest is {nearest.name} ({listed(nearest.differing)})"
    more = [phrase.removesuffix(NO_PART) for phrase in nearest.differing if phrase.endswith(NO_PART)]
    if nearest.held == nearest.of and len(more) == len(nearest.differing):
        some = ", ".join(more[:3]) + (", ..." if len(more) > 3 else "")
        near = f"the file has all {nearest.of} of {nearest.name}, and {len(more)} more ({some})"
    elif nearest.held:
        near += f", of whose {nearest.of} tensors it has {nearest.held}"
    return f"no known architecture has {tensors}; {near}: {advice}."
