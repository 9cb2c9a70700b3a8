"""What scan and cleanse are given, and how it is opened: checkpoint, images, normalisation, device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bdclean import registry
from bdclean.architectures import Arch
from bdclean.architectures.claimed import accepts
from bdclean.checkpoint import Checkpoint
from bdclean.data import ImageSet, claimed_names, labels_plausible, load_images, repeated
from bdclean.data.classfile import FileLabels, read_class_file
from bdclean.errors import Refused
from bdclean.folding import folded
from bdclean.measure import Trigger
from bdclean.metrics import Predictor
from bdclean.preprocessing import Choice, Classifier, choose, claim, claimed_resize, parse_preprocess
from bdclean.readings import own_size, read_off
from bdclean.record import CheckpointEntry, DataEntry, RunRecord
from bdclean.training import Tell, quiet
from bdclean.triggers.bank import bank


@dataclass(frozen=True)
class Inputs:
    """The options that scan and cleanse share, as typed."""

    data: Path | None = None
    test: Path | None = None
    labeled: Path | None = None
    classes: Path | None = None
    arch: str | None = None
    kind: str = "auto"
    preprocess: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    batch_size: int | None = None
    limit: int = 2000
    seed: int = 0
    strict: bool = False
    allow_pickle: bool = False
    pictures: bool = True
    argv: tuple[str, ...] = ()


LEAST_IMAGES = 20
"""Under this many images nothing can be said about anything."""
COMPARED, MANY_COPIES = 20_000, 0.1
"""So many images are searched for copies of each other, and a warning says so if this share or more are copies."""
ROUNDS = 3
"""So often normalisation and architecture are chosen in turn until the architecture stays."""
PROBED = 2
"""Images that a folded network is checked with."""
ONE_ANSWER = 0.9
"""From this share on, a set of images counts as one class's."""


