"""Networks under a prefix that nobody is known to use: tried where a file is nothing known as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from bdclean.files.text import shown
from bdclean.networks.arch import Shape
from bdclean.networks.recognition.dialects import BESIDE, LONGEST, unwrapped
from bdclean.networks.recognition.matching import Match


def behind_prefix(
    shapes: Mapping[str, Shape], find: Callable[[dict[str, Shape]], tuple[list[Match], list[str]]]
) -> tuple[list[Match], list[str]]:
    """What `find` makes of the tensors under the prefix that most have; nothing where there is none.

    A match is dropped where a matrix outside may read its answers: its last layer is not the network's. Raises what
    `find` raises.
    """
    prefix = most_common_prefix(shapes)
    if not prefix:
        return [], []
    inner = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    outside = tuple(name for name in shapes if not name.startswith(prefix))
    foreign = [name for name in outside if not BESIDE.match(name[:LONGEST])]
    found, notes = find(inner)
    columns = {shapes[name][1] for name in foreign if len(shapes[name]) == 2}
    kept = [under(prefix, match, outside) for match in found if match.arch.classes not in columns]
    if foreign:
        some = ", ".join(shown(name) for name in foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        notes = [*notes, f"the network is what lies under {shown(prefix)}; taken for no part of it: {some}."]
    return kept, notes


def most_common_prefix(names: Iterable[str]) -> str:
    """The first word, after known wrappers, that more than half of the names share, what lies beside left out."""
    own = [name for name in names if not BESIDE.match(unwrapped(name[:LONGEST]))]
    prefixes = Counter(prefix for name in own if (prefix := first_words(name)))
    prefix, count = next(iter(prefixes.most_common(1)), ("", 0))
    return prefix if count * 2 > len(own) else ""


def first_words(name: str) -> str:
    """`module.clf.` of `module.clf.conv1.weight`; empty where nothing but a tensor's own name is left."""
    short = unwrapped(name[:LONGEST])
    if len(name) > LONGEST or "." not in short or not name.endswith(short):
        return ""
    return name.removesuffix(short) + short.partition(".")[0] + "."


def under(prefix: str, match: Match, outside: tuple[str, ...]) -> Match:
    """The match of tensors without `prefix`, for the names that the file has."""
    return replace(
        match,
        names={prefix + name: to for name, to in match.names.items()},
        unread=tuple(prefix + name for name in match.unread) + outside,
        parts={prefix + name: part for name, part in match.parts.items()},
    )
