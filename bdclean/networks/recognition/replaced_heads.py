"""Heads that were replaced: the last linear layer stands at another place of its module than in the known network.

`model.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 10))` makes `fc.1.weight` of `fc.weight`, and `model.classifier =
nn.Linear(1280, 10)` makes `classifier.weight` of `classifier.1.weight`. What stands before the layer and has no weights
is taken for dropout, which does nothing when the network is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from bdclean.networks.arch import Shape
from bdclean.networks.recognition.dialects import LONGEST, inmost

HEAD = re.compile(
    r"(?P<outer>(?:.+?\.)??)(?P<word>fc|linear|heads?|classifier)(?P<inner>(?:\.(?:\d+|head|fc))*)\.weight"
)
# Where in such a module networks that are known have their last layer, beside the places above that of the file.
PLACES = {"heads": (".head",), "classifier": (".1", ".2", ".3", ".6")}


def replaced_heads(shapes: Mapping[str, Shape]) -> Iterator[dict[str, str]]:
    """The file's names, with the head's linear layer at each place where a known network may have it."""
    last: dict[tuple[str, str], str] = {}
    for name in shapes:
        match = HEAD.fullmatch(name[:LONGEST])
        if match and len(shapes[name]) == 2 and inmost(f"{match['outer']}x") == "x":
            last[match["outer"], match["word"]] = match["inner"]
    for (outer, word), inner in last.items():
        parts = inner.split(".")
        above = [".".join(parts[:k]) for k in range(len(parts) - 1, 0, -1)]
        for place in (*above, *PLACES.get(word, ())):
            old, new = f"{outer}{word}{inner}.", f"{outer}{word}{place}."
            names = {n: new + n.removeprefix(old) if n.startswith(old) else n for n in shapes}
            if place != inner and len(set(names.values())) == len(names):
                yield names
