"""The images of a run: read, and doubted where they deserve it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bdclean.data.duplicates import repeated
from bdclean.data.imageset import ImageSet
from bdclean.data.labels.agreement import agreement
from bdclean.data.labels.classfile import FileLabels, read_class_file
from bdclean.data.labels.labelling import claimed_names, label_listing
from bdclean.data.loading import load_images, picture_sizes
from bdclean.data.shared import Shared
from bdclean.data.sources.opening import open_images as open_listing
from bdclean.errors import Refused, UsageError
from bdclean.measuring.trial import Predict, make_predictor
from bdclean.measuring.verdict import commonest
from bdclean.networks.ambiguity.size import of_most, own_size
from bdclean.networks.arch import Arch
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.checkpoint.claims import claimed_resize
from bdclean.networks.recognition.variants import SIZED
from bdclean.progress import Tell, quiet
from bdclean.record.run import DataEntry
from bdclean.runs.options import CSV, Inputs
from bdclean.runs.suspect import Suspect, as_trained, claimed_size, given_size, input_size, understand

LEAST_IMAGES = 20
"""Under this many images nothing can be said about anything."""
COMPARED, MANY_COPIES = 20_000, 0.1
"""So many images are searched for copies of each other, and a warning says so if this share or more are copies."""


TESTED = 512
"""So many images, drawn at random, tell whether labels are labels."""
ONE_ANSWER = 0.9
"""From this share on, a set of images counts as one class's."""


