"""A folder of images -> ImageSet: listed in one order, drawn by seed, then decoded in parallel."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bdclean.data.decode import SUFFIXES, Unreadable, decode
from bdclean.data.imageset import ImageSet
from bdclean.data.labels import Labelling, label_folders, read_class_names
from bdclean.errors import Refused

CONTAINERS = (".tar", ".tar.gz", ".tgz", ".npz", ".parquet", ".zip")
Tell = Callable[..., None]


@dataclass(frozen=True)
class Listing:
    """Image files below `root` as sorted relative paths, its folders without any, other files' suffixes."""

    root: Path
    files: tuple[str, ...]
    empty: tuple[str, ...]
    others: Counter[str]


def load_images(
    path: str | Path,
    size: tuple[int, int],
    *,
    limit: int = 0,
    seed: int = 0,
    strict: bool = False,
    labeled: bool = False,
    classes: Path | Sequence[str] | None = None,
    head_classes: int | None = None,
    tell: Tell | None = None,
    threads: int | None = None,
) -> ImageSet:
    """The images of a folder, flat, nested or one folder per class, at `size` (height, width).

    `limit` images (0: all) are drawn by seed before anything is decoded; an unreadable one is replaced by the
    next of the draw, named in `skipped`, or refuses the run with `strict`. The result depends on the files,
    `size`, `limit` and `seed` alone, not on `threads`. `labeled` refuses where folders cannot be labels;
    `classes` is a file of class names or the names. Raises Refused for what is not a folder of images.
    """
    root = Path(path)
    listing = list_images(root)
    labelling, notes = _label(listing, classes, head_classes, labeled)
    order = np.random.default_rng(seed).permutation(len(listing.files))
    wanted = min(limit, len(order)) if limit else len(order)
    _check_memory(wanted, size)
    chosen, pixels, skipped = _decode_drawn(listing, order, wanted, size, strict, tell, threads)
    if not chosen:
        name, reason = skipped[0]
        raise Refused(
            f"none of the {len(skipped)} images in {root} can be read, the first is {name}: {reason}."
        )
    if len(chosen) < wanted:
        notes.append(f"{len(chosen)} images of the {wanted} wanted could be read from {root}.")
    files = [listing.files[i] for i in chosen]
    labels = None
    if labelling.index is not None:
        labels = torch.tensor([labelling.index[file.split("/", 1)[0]] for file in files], dtype=torch.int64)
    return ImageSet(
        images=torch.from_numpy(pixels),
        labels=labels,
        classes=labelling.classes,
        paths=tuple(printable(file) for file in files),
        skipped=tuple(skipped),
        warnings=tuple(notes),
        labels_source=labelling.source,
    )


def list_images(root: Path) -> Listing:
    """Every image file below `root`, by suffix or without one; hidden ones are left out, links followed once."""
    if not root.exists():
        raise Refused(f"{root} does not exist: give a folder of images.")
    if not root.is_dir():
        if root.name.lower().endswith(CONTAINERS):
            raise Refused(f"{root} is an archive, which is not read yet: unpack it and give the folder.")
        raise Refused(f"{root} is a file, not a folder: give the folder that holds the images.")
    # An archive often unpacks to one folder in another: its only folder stands for it.
    top = list(_entries(root))
    while len(top) == 1 and _own_folder(top[0]) and any(map(_is_folder, _entries(Path(top[0])))):
        root = Path(top[0])
        top = list(_entries(root))
    files: list[str] = []
    others: Counter[str] = Counter()
    for relative in _walk(root):
        suffix = os.path.splitext(relative)[1].lower()
        if suffix in SUFFIXES or not suffix:
            files.append(relative)
        else:
            others[suffix] += 1
    if not files:
        held = ", ".join(f"{count} {printable(suffix)}" for suffix, count in others.most_common(3))
        raise Refused(f"{root} holds no images{f' (but {held} files)' if held else ', it is empty'}.")
    files.sort(key=lambda file: file.split("/"))
    filled = {file.split("/", 1)[0] for file in files if "/" in file}
    empty = sorted(entry.name for entry in top if _is_folder(entry) and entry.name not in filled)
    return Listing(root, tuple(files), tuple(empty), others)


def printable(name: str) -> str:
    """A file name that is safe to show: no control characters, no bytes that are not text."""
    return "".join(character if character.isprintable() else "\ufffd" for character in name)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        raise Refused(f"folder {folder} cannot be read: {error.strerror}.") from None
    yield from entries


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a file that cannot be read
        return False


