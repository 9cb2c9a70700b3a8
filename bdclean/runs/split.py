"""What a recipe is given, and what is held out to measure on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bdclean.data.duplicates import without_duplicates
from bdclean.data.imageset import ImageSet
from bdclean.data.splitting import split
from bdclean.errors import Refused, UsageError
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.progress import Tell
from bdclean.record.run import DataEntry
from bdclean.runs.images import describe_images, read_images
from bdclean.runs.options import CSV, Inputs

ENOUGH_LABELED = 600
"""With fewer labeled images than that, a third of which would be under 200, those to measure on are of `--data`."""


@dataclass
class Images:
    """What the recipe gets (`labeled` only where labels are there), and what is measured on. No picture is in both."""

    unlabeled: ImageSet
    labeled: ImageSet | None
    held_out: ImageSet

    def telling(self) -> ImageSet:
        """Those that tell most of how the network is to be read: with labels, where any have them.

        Labels that only a count of classes speaks for come last, and those of images that are measured on after others.
        """
        sets = [
            s for s in (self.labeled, self.unlabeled, self.held_out) if s is not None and s.labels is not None
        ]
        return next((s for s in sets if s.labels_source != "count"), sets[0] if sets else self.unlabeled)


def open_images(checkpoint: Checkpoint, inputs: Inputs, tell: Tell) -> tuple[Images, DataEntry, list[str]]:
    """The images of a repair, their entry in the record, and what is to be warned of.

    Images are held out of the labeled ones where there are such, else of `--data`, unless `--test` is given.
    """
    path = inputs.data or inputs.labeled
    if path is None:
        raise UsageError("cleanse needs images: give --data PATH; they need no labels.")
    # A CSV of labels is about the labeled images and those to measure on, where there are such beside `--data`.
    beside = [given for given in (inputs.labeled, inputs.test) if given is not None]
    csv: CSV = "may" if len(beside) == 2 else "must"
    unlabeled = read_images(
        path, checkpoint, inputs, tell, forced=inputs.data is None,
        csv="not" if inputs.data is not None and beside else csv,
    )  # fmt: skip
    labeled = held_out = None
    if inputs.data is not None and inputs.labeled is not None:
        labeled = read_images(inputs.labeled, checkpoint, inputs, tell, forced=True, csv=csv)
    if inputs.test is not None:
        held_out = read_images(inputs.test, checkpoint, inputs, tell, csv=csv)
    warnings = [
        warning for each in (unlabeled, labeled, held_out) if each is not None for warning in each.warnings
    ]
    images, duplicates = hold_out(
        Images(unlabeled, labeled, held_out or unlabeled), held_out is not None, inputs.seed
    )
    if len(images.unlabeled) == 0 or (images.labeled is not None and len(images.labeled) == 0):
        emptied = path if len(images.unlabeled) == 0 else inputs.labeled
        raise Refused(
            f"every image of {emptied} is also among those to measure on: nothing is left to train on."
        )
    entry = replace(
        describe_images(path, unlabeled),
        labeled_path=str(inputs.labeled) if inputs.labeled else None,
        test=str(inputs.test) if inputs.test else None,
        duplicates=duplicates,
        held_out=len(images.held_out),
    )
    return images, entry, warnings


def hold_out(images: Images, given: bool, seed: int) -> tuple[Images, int]:
    """`images` with those that are measured on taken out of the others, and how many duplicates that removed.

    `given`: those to measure on are already there.
    """
    unlabeled, labeled, held_out, duplicates = images.unlabeled, images.labeled, images.held_out, 0
    if not given and labeled is not None and len(labeled) >= min(ENOUGH_LABELED, len(unlabeled)):
        labeled, held_out, duplicates = split(labeled, seed)
    elif not given:
        unlabeled, held_out, duplicates = split(unlabeled, seed)
    if given or labeled is not None:
        unlabeled, removed = without_duplicates(unlabeled, held_out)
        duplicates += removed
    if labeled is not None:
        labeled, removed = without_duplicates(labeled, held_out)
        duplicates += removed
    return Images(unlabeled, labeled, held_out), duplicates