def resolve_device(name: str) -> torch.device:
    """The device that `--device` names; raises Refused where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Refused(
            f"there is no {name} here ({torch.cuda.device_count()} CUDA devices): use --device cpu."
        )
    return device


@dataclass
class Suspect:
    """A checkpoint that was read, how its pixels may be meant, and the networks that follow from it."""

    checkpoint: Checkpoint
    arch: Arch
    choices: list[Choice]
    device: torch.device

    def classifier(self, choice: Choice) -> Classifier:
        """The network behind `choice`, in evaluation mode on the device."""
        network = self.checkpoint.build(self.device, self.arch)
        return Classifier(network, choice.preprocess).eval().to(self.device)


CSV = Literal["must", "may", "not"]


def input_size(checkpoint: Checkpoint, inputs: Inputs) -> tuple[int, int]:
    """Height and width: what `--preprocess` says, else what the file claims, else the architecture's own.

    Raises Refused where the network cannot be run on what the user says; such a claim is passed over.
    """
    given = given_size(inputs)
    if given is not None and not accepts(checkpoint.arch, given):
        own = "x".join(map(str, checkpoint.arch.input[1:]))
        raise Refused(
            f"{checkpoint.arch.name} cannot be run on images of {given[0]}x{given[1]}: leave size out, it is {own}."
        )
    size = given or claimed_size(checkpoint)
    return size or (checkpoint.arch.input[1], checkpoint.arch.input[2])


def given_size(inputs: Inputs) -> tuple[int, int] | None:
    """The height and width that `--preprocess` says, if it says any."""
    return parse_preprocess(inputs.preprocess).size if inputs.preprocess != "auto" else None


def claimed_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """The height and width that the file claims, if its network can be run on them."""
    said = claim(checkpoint.metadata, checkpoint.config, checkpoint.preprocessor)
    size = said[0].size if said is not None else None
    return size if size is not None and accepts(checkpoint.arch, size) else None


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
        path, input_size(checkpoint, inputs), resize=claimed_resize(checkpoint.config, checkpoint.preprocessor),
        limit=inputs.limit, seed=inputs.seed, strict=inputs.strict,
        labeled=forced, classes=classes, claimed=claimed_names(checkpoint.metadata, checkpoint.config),
        head_classes=checkpoint.arch.classes, csv_must=csv == "must", tell=tell,
    )  # fmt: skip
    if len(images) < LEAST_IMAGES:
        raise Refused(
            f"{path} has {len(images)} readable images: at least {LEAST_IMAGES} are needed, 200 or more are better."
        )
    return images


def at_own_size(checkpoint: Checkpoint, path: Path, inputs: Inputs) -> Checkpoint:
    """`checkpoint` with the image size that it was trained at, by some of the images of `path`; see `own_size`."""
    given = given_size(inputs)
    if inputs.arch is not None or given is not None or claimed_size(checkpoint) is not None:
        return checkpoint
    few = replace(inputs, limit=min(64, inputs.limit or 64), labeled=None, classes=None)

    def load(arch: Arch) -> Tensor:
        return read_images(path, replace(checkpoint, arch=arch), few, quiet).images

    return own_size(checkpoint, load, inputs.preprocess)


def understand(
    checkpoint: Checkpoint,
    images: Tensor,
    inputs: Inputs,
    record: RunRecord,
    labels: Tensor | None = None,
) -> Suspect:
    """Choose the normalisation, then the architecture where several fit, and note both in the record.

    Raises Refused where it is unclear which architecture it is; what was compared is in the record then, too.
    """
    if checkpoint.arch.classes < 2:
        raise Refused("the network has one output: two classes or more are needed to tell where images go.")
    device = resolve_device(inputs.device)
    record.device = str(device)
    for _ in range(ROUNDS):  # which one it is tells how to normalise, and the other way round
        choices = choose(checkpoint, images, inputs.preprocess, labels)
        reading = read_off(checkpoint, choices[0], images, labels, inputs.arch is not None)
        if reading.arch == checkpoint.arch:
            break
        checkpoint = replace(checkpoint, arch=reading.arch)
    else:
        choices = choose(checkpoint, images, inputs.preprocess, labels)
    arch, others = reading.arch, reading.others
    record.checkpoint.alternatives, record.checkpoint.architecture_margin = others, reading.margin
    if reading.doubt:
        raise Refused(reading.doubt)
    if reading.warning:
        record.warnings.append(reading.warning)
    others += [
        {"name": c.preprocess.name or c.preprocess.spec(), "reason": f"plausible normalisation ({c.source})"}
        for c in choices[1:]
    ]
    first = choices[0]
    entry = record.checkpoint
    entry.architecture = arch.name
    entry.mean, entry.std = list(first.preprocess.mean), list(first.preprocess.std)
    entry.preprocess, entry.preprocess_source = first.preprocess.name or first.preprocess.spec(), first.source
    entry.preprocess_margin = first.margin if math.isfinite(first.margin) else None
    entry.input_size = [3, *images.shape[2:]]
    entry.alternatives = others
    return Suspect(checkpoint, arch, choices, device)


def keep_plausible_labels(
    images: ImageSet, suspect: Suspect, predict: Predictor, record: RunRecord
) -> ImageSet:
    """`images`, without labels that only a count of classes spoke for and that the suspect's answers contradict.

    Other labels stay and are doubted in a warning.
    """
    if images.labels is None:
        return images
    sample = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1024]
    if labels_plausible(predict(images.images[sample]), images.labels[sample], suspect.arch.classes):
        return images
    guessed = images.labels_source == "count"
    warn_once(
        record,
        "there are as many classes of images as the network has, but it does no better than chance on them as labels: "
        "the images are used as unlabeled (--labeled forces)."
        if guessed
        else "the network does no better than chance on the labels of these images: they may be another set's, or in "
        "another order (--classes FILE names the classes in the head's order).",
    )
    return images.unlabeled() if guessed else images


def warn_of_copies(images: ImageSet, record: RunRecord) -> None:
    """A warning where many of the images (of COMPARED at random, if there are more) show a picture that others show."""
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:COMPARED].sort().values
    pixels = images.images if len(some) == len(images) else images.select(some).images
    share = float(repeated(pixels).float().mean())
    if share >= MANY_COPIES:
        warn_once(
            record,
            f"{100 * share:.0f} % of the images show the same picture as another one: fewer pictures were measured "
            "than n says, and the intervals are too narrow.",
        )


def warn_of_one_answer(clean: Tensor, record: RunRecord) -> None:
    """A warning where the suspect's answers on the images are nearly all one class: nothing can be sent there."""
    counts = clean.bincount()
    share = float(counts.max()) / len(clean)
    if share >= ONE_ANSWER:
        warn_once(
            record,
            f"the network answers class {int(counts.argmax())} on {100 * share:.0f} % of the images: a backdoor "
            "towards it hardly shows with these; give images of all classes.",
        )


def warn_once(record: RunRecord, warning: str) -> None:
    if warning not in record.warnings:
        record.warnings.append(warning)


def describe_checkpoint(checkpoint: Checkpoint, path: Path) -> CheckpointEntry:
    read = [checkpoint.tensors[name] for name in checkpoint.names]
    return CheckpointEntry(
        path=str(path),
        sha256=checkpoint.sha256,
        format=checkpoint.format,
        architecture=checkpoint.arch.name,
        kind="classifier",
        classes=checkpoint.arch.classes,
        parameters=sum(t.numel() for t in read if t.is_floating_point()),
        unread=list(checkpoint.unread),
        resize=claimed_resize(checkpoint.config, checkpoint.preprocessor).spec(),
    )


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


def make_triggers(specs: Sequence[str], size: tuple[int, int]) -> list[Trigger]:
    """The triggers that were given, else the stock bank at the input size; raises where one does not fit the images."""
    if not specs:
        return list(bank(size))
    made = []
    for spec in specs:
        name, settings = registry.parse_spec(spec)
        trigger = registry.configure(registry.load(registry.TRIGGERS, name), settings)
        trigger(
            torch.zeros((1, 3, *size), dtype=torch.uint8)
        )  # a patch that does not fit is refused before any work
        made.append(trigger)
    return made


def make_predictor(model: Classifier, device: torch.device, inputs: Inputs, images: Tensor) -> Predictor:
    """Predictions of `model`, whose batch norms are folded away where that does not change its answers to `images`."""
    # 64 on a processor: what flows through a small network then stays in its caches (measured: 64 is best or as good
    # as any size, at 32 and at 224 pixels), and a large network needs little memory.
    size = inputs.batch_size or (1000 if device.type == "cuda" else 64)
    return Predictor(folded(model, images[:PROBED]), device, size)