def _own_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of all files; a folder met again through a link (or a loop) is not entered twice."""
    seen = {os.path.realpath(root)}
    waiting = [(root, "")]
    while waiting:
        folder, prefix = waiting.pop()
        for entry in sorted(_entries(folder), key=lambda entry: (entry.is_symlink(), entry.name)):
            if not _is_folder(entry):
                yield prefix + entry.name
                continue
            real = os.path.realpath(entry.path)
            if real not in seen:
                seen.add(real)
                waiting.append((Path(entry.path), f"{prefix}{entry.name}/"))


def _label(
    listing: Listing, classes: Path | Sequence[str] | None, head_classes: int | None, forced: bool
) -> tuple[Labelling, list[str]]:
    """The folders' labelling and warnings; raises Refused where `forced` cannot be met."""
    notes = []
    if listing.others:
        held = ", ".join(f"{count} {printable(suffix)}" for suffix, count in listing.others.most_common(3))
        notes.append(
            f"{listing.others.total()} files in {listing.root} are not images and were left out ({held})."
        )
    names = _class_names(classes)
    loose = [file for file in listing.files if "/" not in file]
    if loose:
        labelling = Labelling(None, why=f"{len(loose)} images lie outside any class folder")
        silent = len(loose) == len(listing.files)
    else:
        folders = sorted({file.split("/", 1)[0] for file in listing.files})
        labelling = label_folders(
            folders, empty=listing.empty, names=names, head_classes=head_classes, forced=forced
        )
        silent = False
    if labelling.index is None:
        if forced:
            raise Refused(f"{listing.root} cannot serve as labeled images: {printable(labelling.why)}.")
        if not silent:
            notes.append(f"images in {listing.root} are taken as unlabeled: {printable(labelling.why)}.")
    return labelling, notes


def _class_names(classes: Path | Sequence[str] | None) -> tuple[str, ...] | None:
    if isinstance(classes, (str, Path)):
        return read_class_names(Path(classes))
    return tuple(classes) if classes else None


def _check_memory(count: int, size: tuple[int, int]) -> None:
    needed = count * 3 * size[0] * size[1]
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed * 2
    )
    if needed > 0.7 * memory:
        raise Refused(
            f"{count:,} images at {size[0]} x {size[1]} take {needed / 2**30:.1f} GiB and this machine has "
            f"{memory / 2**30:.1f}: lower --limit."
        )


def _decode_drawn(
    listing: Listing,
    order: np.ndarray,
    wanted: int,
    size: tuple[int, int],
    strict: bool,
    tell: Tell | None,
    threads: int | None,
) -> tuple[list[int], np.ndarray, list[tuple[str, str]]]:
    """(indices into the listing in rising order, their pixels, what was skipped and why).

    Decodes the first `wanted` of `order`, then as many more as failed, until enough are read or none is left.
    """
    pixels = np.empty((wanted, 3, *size), np.uint8)
    failed: dict[int, str] = {}
    rows: dict[int, int] = {}  # index in the listing -> row of `pixels`
    free = list(range(wanted))
    drawn = 0

    def decode_some(indices: np.ndarray, slots: list[int]) -> list[str | None]:
        reasons: list[str | None] = []
        for index, slot in zip(indices, slots, strict=True):
            try:
                pixels[slot] = decode(os.path.join(listing.root, listing.files[index]), size)
                reasons.append(None)
            except Unreadable as error:
                reasons.append(str(error))
        return reasons

    with warnings.catch_warnings(), ThreadPoolExecutor(threads or _threads()) as pool:
        warnings.simplefilter("ignore")  # Pillow's: about odd metadata of files that it reads well enough
        try:
            while free and drawn < len(order):
                batch = order[drawn : drawn + len(free)]
                slots, free, drawn = free[: len(batch)], free[len(batch) :], drawn + len(batch)
                starts = range(0, len(batch), 32)
                tasks = [pool.submit(decode_some, batch[s : s + 32], slots[s : s + 32]) for s in starts]
                for start, task in zip(starts, tasks, strict=True):
                    for index, slot, reason in zip(batch[start:], slots[start:], task.result(), strict=False):
                        if reason is None:
                            rows[int(index)] = slot
                        else:
                            failed[int(index)] = reason
                            free.append(slot)
                            if strict:
                                name = printable(listing.files[index])
                                raise Refused(
                                    f"{name} in {listing.root} cannot be read ({reason}) and --strict is set."
                                )
                    if tell is not None:
                        tell("images", len(rows), wanted)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    chosen = sorted(rows)
    skipped = [(printable(listing.files[i]), failed[i]) for i in sorted(failed)]
    return chosen, pixels[[rows[i] for i in chosen]], skipped


def _threads() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, available)