def read_images(
    path: Path,
    checkpoint: Checkpoint,
    inputs: Inputs,
    tell: Tell,
    *,
    forced: bool = False,
    csv: CSV = "must",
    shared: Shared | None = None,
) -> ImageSet:
    """The images of `path` at the network's input size; `forced`: their folders are labels, or the run is refused.

    `csv`: whether `--classes`, where it is a CSV of labels, must name some of these images, may, or is not about them.
    `shared`: what other runs of this command have read.
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
        shared=shared,
    )  # fmt: skip
    if len(images) < LEAST_IMAGES:
        if 0 < inputs.limit < LEAST_IMAGES:
            raise UsageError(f"--limit {inputs.limit} is too few: at least {LEAST_IMAGES} images are needed.")
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


def at_own_size(
    checkpoint: Checkpoint, path: Path, inputs: Inputs, shared: Shared | None = None
) -> Checkpoint:
    """`checkpoint` with the image size that it was trained at, by some of the images of `path`; see `own_size`."""
    claimed = claimed_size(checkpoint)
    oblong = claimed is not None and claimed[0] != claimed[1]
    named = inputs.arch is not None and SIZED.search(inputs.arch) is not None
    if named or given_size(inputs) is not None or oblong:
        return checkpoint
    few = replace(inputs, limit=min(64, inputs.limit or 64), labeled=None, classes=None)

    def load(arch: Arch) -> Tensor:
        images = read_images(path, replace(checkpoint, arch=arch), few, quiet, shared=shared)
        return as_trained(images.images, arch)

    if claimed is not None or not checkpoint.arch.of_user:
        return own_size(checkpoint, load, inputs.preprocess, claimed[0] if claimed is not None else None)
    pictures = picture_sizes(path, shared)
    found, most = own_size(checkpoint, load, inputs.preprocess, None, pictures), of_most(pictures)
    read = found.arch.input[1:]
    if not pictures or most == read:
        return found
    # said even where statistics fit: those of a small network did at half its size, too
    are = f"{most[0]}x{most[1]}" if most is not None else "of several sizes"
    note = (
        f"no size of the images is given: {checkpoint.arch.name} is read at {read[0]}x{read[1]}, and they are {are} "
        "(--preprocess NAME,size=H/W says it)."
    )
    return replace(found, warnings=(*found.warnings, note))


def keep_plausible_labels(
    images: ImageSet, suspect: Suspect, predict: Predict, training: bool = False, clean: Tensor | None = None
) -> tuple[ImageSet, list[str]]:
    """`images` with labels that the suspect's answers do not contradict, and what is to be warned of.

    `clean`: its answers to all of them, int64 [n], where they are known; else some are asked for.

    Labels in another order that has a name and fits far better are put into it. Where only a matching without a name
    fits, or labels that a count of classes alone spoke for do not hold, they are dropped; Refused is raised instead
    where the user said that they are labels. Others on which the suspect does no better than chance are doubted, and
    refused for `training`.
    """
    if images.labels is None:
        return images, []
    sample = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:TESTED]
    said = agreement(
        predict(images.images[sample]) if clean is None else clean[sample],
        images.labels[sample],
        images.classes,
        suspect.arch.classes,
        images.sure,
    )
    forced = images.labels_source == "forced"
    if said.verdict == "agrees":
        return images, []
    if said.verdict == "order":
        assert said.order is not None and said.places is not None
        return images.in_order(said.order, said.places, suspect.arch.classes), [
            f"the labels were read in another order than the network's: it is right on {said.right:.1%} of the images "
            f"that way and on {said.best:.1%} in {said.order}, which is used (--classes FILE names the classes in the "
            "head's order)."
        ]
    if said.verdict == "matching":
        why = (
            f"the network is right on {said.right:.1%} of the images as they are labeled, and on {said.best:.1%} if "
            "its classes are matched with the labels one to one: they are in an order of no known name"
        )
        remedy = "--classes FILE names the classes in the head's order"
        if forced:
            raise Refused(f"{why}: {remedy}.")
        return images.unlabeled(), [f"{why}, and the images are used as unlabeled ({remedy})."]
    if images.labels_source == "count":
        held = (
            "no better than chance" if said.verdict == "chance" else "no better than chance on most classes"
        )
        return images.unlabeled(), [
            f"there are as many classes of images as the network has, but it does {held} with them as "
            "labels: the images are used as unlabeled (--labeled forces)."
        ]
    if training and said.nearer_chance:
        raise Refused(
            f"the network is right on {said.right:.1%} of the images as they are labeled, no better than chance: "
            "training on these labels would destroy it. Name the classes in the head's order with --classes FILE, or "
            "use --head new where they are other classes."
        )
    held = "on the labels of these images" if said.verdict == "chance" else "on most classes of these images"
    return images, [
        f"the network does no better than chance {held}: they may be another set's, or in "
        "another order (--classes FILE names the classes in the head's order)."
    ]


def understand_labeled(
    checkpoint: Checkpoint, images: ImageSet, inputs: Inputs, device: torch.device
) -> tuple[Suspect, ImageSet, list[str]]:
    """The suspect as `images` tell it is to be read, the images with labels that it speaks for, and warnings.

    Labels that are none, or of another order, mislead the choice of normalisation and architecture: where the suspect
    does not agree with them it is read without, they are tried again, and what is left of them is heard.
    """

    def read(labels: Tensor | None) -> Suspect:
        sure = inputs.arch is not None
        return understand(checkpoint, images.images, inputs.preprocess, labels, sure, device)

    def tried(suspect: Suspect) -> tuple[ImageSet, list[str]]:
        classifier = suspect.classifier(suspect.choices[0])
        return keep_plausible_labels(
            images, suspect, make_predictor(classifier, device, inputs.batch_size, images.images)
        )

    if images.labels is None or checkpoint.arch.kind == "encoder":
        return read(images.labels), images, []
    suspect = read(images.labels)
    try:
        kept, doubts = tried(suspect)
        if not doubts:
            return suspect, kept, []
    except Refused:  # under this reading
        pass
    blind = read(None)
    kept, doubts = tried(blind)
    if kept.labels is None:
        return blind, kept, doubts
    return read(kept.labels), kept, doubts


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
    answer, share = commonest(clean)
    if share < ONE_ANSWER:
        return []
    return [
        f"the network answers class {answer} on {100 * share:.0f} % of the images: a backdoor "
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
