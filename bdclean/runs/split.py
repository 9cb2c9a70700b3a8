"""What a recipe is given, and what is held out to measure on."""

from __future__ import annotations

from dataclasses import dataclass

from bdclean.data.duplicates import without_duplicates
from bdclean.data.imageset import ImageSet
from bdclean.data.splitting import split
from bdclean.errors import Refused, UsageError
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.progress import Tell
from bdclean.record.run import RunRecord
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


def open_images(checkpoint: Checkpoint, inputs: Inputs, record: RunRecord, tell: Tell) -> Images:
    """Images are held out of the labeled ones where there are such, else of `--data`, unless `--test` is given."""
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
    labeled = None
    if inputs.data is not None and inputs.labeled is not None:
        labeled = read_images(inputs.labeled, checkpoint, inputs, tell, forced=True, csv=csv)
    record.data = describe_images(path, unlabeled)
    record.data.labeled_path = str(inputs.labeled) if inputs.labeled else None
    record.warnings += [*unlabeled.warnings, *(labeled.warnings if labeled is not None else ())]
    if inputs.test is not None:
        held_out, duplicates = read_images(inputs.test, checkpoint, inputs, tell, csv=csv), 0
        record.data.test = str(inputs.test)
        record.warnings += held_out.warnings
    elif labeled is not None and len(labeled) >= min(ENOUGH_LABELED, len(unlabeled)):
        labeled, held_out, duplicates = split(labeled, inputs.seed)
    else:
        unlabeled, held_out, duplicates = split(unlabeled, inputs.seed)
    if inputs.test is not None or labeled is not None:
        unlabeled, removed = without_duplicates(unlabeled, held_out)
        duplicates += removed
    if labeled is not None:
        labeled, removed = without_duplicates(labeled, held_out)
        duplicates += removed
    if len(unlabeled) == 0 or (labeled is not None and len(labeled) == 0):
        raise Refused(
            f"every image of {path} is also among those to measure on: nothing is left to train on."
        )
    record.data.duplicates, record.data.held_out = duplicates, len(held_out)
    return Images(unlabeled, labeled, held_out)
