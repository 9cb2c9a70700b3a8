"""Pictures and confusions of a record, checked and arranged for a page: what a file says of itself is not believed."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from bdclean.files.kinds import PNG
from bdclean.record.run import Confusion, Picture, RunRecord
from bdclean.report import wording

LARGEST_PICTURE = 200_000  # bytes of PNG; ours stay far below
LARGEST_SIDE = 1024
MOST_PICTURES = 64
MOST_CLASSES = 50
CLOSE_UPS = ("difference", "enlarged")
NAMED_CLASSES = 24  # up to so many, rows have room for names
FAINTEST = 0.15  # a single image is still seen
CELL, NARROW_CELL, LABELS = 14, 6, 96  # in units of the drawing


@dataclass
class Pair:
    """An image as given and stamped, with what the models say to each."""

    given: str
    stamped: str
    label: str
    given_before: str
    given_after: str
    before: str
    after: str
    moved_before: bool  # stamped, the suspect sends it to the target
    moved_after: bool


@dataclass
class Strip:
    """The images of one trigger."""

    trigger: str
    target: str
    caption: str
    pairs: list[Pair]
    close_ups: list[
        tuple[str, str, str]
    ]  # role, base64 and caption of what was changed, and of the place enlarged
    cleansed: bool


@dataclass
class Cell:
    """A square of a drawn matrix: the more of its row it holds, the more opaque."""

    x: int
    y: int
    opacity: float
    title: str


@dataclass
class Heat:
    """A confusion matrix as a drawing: rows are reference classes, columns predictions."""

    title: str
    cell: int
    left: int
    size: int
    cells: list[Cell]
    names: list[tuple[int, str]]
    target: int | None  # x of the target's column


def png(text: str) -> str:
    """Returns the base64 of a PNG of moderate size, encoded anew; nothing for anything else."""
    if len(text) > LARGEST_PICTURE * 4 // 3 + 4:
        return ""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return ""
    if raw[:8] != PNG or raw[12:16] != b"IHDR" or len(raw) < 33:
        return ""
    width, height = struct.unpack(">II", raw[16:24])
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE):
        return ""
    return base64.b64encode(raw).decode("ascii")


def strips(record: RunRecord) -> list[Strip]:
    """Returns the images as given and stamped, one strip a trigger and target."""
    names = record.class_names()
    pictures = [picture for picture in record.pictures[:MOST_PICTURES] if png(picture.png_base64)]
    given = {picture.image: picture for picture in pictures if picture.role == "given"}
    found: dict[tuple[object, object], Strip] = {}
    for picture in pictures:
        if picture.role not in ("stamped", *CLOSE_UPS) or picture.trigger is None:
            continue
        key = (picture.trigger, picture.target)
        if key not in found:
            found[key] = Strip(
                picture.trigger,
                wording.label(picture.target, names),
                "",
                [],
                [],
                record.before is not None,
            )
        strip = found[key]
        if picture.role in CLOSE_UPS:
            strip.close_ups.append((picture.role, png(picture.png_base64), picture.caption))
        else:
            strip.caption = strip.caption or picture.caption
            strip.pairs.append(_pair(picture, given.get(picture.image), names, record))
    return [strip for strip in found.values() if strip.pairs]


def masks(record: RunRecord) -> list[tuple[str, str]]:
    """Returns (base64, caption) of what a recipe or detector made."""
    shown = [picture for picture in record.pictures[:MOST_PICTURES] if picture.role == "mask"]
    return [(png(picture.png_base64), picture.caption) for picture in shown if png(picture.png_base64)]


def heats(record: RunRecord) -> list[Heat]:
    """Returns the record's confusions as drawings; those that are no square of counts are left out."""
    names = record.class_names()
    return [_heat(found, names, record) for found in (record.confusion or [])[:8] if _square(found.counts)]


def _pair(picture: Picture, given: Picture | None, names: Sequence[str] | None, record: RunRecord) -> Pair:
    def goes(seen: int | None, unstamped: int | None) -> bool:
        """Whether the trigger sends the image to its target, where it was not said to be before."""
        if seen is None or picture.label is None or seen == unstamped:
            return False
        if picture.target == "next":
            classes = record.checkpoint.classes or 0
            return classes > 0 and seen == (picture.label + 1) % classes
        return seen == picture.target

    def called(seen: int | None) -> str:
        name = wording.label(seen, names, numbered=False)
        return (
            name
            if seen == picture.label
            else f"{name}, is {wording.label(picture.label, names, numbered=False)}"
        )

    before, after = (given.before, given.after) if given is not None else (None, None)
    return Pair(
        png(given.png_base64) if given is not None else "",
        png(picture.png_base64),
        wording.label(picture.label, names, numbered=False),
        called(before),
        called(after),
        wording.label(picture.before, names, numbered=False),
        wording.label(picture.after, names, numbered=False),
        goes(picture.before, before),
        goes(picture.after, after),
    )


def _square(counts: list[list[int]]) -> bool:
    return 0 < len(counts) <= MOST_CLASSES and all(len(row) == len(counts) for row in counts)


def _heat(found: Confusion, names: Sequence[str] | None, record: RunRecord) -> Heat:
    classes = len(found.counts)
    named = classes <= NAMED_CLASSES
    cell, left = (CELL, LABELS) if named else (NARROW_CELL, 0)
    cells = []
    for y, row in enumerate(found.counts):
        total = sum(count for count in row if count > 0)
        for x, count in enumerate(row):
            if count > 0:
                title = f"{wording.label(y, names)} \u2192 {wording.label(x, names)}: {count} of {total}"
                cells.append(
                    Cell(
                        left + x * cell, y * cell, round(FAINTEST + (1 - FAINTEST) * count / total, 3), title
                    )
                )
    model = {"suspect": "suspect", "cleansed": "cleansed"}.get(found.model, "")
    stamped = "Stamped" if found.trigger is not None else "As given"
    target = found.target if isinstance(found.target, int) and 0 <= found.target < classes else None
    return Heat(
        f"{stamped}, {model}" if record.before is not None and model else stamped,
        cell,
        left,
        classes * cell,
        cells,
        [(y * cell, _short(names[y] if names and y < len(names) else str(y))) for y in range(classes)]
        if named
        else [],
        None if target is None else left + target * cell,
    )


def _short(name: str) -> str:
    return name if len(name) <= 15 else f"{name[:14]}\u2026"
