"""When folders are labels, and which class each one is."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from bdclean import strictjson
from bdclean.errors import Refused

MAX_NAMES_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Labelling:
    """Folder name -> class index, the classes' names, how that was found; no index: unlabeled, and why."""

    index: dict[str, int] | None
    classes: tuple[str, ...] | None = None
    source: str | None = None
    why: str = ""


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names in the order of the head: one a line, a JSON list, or a JSON object from index to name."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Refused(f"{path} is not a file: give one name a line, or a JSON list.")
        if status.st_size > MAX_NAMES_BYTES:
            raise Refused(f"{path} is too large for a list of class names.")
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() != ".json":
            names = tuple(line.strip() for line in text.splitlines() if line.strip())
        else:
            found = strictjson.parse(text)
            if isinstance(found, dict):
                found = [found[str(i)] for i in range(len(found))]
            names = tuple(str(name) for name in found)
    except OSError as error:
        raise Refused(f"class names cannot be read from {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused(f"{path} is not a list of class names: give one name a line, or a JSON list.") from None
    if len(names) < 2:
        raise Refused(f"{path} names {len(names)} classes, at least 2 are needed.")
    return names


def label_folders(
    folders: Sequence[str],
    *,
    empty: Sequence[str] = (),
    names: tuple[str, ...] | None,
    head_classes: int | None,
    forced: bool = False,
) -> Labelling:
    """Which class each of `folders` (those that hold images) is.

    They are labels if all match `names`, or all are integers (sorted as numbers), or their count equals the
    head's ('count', to be confirmed with `labels_plausible`); `forced` takes that order without confirmation.
    `empty` folders hold no image but keep their place in the order. Never raises: `why` says what is wrong.
    """
    found = sorted(folders)
    if names is not None and head_classes is not None and len(names) != head_classes:
        return Labelling(
            None, why=f"{len(names)} class names were given and the network has {head_classes} classes"
        )
    if len(found) == 1:
        return Labelling(
            None, why=f"all images are in one folder, {found[0]!r}: labels need at least two classes"
        )
    if names is not None:
        index = _by_name(found, names)
        if index is not None:
            return Labelling(index, names, "names")
    by_number = _by_number(found, head_classes)
    if by_number is not None:
        return by_number
    everything = sorted({*found, *empty})
    for order in (found, everything):
        if head_classes is None or len(order) == head_classes:
            source = "forced" if forced else "count"
            if head_classes is None and not forced:
                break
            return Labelling({name: i for i, name in enumerate(order)}, tuple(order), source)
    if names is not None:
        unknown = [name for name in found if _plain(name) not in {_plain(known) for known in names}]
        return Labelling(
            None, why=f"folder {(unknown or found)[0]!r} is not one of the {len(names)} class names"
        )
    head = "" if head_classes is None else f" and the network has {head_classes} classes"
    return Labelling(
        None, why=f"there are {len(found)} folders{head}, and their names say nothing about classes"
    )


def labels_plausible(predictions: Tensor, labels: Tensor, classes: int) -> bool:
    """Whether predictions agree with labels more often than chance (one-sided, about one in a thousand).

    Chance is what independent predictions and labels of these frequencies would give, so that a network which
    always answers the most frequent class does not count.
    """
    n = len(labels)
    if n == 0:
        return False
    predictions, labels = predictions.cpu(), labels.cpu()
    predicted = torch.bincount(predictions, minlength=classes)[:classes].double() / n
    labeled = torch.bincount(labels, minlength=classes)[:classes].double() / n
    chance = max(float((predicted * labeled).sum()), 1 / classes)
    right = float((predictions == labels).double().mean())
    # Wilson's score form, with a half image taken off for continuity.
    return right - 0.5 / n > chance + 3.1 * sqrt(chance * (1 - chance) / n)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _by_name(folders: Sequence[str], names: tuple[str, ...]) -> dict[str, int] | None:
    for form in (str, _plain):  # exact first: names may differ in case or hyphens alone
        known = {form(name): i for i, name in enumerate(names)}
        index = {folder: known.get(form(folder)) for folder in folders}
        values = [value for value in index.values() if value is not None]
        if len(known) == len(names) and len(values) == len(set(values)) == len(folders):
            return {folder: value for folder, value in index.items() if value is not None}
    return None


def _by_number(folders: Sequence[str], head_classes: int | None) -> Labelling | None:
    if not all(name.isascii() and name.isdigit() and len(name) <= 9 for name in folders):
        return None
    order = sorted(folders, key=int)
    values = [int(name) for name in order]
    if len(set(values)) != len(values):
        return None
    if head_classes is None or len(order) == head_classes:
        return Labelling({name: i for i, name in enumerate(order)}, tuple(order), "integers")
    if len(order) > head_classes or values[-1] >= head_classes:
        numbered = f"there are {len(order)} numbered folders, the highest {order[-1]},"
        return Labelling(None, why=f"{numbered} and the network has {head_classes} classes")
    # Some classes are absent: only the number itself can say which.
    present = dict(zip(values, order, strict=True))
    classes = tuple(present.get(i, str(i)) for i in range(head_classes))
    return Labelling(dict(zip(order, values, strict=True)), classes, "integers")
