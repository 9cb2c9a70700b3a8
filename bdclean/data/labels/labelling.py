"""The labels of a listing: from a CSV, from the container, or from its folders, by the rules in `labels`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bdclean.data.labels.classfile import FileLabels, label_text, read_class_file
from bdclean.data.labels.folders import Labelling, label_folders, match_names, not_among
from bdclean.data.sources.listing import SPLITS, Listing, held
from bdclean.errors import Refused
from bdclean.files import strictjson
from bdclean.files.text import plain

CLASS_FILES = (
    "class_to_idx.json", "class_index.json", "imagenet_class_index.json", "classes.json", "classes.txt", "labels.csv",
    "labels.jsonl", "labels.txt",
)  # fmt: skip
"""Names that people give to what `--classes` reads, where it lies beside the images."""
LOOSE_SHARE = 0.02
"""Up to this share of images, or one, may lie beside the class folders and are left out."""


@dataclass(frozen=True)
class Labels:
    """`values`: a class for each image of the listing, or None; `kept`: the images to draw from, None for all."""

    values: np.ndarray | None
    kept: np.ndarray | None
    classes: tuple[str, ...] | None
    source: str | None
    notes: list[str]


def label_listing(
    listing: Listing,
    classes: Path | Sequence[str] | None,
    claimed: tuple[str, ...] | None,
    head_classes: int | None,
    forced: bool,
    csv_must: bool = True,
) -> Labels:
    """Labels of all images, or none and a note why; raises Refused where `forced` or `classes` cannot be met.

    `classes`: what the user says (a file of names or of labels, or names); `claimed`: the names in the checkpoint.
    Unless `csv_must`, a file of labels that names none of these images is for others, and images of classes that the
    user's names do not have are unlabeled.
    """
    notes = []
    if listing.others:
        notes.append(
            f"{listing.others.total():,} files in {plain(listing.where)} are not images and were left out "
            f"({held(listing.others)})."
        )
    if classes is None:
        lying = [path for name in CLASS_FILES if (path := Path(listing.where) / name).is_file()]
        notes += [f"{plain(path)} was not read: --classes {plain(path)} uses it." for path in lying[:1]]
    names = None if claimed is not None and len(claimed) != (head_classes or len(claimed)) else claimed
    names_of: str | None = None
    said: tuple[str, ...] | FileLabels | None = None
    if classes is not None:
        said = read_class_file(Path(classes)) if isinstance(classes, (str, Path)) else tuple(classes)
    if isinstance(said, tuple):
        names, names_of = said, str(classes) if isinstance(classes, (str, Path)) else "--classes"
        if head_classes and len(names) != head_classes:
            raise Refused(
                f"{names_of} has {len(names)} class names and the network has {head_classes} classes: give a name for "
                "each, in the head's order."
            )
    values = said.match(listing.names) if isinstance(said, FileLabels) else []
    if isinstance(said, FileLabels) and not csv_must and not any(value is not None for value in values):
        notes.append(f"{said.path} names no image of {plain(listing.where)}: it is not used for them.")
        said = None
    kept = None
    if isinstance(said, FileLabels):
        kept = np.array([value not in (None, "-1") for value in values])
        if not kept.any():
            raise Refused(
                f"{said.path} names no image of {plain(listing.where)}; its first is "
                f"{plain(next(iter(said.labels), 'none'))!r}: give file names as they are there."
            )
        if not kept.all():
            notes.append(f"{int((~kept).sum()):,} images that {said.path} does not name were left out.")
        keys: Sequence[str | None] = values
        labelling = _by_value(values, None, names, None, head_classes, forced=True)
        forced = True  # whoever gives labels wants them used
    elif listing.labels is not None:
        keys = [label if label is None else label_text(label) for label in listing.labels]
        labelling = _by_value(keys, listing.classes, names, names_of, head_classes, forced)
    else:
        keys, labelling = _by_folder(listing, names, names_of, head_classes, forced, notes)
    if labelling.index is None:
        if forced:
            raise Refused(f"{plain(listing.where)} cannot serve as labeled images: {plain(labelling.why)}.")
        if labelling.odd and csv_must:
            raise Refused(f"{plain(labelling.why)}: name each as the file does, or leave --classes out.")
        if labelling.why:
            notes.append(f"images in {plain(listing.where)} are taken as unlabeled: {plain(labelling.why)}.")
        return Labels(None, kept, None, None, notes)
    if labelling.why:
        notes.append(f"{plain(labelling.why)}.")
    index = labelling.index
    numbers = np.fromiter(
        (index.get(key, -1) if key is not None else -1 for key in keys), np.int64, len(keys)
    )
    if (numbers < 0).any() and kept is None:  # forced: those that have a label
        kept = numbers >= 0
        notes.append(
            f"{int((~kept).sum()):,} images of {plain(listing.where)} have no label and were left out."
        )
    return Labels(numbers, kept, labelling.classes, labelling.source, notes)


def _by_value(
    values: Sequence[str | None],
    own: tuple[str, ...] | None,
    names: tuple[str, ...] | None,
    names_of: str | None,
    head_classes: int | None,
    forced: bool,
) -> Labelling:
    """The labelling of labels that stand beside the images; `own` are the container's names for their numbers."""
    found = {value for value in values if value not in (None, "-1")}
    missing = sum(value in (None, "-1") for value in values)
    if not found or (missing and not forced):
        return Labelling(None, why=f"{missing:,} of {len(values):,} have no label")
    present = sorted(value for value in found if value is not None)
    if own is None:
        return label_folders(
            present, names=names, names_of=names_of, head_classes=head_classes, forced=forced, what="label"
        )
    if not all(value.isdigit() and int(value) < len(own) for value in present):
        return Labelling(None, why=f"a label is not among the file's {len(own)} class names")
    named = match_names(own, names) if names is not None else None
    if named is not None:
        return Labelling({value: named[own[int(value)]] for value in present}, names, "names")
    odd = "" if names is None else not_among(own, names, "class", names_of)
    if names_of is not None:
        return Labelling(None, why=odd, odd=True)
    if head_classes and len(own) != head_classes:
        return Labelling(
            None, why=f"the file has {len(own)} class names and the network has {head_classes} classes"
        )
    # the order may be another one: to be confirmed, as that of folders
    noted = f"{odd}: classes are numbered as in the images' own file" if odd else ""
    return Labelling({value: int(value) for value in present}, own, "forced" if forced else "count", noted)


