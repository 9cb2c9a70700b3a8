"""The images of a run: read, and doubted where they deserve it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bdclean.data.duplicates import repeated
from bdclean.data.imageset import ImageSet
from bdclean.data.labels.classfile import FileLabels, read_class_file
from bdclean.data.labels.folders import labels_plausible
from bdclean.data.labels.labelling import claimed_names, label_listing
from bdclean.data.loading import load_images
from bdclean.data.sources.opening import open_images as open_listing
from bdclean.errors import Refused
from bdclean.measuring.trial import Predict
from bdclean.networks.ambiguity.size import own_size
from bdclean.networks.arch import Arch
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.checkpoint.claims import claimed_resize
from bdclean.progress import Tell, quiet
from bdclean.record.run import DataEntry
from bdclean.runs.options import CSV, Inputs
from bdclean.runs.suspect import Suspect, as_trained, claimed_size, given_size, input_size

LEAST_IMAGES = 20
"""Under this many images nothing can be said about anything."""
COMPARED, MANY_COPIES = 20_000, 0.1
"""So many images are searched for copies of each other, and a warning says so if this share or more are copies."""


ONE_ANSWER = 0.9
"""From this share on, a set of images counts as one class's."""


def read_images(
    path: Path, checkpoint: Checkpoint, inputs: Inputs, tell: Tell, *, forced: bool = False, csv: CSV = "must"
) -> ImageSet:
    """The images of `path` at the network's input size; `forced`: their folders are labels, or the run is refused.

    `csv`: whether `--classes`, where it is a CSV of labels, must name some of these images, may, or is not about them.
    """
    classes = inputs.classes
    if csv == "not" and classes is not None and isinstance(read_class_file(classes), FileLabels):
        classes = None
    images = load_images(
        path, input_size(checkpoint, inputs), channels=checkpoint.arch.input[0],
        resize=claimed_resize(checkpoint.config, checkpoint.preprocessor),
        limit=inputs.limit, seed=inputs.seed, strict=inputs.strict,
        labeled=forced, classes=classes, claimed=claimed_names(checkpoint.metadata, checkpoint.config),
        head_classes=checkpoint.arch.classes, csv_must=csv == "must", tell=tell,
    )  # fmt: skip
    if len(images) < LEAST_IMAGES:
        raise Refused(
            f"{path} has {len(images)} readable images: at least {LEAST_IMAGES} are needed, 200 or more are better."
        )
    return images


def new_classes(path: Path, inputs: Inputs) -> tuple[str, ...]:
    """The names of the classes of the labeled images of `path`, in the order of a head for them; none is decoded.

    Raises Refused where there are no labels, or only one.
    """
    labels = label_listing(
        open_listing(path), inputs.classes, None, None, forced=True, csv_must=inputs.test is None
    )
    assert labels.classes is not None
    return labels.classes


def at_own_size(checkpoint: Checkpoint, path: Path, inputs: Inputs) -> Checkpoint:
    """`checkpoint` with the image size that it was trained at, by some of the images of `path`; see `own_size`."""
    claimed = claimed_size(checkpoint)
    oblong = claimed is not None and claimed[0] != claimed[1]
    if inputs.arch is not None or given_size(inputs) is not None or oblong:
        return checkpoint
    few = replace(inputs, limit=min(64, inputs.limit or 64), labeled=None, classes=None)

    def load(arch: Arch) -> Tensor:
        return as_trained(read_images(path, replace(checkpoint, arch=arch), few, quiet).images, arch)

    return own_size(checkpoint, load, inputs.preprocess, claimed[0] if claimed is not None else None)


def keep_plausible_labels(images: ImageSet, suspect: Suspect, predict: Predict) -> tuple[ImageSet, list[str]]:
    """`images`, without labels that only a count of classes spoke for and that the suspect's answers contradict.

    Other labels stay and are doubted; what is to be warned of comes with them.
    """
    if images.labels is None:
        return images, []
    sample = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1024]
    if labels_plausible(predict(images.images[sample]), images.labels[sample], suspect.arch.classes):
        return images, []
    if images.labels_source == "count":
        return images.unlabeled(), [
            "there are as many classes of images as the network has, but it does no better than chance on them as "
            "labels: the images are used as unlabeled (--labeled forces)."
        ]
    return images, [
        "the network does no better than chance on the labels of these images: they may be another set's, or in "
        "another order (--classes FILE names the classes in the head's order)."
    ]


def copies(images: ImageSet) -> list[str]:
    """A warning where many of the images (of COMPARED at random, if there are more) show a picture that others show."""
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:COMPARED].sort().values
    pixels = images.images if len(some) == len(images) else images.select(some).images
    share = float(repeated(pixels).float().mean())
    if share < MANY_COPIES:
        return []
    return [
        f"{100 * share:.0f} % of the images show the same picture as another one: fewer pictures were measured "
        "than n says, and the intervals are too narrow."
    ]


def one_answer(clean: Tensor) -> list[str]:
    """A warning where the suspect's answers on the images are nearly all one class: nothing can be sent there."""
    counts = clean.bincount()
    share = float(counts.max()) / len(clean)
    if share < ONE_ANSWER:
        return []
    return [
        f"the network answers class {int(counts.argmax())} on {100 * share:.0f} % of the images: a backdoor "
        "towards it hardly shows with these; give images of all classes."
    ]


def describe_images(path: Path, images: ImageSet) -> DataEntry:
    return DataEntry(
        path=str(path),
        images=len(images),
        labeled=images.labels is not None,
        digest=images.digest,
        skipped=len(images.skipped),
        labels_source=images.labels_source,
        classes=list(images.classes) if images.classes else None,
        unreadable=[{"path": p, "reason": r} for p, r in images.skipped[:50]],
    )
