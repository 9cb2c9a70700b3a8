"""When folders, or what a file says of its images, are labels, and which class each one is."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import sqrt

import torch
from torch import Tensor

IMAGENET = 1000


@dataclass(frozen=True)
class Labelling:
    """Folder name -> class index, the classes' names, how that was found; no index: unlabeled, and why.

    `why` beside an index is what is to be noted of it. `odd`: the user's own names lack one.
    """

    index: dict[str, int] | None
    classes: tuple[str, ...] | None = None
    source: str | None = None
    why: str = ""
    odd: bool = False


def label_folders(
    folders: Sequence[str],
    *,
    empty: Sequence[str] = (),
    names: tuple[str, ...] | None,
    names_of: str | None = None,
    head_classes: int | None,
    forced: bool = False,
    names_only: bool = False,
    what: str = "folder",
) -> Labelling:
    """Which class each of `folders` (those that hold images) is.

    They are labels if all match `names` (or are ImageNet's, as `n01440764`, for a head of 1,000), or all are integers
    (sorted as numbers), or their count equals the head's ('count', to be confirmed with `labels_plausible`); `forced`
    takes that order without confirmation. The user's own names, which `names_of` says the file of, do not give way to
    the count: what is not among them is an error. `empty` folders hold no image but keep their place in the order.
    `names_only`: numbers and counts mean nothing. `what` they are called. Never raises: `why` says what is wrong.
    An encoder has no head: 0 classes, and any count of folders is to be confirmed.
    """
    found, any_count = sorted(folders), head_classes == 0
    head_classes = head_classes or None
    if len(found) == 1:
        of = "all images are in one folder" if what == "folder" else f"all images have one {what}"
        return Labelling(None, why=f"{of}, {found[0]!r}: labels need at least two classes")
    for known in (names, imagenet_folders() if head_classes == IMAGENET else None):
        index = match_names(found, known) if known is not None else None
        if index is not None:
            return Labelling(index, known, "names")
    if names_only:
        return Labelling(None, why="the archives' names are no class names")
    by_number = _by_number(found, head_classes)
    if by_number is not None:
        return by_number
    odd = "" if names is None else not_among(found, names, what, names_of)
    if names_of is not None:
        return Labelling(None, why=odd, odd=True)
    everything = sorted({*found, *empty})
    for order in (found, everything):
        if head_classes is None or len(order) == head_classes:
            source = "forced" if forced else "count"
            if head_classes is None and not forced and not any_count:
                break
            noted = f"{odd}: classes are numbered in the order of the {what}s' names" if odd else ""
            return Labelling({name: i for i, name in enumerate(order)}, tuple(order), source, noted)
    if odd:
        return Labelling(None, why=odd)
    head = "" if head_classes is None else f" and the network has {head_classes} classes"
    return Labelling(
        None, why=f"there are {len(found)} {what}s{head}, and their names say nothing about classes"
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


def not_among(found: Sequence[str], names: tuple[str, ...], what: str, names_of: str | None) -> str:
    """Which of `found` is not one of `names`: those of the file `names_of`, or of the checkpoint."""
    known = {form for name in names for form in (_plain(name), *_synonyms(name))}
    odd = next((name for name in found if not known.intersection((_plain(name), *_first(name)))), None)
    where = f"names in {names_of}" if names_of is not None else "class names of the checkpoint"
    if odd is None:
        return f"the {len(found)} {what}s are not matched one to one with the {len(names)} {where}"
    return f"{what} {odd!r} is not one of the {len(names)} {where}"


@cache
def imagenet_folders() -> tuple[str, ...]:
    """The folder names of ImageNet's 1,000 classes (WordNet's numbers) in the order of the heads trained on them."""
    return tuple(files("bdclean.data.labels").joinpath("imagenet.txt").read_text(encoding="ascii").split())


def match_names(folders: Sequence[str], names: tuple[str, ...]) -> dict[str, int] | None:
    """Each folder's place among `names`, if all of them are there and no two are the same one."""
    # Exact first; then names may differ in case or hyphens alone; then a name's first synonym is enough, then any one.
    for forms in (_exact, _plainly, _first, _synonyms):
        counted = Counter(form for name in names for form in forms(name))
        known = {form: i for i, name in enumerate(names) for form in forms(name) if counted[form] == 1}
        index = {folder: known.get(next(iter(forms(folder)))) for folder in folders}
        values = [value for value in index.values() if value is not None]
        if len(values) == len(set(values)) == len(folders):
            return {folder: value for folder, value in index.items() if value is not None}
    return None


def _exact(name: str) -> tuple[str, ...]:
    return (name,)


def _plainly(name: str) -> tuple[str, ...]:
    return (_plain(name),)


def _plain(name: str) -> str:
    # file systems and archives hold letters with accents as one character or as two
    name = unicodedata.normalize("NFC", name)
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _first(name: str) -> tuple[str, ...]:
    return (_plain(name.split(",", 1)[0]),)


def _synonyms(name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_plain(part) for part in name.split(",")))


def _by_number(folders: Sequence[str], head_classes: int | None) -> Labelling | None:
    if not all(name.isascii() and name.isdigit() and len(name) <= 9 for name in folders):
        return None
    order = sorted(folders, key=int)
    values = [int(name) for name in order]
    if len(set(values)) != len(values):
        return None
    if head_classes is None or len(order) == head_classes:
        return Labelling({name: i for i, name in enumerate(order)}, tuple(order), "integers")
    if values[0] >= 1 and values[-1] == head_classes:
        # Numbered from 1, some absent. Only the network can confirm it.
        named = {value - 1: name for value, name in zip(values, order, strict=True)}
        classes = tuple(named.get(i, str(i + 1)) for i in range(head_classes))
        return Labelling({name: int(name) - 1 for name in order}, classes, "count")
    if len(order) > head_classes or values[-1] >= head_classes:
        numbered = f"there are {len(order)} numbered classes, the highest {order[-1]},"
        return Labelling(None, why=f"{numbered} and the network has {head_classes}")
    # Some classes are absent: only the number itself can say which.
    present = dict(zip(values, order, strict=True))
    classes = tuple(present.get(i, str(i)) for i in range(head_classes))
    return Labelling(dict(zip(order, values, strict=True)), classes, "integers")