def _by_folder(
    listing: Listing,
    names: tuple[str, ...] | None,
    names_of: str | None,
    head_classes: int | None,
    forced: bool,
    notes: list[str],
) -> tuple[Sequence[str | None], Labelling]:
    """Each image's folder, and the folders' labelling. Folders such as `train` and `test` are looked through."""
    depth = 0
    tops = {name.split("/", 1)[0] for name in listing.names if "/" in name}
    splits = tops | set(listing.empty)
    if tops and all(top.casefold() in SPLITS for top in splits):
        depth = 1
        if len(tops) > 1:
            parts, where = ", ".join(sorted(tops)), plain(listing.where)
            notes.append(
                f"{where} has the parts {parts}: all are used. To use one, add its name to the path, as in "
                f"{where}/{sorted(tops)[0]}."
            )
    loose = sum(name.count("/") <= depth for name in listing.names)
    few = loose <= LOOSE_SHARE * len(listing.names) or loose == 1 < len(listing.names)
    if loose and not few:
        # a flat folder is unlabeled by intention: no word about it
        silent = loose == len(listing.names) and not forced
        return (), Labelling(None, why="" if silent else f"{loose:,} images lie outside any class folder")
    # a preview or two beside the class folders are of no class
    keys = [name.split("/", depth + 1)[depth] if name.count("/") > depth else None for name in listing.names]
    labelling = label_folders(
        sorted({key for key in keys if key is not None}),
        empty=listing.empty if depth == 0 else (), names=names, names_of=names_of, head_classes=head_classes,
        forced=forced, names_only=listing.stems_only,
    )  # fmt: skip
    if listing.stems_only and labelling.index is None and not forced:
        return (), Labelling(None)  # shards without labels
    return keys, labelling


def claimed_names(metadata: dict[str, str], config: object) -> tuple[str, ...] | None:
    """The class names that a checkpoint gives: `bdclean.classes`, `classes` or `class_names` in its metadata (a JSON
    list, or names between commas), or `id2label` or `label_names` of its config. A claim, checked by its use."""
    for key in ("bdclean.classes", "classes", "class_names"):
        said = metadata.get(key)
        if said is None or len(said) > 4 * 2**20:
            continue
        try:
            found = strictjson.parse(said)
        except strictjson.NotJson:
            found = [name.strip() for name in said.split(",")]
        names = _names(found)
        if names is not None:
            return names
    if isinstance(config, dict):
        for table in (config, config.get("pretrained_cfg")):
            if isinstance(table, dict):
                for key in ("id2label", "label_names"):
                    names = _names(table.get(key))
                    if names is not None:
                        return names
    return None


def _names(found: object) -> tuple[str, ...] | None:
    if isinstance(found, dict):
        numbered = {str(key): value for key, value in found.items()}
        found = [numbered.get(str(k)) for k in range(len(numbered))]
    if (
        not isinstance(found, list)
        or len(found) < 2
        or not all(isinstance(name, str) and name for name in found)
    ):
        return None
    # Hugging Face's stand-ins say nothing
    return None if all(name == f"LABEL_{k}" for k, name in enumerate(found)) else tuple(found)
