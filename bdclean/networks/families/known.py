"""The shipped table of known networks: enough of their tensors' names and shapes to find one without building any.

`python -m bdclean.bench known_networks` writes it anew from the installed torchvision and bdclean's own families;
with `--check` it only says what differs. Reading it needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bdclean.networks.arch import COUNTER

FILE = Path(__file__).with_suffix(".json")

Shape = tuple[int, ...]
# A number of classes that is no width of any network, so that every dimension of this size is the head's.
CLASSES = 1009
# Tensors that a sketch keeps: of two files' sketches, the share in common tells how much of the files is.
KEPT = 48


@dataclass(frozen=True)
class Known:
    """A known network. `head`: its tensors whose first dimension is the class count; `parameters`: without those.

    `idle`: beginnings of the names of auxiliary heads, which a file may have. `digest`: of all names and shapes
    but those and batch counters. `sketch`: the least hashes of name and shape of single tensors, in 8 digits each.
    """

    name: str
    source: str
    parameters: int
    tensors: int
    input: int
    head: tuple[str, ...]
    idle: tuple[str, ...]
    digest: str
    sketch: str


@lru_cache(maxsize=1)
def table() -> tuple[Known, ...]:
    """All known networks, as shipped."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(Known(**row | {"head": tuple(row["head"]), "idle": tuple(row["idle"])}) for row in rows)


def digest(shapes: Mapping[str, Shape], head: Iterable[str], idle: Iterable[str] = ()) -> str:
    """16 hexadecimal digits of all names and shapes; the first dimension of `head`'s is left open."""
    whole = hashlib.sha256()
    open_ended, unused = set(head), tuple(idle)
    for name in sorted(shapes):
        if not name.endswith(COUNTER) and not name.startswith(unused):
            whole.update(line(name, shapes[name], name in open_ended).encode())
    return whole.hexdigest()[:16]


def line(name: str, shape: Shape, open_ended: bool) -> str:
    """`fc.weight:C,512`: one tensor as it enters a digest."""
    sizes = [str(n) for n in shape]
    return f"{name}:{','.join(['C', *sizes[1:]] if open_ended and sizes else sizes)}\n"


def sketch(shapes: Mapping[str, Shape], head: Iterable[str] = ()) -> frozenset[str]:
    """The KEPT least hashes of the tensors' names and shapes, without `head`."""
    left_out = set(head)
    hashes = {
        hashlib.sha256(line(name, shape, False).encode()).hexdigest()[:8]
        for name, shape in shapes.items()
        if name not in left_out and not name.endswith(COUNTER)
    }
    return frozenset(sorted(hashes)[:KEPT])


def find(shapes: Mapping[str, Shape]) -> list[Known]:
    """The known networks that have exactly these names and shapes, with any class count."""
    found, digests = [], {}
    for known in table():
        way = (known.head, known.idle)
        if way not in digests:
            counts = {shapes[name][:1] for name in known.head if name in shapes}
            whole = len(counts) == 1 and all(name in shapes for name in known.head)
            digests[way] = digest(shapes, *way) if whole else ""
        if digests[way] == known.digest:
            found.append(known)
    return found


def nearest(shapes: Mapping[str, Shape], count: int = 3) -> list[Known]:
    """The known networks that share most tensors with these, best first; none that shares nothing."""
    own = sketch(shapes)
    scored = []
    for k, known in enumerate(table()):
        theirs = {known.sketch[i : i + 8] for i in range(0, len(known.sketch), 8)}
        # The least hashes of both together are a sample of the union.
        sample = sorted(own | theirs)[:KEPT]
        common = sum(h in own and h in theirs for h in sample) / max(1, len(sample))
        # Of networks that share nothing more than a few, the nearer size wins.
        scored.append((-common, abs(known.tensors - len(shapes)), k, known))
    return [known for common, _, _, known in sorted(scored)[:count] if common < 0]


def written(rows: list[dict]) -> str:
    """The file's text: one network a line, so that a change shows as one."""
    return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n"
