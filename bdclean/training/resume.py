"""What a stopped run needs to go on: the resume state on disk, as safetensors and JSON."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdclean import ranks
from bdclean.errors import Refused, out_of_memory
from bdclean.files.tensorfile import lay_out, read_header, read_tensors, write_file
from bdclean.files.writing import write_text

SAVE_EVERY_SECONDS = 20.0

KEY = "bdclean.resume"
OTHER = {
    "source_sha256": "from another model",
    "data": "with other images to train on (other files, or another --test)",
    "labeled": "with other labeled images",
}
"""What differs where two digests do: these say nothing to a reader."""


@dataclass
class Position:
    """How far a stage has come: `done` steps, the curve, and the sums of the measures since its last row."""

    stage: str = ""
    done: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    share: float = 1.0
    """Of the schedule's learning rates that is taken, in (0, 1]."""
    good: int = 0
    """The step that is gone back to when steps burst the network; `newest` takes its place at the next row."""
    newest: int = 0


class Saved:
    """Resume state on disk: `PATH` (safetensors) whose metadata is the authority, and a readable JSON copy beside it.

    `arguments` is what must be the same for a resumed run to end in the same weights; where the state on disk was made
    with others, `open` refuses it, naming the difference.
    """

    def __init__(self, path: Path, arguments: Mapping[str, Any]):
        self.path = path
        self.arguments = json.loads(json.dumps(dict(arguments)))
        self.kept: dict[str, Tensor] = {}
        self.position = Position()
        self.tensors: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {}

    @property
    def json_path(self) -> Path:
        return self.path.with_suffix(".json")

    def open(self) -> bool:
        """Read what is on disk. False where nothing is; raises Refused where it is damaged, untrue or another run's."""
        if not self.path.exists():
            return False
        try:
            header = read_header(self.path)
            found = json.loads(header.metadata[KEY])
            tensors, _ = read_tensors(self.path, header)
            theirs, notes = dict(found["arguments"]), dict(found["notes"])
            position = _position(found)
            if found["check"] != _check(tensors):
                raise ValueError("its tensors are not those that were written")
        except Exception as error:
            if out_of_memory(error):
                raise
            what = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
            raise Refused(
                f"the resume state {self.path} cannot be read ({what}): delete it and start anew without --resume."
            ) from error
        difference = _difference(theirs, self.arguments)
        if difference is not None:
            key, old, new = difference
            said = OTHER.get(key) or f"with {key} {_said(old)}, this run has {_said(new)}"
            raise Refused(
                f"the resume state {self.path} was made {said}: "
                "repeat that run's arguments, or start anew without --resume."
            )
        self.position, self.notes = position, notes
        # cloned, so that what is kept does not hold on to the whole file's memory
        self.kept = {name[5:]: tensor.clone() for name, tensor in tensors.items() if name.startswith("kept.")}
        self.tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("kept.")}
        return True

    def discard(self) -> None:
        """Remove the state from the disk, if there is one."""
        for left in (self.path, self.json_path) if ranks.first() else ():
            left.unlink(missing_ok=True)

    def save(self, position: Position, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state on disk atomically; a kill at any moment leaves the old state or the new one."""
        self.position = position
        if not ranks.first():
            return
        everything = {**tensors, **{f"kept.{name}": tensor for name, tensor in self.kept.items()}}
        everything = {name: tensor.detach().cpu().contiguous() for name, tensor in everything.items()}
        found = {
            "arguments": self.arguments,
            **asdict(position),
            "notes": self.notes,
            "check": _check(everything),
        }
        write_file(self.path, lay_out(everything), {KEY: json.dumps(found)}, everything)
        write_text(self.json_path, json.dumps(found, indent=1))


def _position(found: Mapping[str, Any]) -> Position:
    """The position of a state; raises ValueError on what no run can have written."""
    position = Position(**{f.name: found[f.name] for f in fields(Position)})
    stage, done, curve, share = position.stage, position.done, position.curve, position.share
    if not isinstance(stage, str) or type(done) is not int or done < 0:
        raise ValueError(f"it says step {done!r} of stage {stage!r}")
    if not isinstance(curve, list) or not all(map(_numbers, curve)) or not _numbers(position.sums):
        raise ValueError("its curve is not a list of tables of numbers")
    steps = [row.get("step", 0) for row in curve]
    if steps != sorted(set(steps)) or any(not 0 < step <= done for step in steps):
        raise ValueError(f"its curve goes through steps {steps[-3:]} and {done} are done")
    if type(share) is not float or not 0 < share <= 1:
        raise ValueError(f"it says {share!r} of the learning rate")
    if any(type(at) is not int or at not in (0, *steps) for at in (position.good, position.newest)):
        raise ValueError(
            f"it goes back to steps {position.good!r} and {position.newest!r}, not rows of its curve"
        )
    return position


def _numbers(table: object) -> bool:
    return isinstance(table, dict) and all(
        type(value) in (int, float) and math.isfinite(value) for value in table.values()
    )


def _check(tensors: Mapping[str, Tensor]) -> int:
    """A checksum of all bytes in the order of the names: a bit that flipped on the disk must not go unnoticed."""
    check = 0
    for name in sorted(tensors):
        check = zlib.crc32(name.encode(), check)
        flat = tensors[name].contiguous().reshape(-1)
        if flat.numel():
            check = zlib.crc32(flat.view(torch.uint8).numpy().data, check)
    return check


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first argument that differs, with both values: one setting of `settings`, and what is derived last.

    Another seed or limit draws other images: their digest alone would not say what was typed otherwise.
    """
    for key in sorted({*theirs, *ours}, key=lambda name: (name in ("data", "labeled"), name)):
        old, new = theirs.get(key), ours.get(key)
        if old != new:
            if isinstance(old, dict) and isinstance(new, dict):
                return _difference(old, new)
            return key, old, new
    return None
