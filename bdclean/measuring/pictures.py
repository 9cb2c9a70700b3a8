"""What a page shows without torch: small pictures as given and stamped, and where classes go."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from bdclean.measuring.trial import Target, Trial, halves, stamped_predictions
from bdclean.record.run import FAILS, INCONCLUSIVE, NOT_MEASURED, Confusion, Picture, TriggerRow
from bdclean.triggers.stamping import Trigger

SHOWN = 6
"""Images of a strip."""
STRIPS = 3
SIDES = (128, 96, 80, 64, 48, 32, 24)
"""The longer side is at most the first of these for which all pictures stay within BUDGET."""
BUDGET = 300_000
"""Characters of base64 that the images of a record have together; masks have as much again."""
GREY = 127
"""Grey levels from the middle to black or white."""
LEAST_PLACE, GAP = 8, 2
"""Pixels that an enlarged place has at least along a side; that a patch may leave as they are, between others."""
MOST_CLASSES = 50
"""With more classes no confusion matrix is kept: nobody can read it, and it grows with the square."""


def strips(
    rows: Sequence[TriggerRow], triggers: Sequence[Trigger], suspect: Trial, cleansed: Trial | None = None
) -> list[Picture]:
    """SHOWN images as given and stamped with the triggers of `chosen` rows, with the predictions of both models.

    The images are a seeded draw, one of each reference class while there are enough classes, and none of the target
    class: they are not chosen by what the trigger did to them. Where a trigger only moves one class, they are of it.
    """
    made = {trigger.spec(): trigger for trigger in triggers}
    drawn: dict[int, tuple[Picture, Tensor]] = {}
    found: list[tuple[Picture, Tensor]] = []
    for row in chosen(rows):
        trigger = made[row.trigger]
        indices, caption = _draw(suspect, row)
        if len(indices) == 0:
            continue
        images = suspect.images[indices]
        stamped = trigger(images)
        before = suspect.predict(stamped).tolist()
        after = None if cleansed is None else cleansed.predict(stamped).tolist()
        for k, index in enumerate(indices.tolist()):
            label = int(suspect.reference[index])
            if index not in drawn:
                seen = int(suspect.clean[index]), None if cleansed is None else int(cleansed.clean[index])
                drawn[index] = (Picture("given", "", *seen, index, label=label), images[k])
            seen = before[k], None if after is None else after[k]
            found.append(
                (
                    Picture("stamped", "", *seen, index, row.trigger, row.target, label, caption),
                    stamped[k],
                )
            )
        found += _close_up(row, indices, images, stamped)
    together = [*drawn.values(), *found]
    for (picture, _), text in zip(together, _encoded([image for _, image in together]), strict=True):
        picture.png_base64 = text
    return [picture for picture, _ in together]


def masks(pictures: Mapping[str, Tensor]) -> list[Picture]:
    """What a recipe made, float [c h w] in [0, 1] by caption, at most SHOWN of them."""
    kept = list(pictures.items())[:SHOWN]
    texts = _encoded([(255 * image.detach().cpu().float()).round().byte() for _, image in kept])
    return [
        Picture("mask", text, caption=caption) for (caption, _), text in zip(kept, texts, strict=True) if text
    ]


def confusions(
    rows: Sequence[TriggerRow], triggers: Sequence[Trigger], suspect: Trial, cleansed: Trial | None = None
) -> list[Confusion] | None:
    """Reference classes against predictions, as given and stamped with the worst trigger; None for many classes.

    Counted on the half of the images that rows are measured on, which screening has not seen.
    """
    if suspect.classes > MOST_CLASSES:
        return None
    order = halves(len(suspect.images), suspect.seed)[1]
    models = [("suspect", suspect)] + ([] if cleansed is None else [("cleansed", cleansed)])
    found = [
        Confusion(name, None, None, _counts(trial, trial.clean[order], order))
        for name, trial in models
        if not trial.own_reference  # by construction all of them are on the diagonal
    ]
    made = {trigger.spec(): trigger for trigger in triggers}
    for row in chosen(rows)[:1]:
        for name, trial in models:
            counts = _counts(trial, stamped_predictions(trial, made[row.trigger], order), order)
            found.append(Confusion(name, row.trigger, row.target, counts))
    return found


def chosen(rows: Sequence[TriggerRow]) -> list[TriggerRow]:
    """The rows worth a picture: the worst one of each family, STRIPS at most, the worst first."""
    order = {FAILS: 0, INCONCLUSIVE: 1}
    measured = [row for row in rows if row.outcome != NOT_MEASURED and row.target is not None]
    ranked = sorted(measured, key=lambda row: (order.get(row.outcome, 2), -(row.asr.value or 0.0)))
    best: dict[str, TriggerRow] = {}
    for row in ranked:
        best.setdefault(row.family, row)
    return list(best.values())[:STRIPS]


def _draw(trial: Trial, row: TriggerRow) -> tuple[Tensor, str]:
    """Indices of SHOWN images, and in words which they are."""
    target: Target | None = row.target
    order = torch.randperm(len(trial.images), generator=torch.Generator().manual_seed(trial.seed))
    classes = trial.reference[order].tolist()
    if row.decisive_source is not None:
        picked = [i for i, k in enumerate(classes) if k == row.decisive_source]
        return order[picked[:SHOWN]], f"a seeded draw from class {row.decisive_source}, which it moves"
    # one of each class first; the rest in the order drawn
    seen: dict[int, int] = {}
    rank = []
    for i, k in enumerate(classes):
        seen[k] = seen.get(k, -1) + 1
        if k != target:
            rank.append((seen[k], i))
    return order[[i for _, i in sorted(rank)[:SHOWN]]], "a seeded draw from the other classes"


def _close_up(
    row: TriggerRow, indices: Tensor, images: Tensor, stamped: Tensor
) -> list[tuple[Picture, Tensor]]:
    """What the trigger changed on that of `images` which it changed most, and the place, where that is small.

    Nothing where it changed none. The change is drawn around grey, as strong as it goes: brighter, or darker.
    """
    changes = stamped.int() - images.int()
    at = int(changes.abs().flatten(1).sum(1).argmax())
    change, largest = changes[at], int(changes[at].abs().max())
    if not largest:
        return []
    factor = GREY / largest
    words = "what it changed, on grey" + (f", {factor:.0f} times as strong" if factor >= 2 else "")
    picture = Picture("difference", "", None, None, int(indices[at]), row.trigger, row.target, caption=words)
    found = [(picture, (128 + factor * change).to(torch.uint8))]
    place = _small_place((changes != 0).any(0).any(0))
    if place is not None:
        rows, columns = place
        words = (
            f"enlarged, as given and stamped: rows {rows.start} to {rows.stop - 1}, "
            f"columns {columns.start} to {columns.stop - 1}"
        )
        given, then = (which[at][:, rows, columns] for which in (images, stamped))
        both = torch.cat([given, torch.full_like(given[:, :, :1], 128), then], 2)
        found.append((replace(picture, role="enlarged", caption=words), both))
    return found


def _small_place(changed: Tensor) -> tuple[slice, slice] | None:
    """A square around the pixels that are `changed`, bool [h w], of several places the last; None where it is large."""
    rows = _last_run(changed.any(1))
    columns = _last_run(changed[rows].any(0))
    side = max(LEAST_PLACE, 2 * (rows.stop - rows.start), 2 * (columns.stop - columns.start))
    if 2 * side > min(changed.shape):
        return None

    def around(run: slice, size: int) -> slice:
        start = min(max(0, (run.start + run.stop - side) // 2), size - side)
        return slice(start, start + side)

    return around(rows, changed.shape[0]), around(columns, changed.shape[1])


def _last_run(marks: Tensor) -> slice:
    """The last of the places that are marked, bool [n], with gaps of up to GAP in it."""
    places = marks.nonzero().squeeze(1).tolist()
    start = end = places[-1]
    for place in reversed(places):
        if start - place > GAP + 1:
            break
        start = place
    return slice(start, end + 1)


def _counts(trial: Trial, predictions: Tensor, order: Tensor) -> list[list[int]]:
    flat = trial.reference[order] * trial.classes + predictions
    square = torch.bincount(flat, minlength=trial.classes**2).view(trial.classes, trial.classes)
    return [[int(count) for count in line] for line in square.tolist()]


def _encoded(images: Sequence[Tensor]) -> list[str]:
    """uint8 [c h w] each -> PNGs in base64, all of them small enough for BUDGET; empty where none is."""
    for side in SIDES:
        texts = [_png(image, side) for image in images]
        if sum(map(len, texts)) <= BUDGET:
            return texts
    return [""] * len(images)


def _png(image: Tensor, side: int) -> str:
    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if max(picture.size) > side:
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
