"""A path -> ImageSet: listed in one order, labeled, drawn by seed, then decoded in parallel."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from math import prod
from pathlib import Path

import numpy as np
import torch

from bdclean.data.decode import STRETCH, Picture, Resize, Slice, Unreadable, decode, size_of
from bdclean.data.imageset import ImageSet
from bdclean.data.labels.labelling import label_listing
from bdclean.data.processors import usable
from bdclean.data.scratch import allocate
from bdclean.data.shared import Pixels, Shared
from bdclean.data.sources.listing import Listing
from bdclean.errors import Refused
from bdclean.files.text import plain

Tell = Callable[..., None]
TOGETHER = 32
"""Pictures that one task decodes, fewer where they are large."""
TASK_BYTES = 8 * 2**20
WAITING_BYTES = 256 * 2**20
"""Encoded pictures that may wait for a thread."""


def load_images(
    path: str | Path,
    size: tuple[int, int],
    *,
    channels: int = 3,
    resize: Resize = STRETCH,
    limit: int = 0,
    seed: int = 0,
    strict: bool = False,
    labeled: bool = False,
    classes: Path | Sequence[str] | None = None,
    claimed: tuple[str, ...] | None = None,
    head_classes: int | None = None,
    csv_must: bool = True,
    tell: Tell | None = None,
    threads: int | None = None,
    memory: int | None = None,
    shared: Shared | None = None,
) -> ImageSet:
    """The images of a folder or archive (see `open_images`) at `size` (height, width), brought to it by `resize`.

    `channels`: 3 reads them as RGB, 1 as grey (see `decode`).
    `limit` images (0: all) are drawn by seed before anything is decoded; an unreadable one is replaced by the
    next of the draw, named in `skipped`, or refuses the run with `strict`. The result depends on the images' names
    and content, `size`, `channels`, `resize`, `limit` and `seed` alone, not on `threads` or on whether an archive holds
    them.
    `labeled` refuses where there are no labels; `classes` is a file of class names or labels, or the names,
    `claimed` the names that the checkpoint gives; unless `csv_must`, a file of labels may name none of the images.
    More than `memory` bytes of pixels go to a scratch file (default: a share of what is free). What `shared` has read
    alike is taken from there, with the same result. Raises Refused for what holds no images.
    """
    path, shared = Path(path), shared or Shared(0)
    classes = classes if classes is None or isinstance(classes, (str, Path)) else tuple(classes)
    drawn = (path, size, channels, resize, limit, seed, strict)
    asked = (drawn, labeled, classes, claimed, head_classes, csv_must)
    if (known := shared.found(asked)) is not None:
        return known
    listing = shared.listing(path)
    labels = label_listing(listing, classes, claimed, head_classes, labeled, csv_must)
    order = np.random.default_rng(seed).permutation(len(listing.names))
    if labels.kept is not None:
        order = order[labels.kept[order]]
    shape = (min(limit, len(order)) if limit else len(order), channels, *size)

    def decode() -> Pixels:
        room, on_disk = allocate(shape, memory)
        chosen, skipped = _decode_drawn(listing, order, room.numpy(), resize, strict, tell, threads)
        if not len(chosen):
            name, reason = skipped[0]
            raise Refused(
                f"none of the {len(skipped)} images in {plain(listing.where)} can be read, the first is {name}: "
                f"{reason}."
            )
        paths = tuple(plain(listing.names[i]) for i in chosen.tolist())
        return Pixels(room[: len(chosen)], chosen, paths, tuple(skipped), shape[0], on_disk)

    # labels may leave images out, and then others are drawn
    under = (drawn, None if labels.kept is None else np.packbits(labels.kept).tobytes())
    pixels = shared.pixels(under, prod(shape), decode)
    notes = labels.notes
    if len(pixels.chosen) < pixels.wanted:
        notes.append(
            f"{len(pixels.chosen)} images of the {pixels.wanted} wanted could be read from {plain(listing.where)}."
        )
    found = ImageSet(
        images=pixels.images,
        labels=None if labels.values is None else torch.from_numpy(labels.values[pixels.chosen]),
        classes=labels.classes,
        paths=pixels.paths,
        skipped=pixels.skipped,
        warnings=tuple(notes),
        labels_source=labels.source,
        on_disk=pixels.on_disk,
    )
    shared.put(asked, under, found)
    return found


def picture_sizes(path: Path, shared: Shared | None = None) -> list[tuple[int, int]]:
    """Height and width of some pictures as they are, drawn at random, of those that can be read; none is decoded.

    Raises Refused for what holds no images.
    """
    listing = (shared or Shared(0)).listing(path)
    some = np.sort(np.random.default_rng(0).permutation(len(listing.names))[:TOGETHER])
    found = []
    for _, picture in listing.fetch(some):
        with suppress(Unreadable):
            found.append(size_of(picture))
    return found


def _decode_drawn(
    listing: Listing,
    order: np.ndarray,
    pixels: np.ndarray,
    resize: Resize,
    strict: bool,
    tell: Tell | None,
    threads: int | None,
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """(indices into the listing in rising order, what was skipped and why); fills `pixels` in that order.

    Decodes the first of `order`, then as many more as failed, until there are enough or none is left.
    """
    wanted, size = len(pixels), (pixels.shape[2], pixels.shape[3])
    owner = np.full(wanted, -1, dtype=np.int64)  # which image of the listing lies in each row
    failed: dict[int, str] = {}
    drawn = done = 0
    with warnings.catch_warnings(), ThreadPoolExecutor(threads or _threads()) as pool:
        warnings.simplefilter("ignore")  # Pillow's: about odd metadata of files that it reads well enough
        try:
            while drawn < len(order) and len(free := np.flatnonzero(owner < 0)):
                batch = np.sort(order[drawn : drawn + len(free)])
                drawn += len(batch)
                rows = dict(zip(batch.tolist(), free.tolist(), strict=False))

                def work(some: list[tuple[int, Picture]], rows: dict[int, int] = rows) -> list[str | None]:
                    return [
                        _decode_into(pixels[rows[index]], picture, size, resize) for index, picture in some
                    ]

                for some, reasons in _in_parallel(pool, listing.fetch(batch), work):
                    for (index, _), reason in zip(some, reasons, strict=True):
                        if reason is None:
                            owner[rows[index]] = index
                            done += 1
                            continue
                        failed[index] = reason
                        if strict:
                            name, where = plain(listing.names[index]), plain(listing.where)
                            raise Refused(f"{name} in {where} cannot be read ({reason}) and --strict is set.")
                    if tell is not None:
                        tell("images", done, wanted)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    chosen = rise(owner, pixels)
    return chosen, [(plain(listing.names[i]), failed[i]) for i in sorted(failed)]


def _decode_into(row: np.ndarray, picture: Picture, size: tuple[int, int], resize: Resize) -> str | None:
    """Why the picture gave no pixels, None where they are in `row` now."""
    try:
        row[:] = decode(picture, size, resize, channels=len(row))
    except Unreadable as error:
        return str(error)
    return None


Some = list[tuple[int, Picture]]


def _in_parallel(
    pool: ThreadPoolExecutor,
    pictures: Iterator[tuple[int, Picture]],
    work: Callable[[Some], list[str | None]],
) -> Iterator[tuple[Some, list[str | None]]]:
    """What `work` says of each few pictures, in their order; reads ahead no further than memory allows."""
    waiting: deque[tuple[Some, int, Future[list[str | None]]]] = deque()
    most, held = 3 * pool._max_workers, 0
    some: Some = []
    count = 0

    def take() -> tuple[Some, list[str | None]]:
        nonlocal held
        first, size, task = waiting.popleft()
        held -= size
        return first, task.result()

    for index, picture in pictures:
        some.append((index, picture))
        count += _bytes(picture)
        if len(some) == TOGETHER or count >= TASK_BYTES:
            waiting.append((some, count, pool.submit(work, some)))
            held += count
            some, count = [], 0
        while len(waiting) > most or (waiting and held > WAITING_BYTES):
            yield take()
    if some:
        waiting.append((some, count, pool.submit(work, some)))
    while waiting:
        yield take()


def _bytes(picture: Picture) -> int:
    if isinstance(picture, bytes):
        return len(picture)
    if isinstance(picture, np.ndarray):
        return picture.nbytes
    return picture.size if isinstance(picture, Slice) else 0


def rise(owner: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Moves the rows that are filled to the front, in the order of their images; returns those images.

    In place, along the cycles of the permutation: the pixels may be larger than the memory.
    """
    filled = np.flatnonzero(owner >= 0)
    source = filled[np.argsort(owner[filled], kind="stable")]  # row k is to come from row source[k]
    chosen = owner[source]
    # the rows that nothing comes into take what is left over, so that all of it is a permutation
    rest = np.setdiff1d(np.arange(len(owner)), source)
    source = np.concatenate([source, rest])
    for start in np.flatnonzero(source != np.arange(len(source))).tolist():
        if source[start] == start:
            continue  # done in an earlier cycle
        kept, row = pixels[start].copy(), start
        while source[row] != start:
            pixels[row] = pixels[source[row]]
            source[row], row = row, source[row]
        pixels[row] = kept
        source[row] = row
    return chosen


def _threads() -> int:
    return min(16, usable())
