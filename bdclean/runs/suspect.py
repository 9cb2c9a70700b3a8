"""The suspect as it was opened: its image size, its normalisation, its architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdclean.data.labels.labelling import claimed_names
from bdclean.errors import Refused
from bdclean.networks.ambiguity.choosing import AUTHORS, Choice, choose, contradiction
from bdclean.networks.ambiguity.variant import read_off
from bdclean.networks.arch import Arch
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.checkpoint.claims import OWN_LAYER, claim, claimed_resize
from bdclean.networks.checkpoint.new_head import check_recognised, with_new_head, without_head
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.recognition.identify import accepts
from bdclean.networks.recognition.variants import SIZED
from bdclean.record.run import NO_EVIDENCE, NOT_ASSESSED, CheckpointEntry, NewHead, RunRecord, Skipped
from bdclean.runs.options import Inputs
from bdclean.training import parallel
from bdclean.training.pretraining.augmentations import Views

CLAIMED = ("metadata", "config.json", OWN_LAYER, AUTHORS)
"""What an encoder's normalisation may be told by. Where its statistics do not speak against that, it is believed: they
are of views whose colours were changed, and do not part near ones as a classifier's do."""
TELLING, TELLING_PIXELS = 128, 1 << 20
"""How many views are made: 1,024 of 32 x 32, and TELLING or more of larger ones."""
ROUNDS = 3
"""So often normalisation and architecture are chosen in turn until the architecture stays."""


def resolve_device(name: str) -> torch.device:
    """The device that `--device` names; raises Refused where it is not there. torchrun gives each process its own."""
    if name != "cpu" and parallel.joined() and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
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
    others: list[dict[str, Any]] = field(default_factory=list)
    """Architectures that fit as well, each with the reason that it was not taken."""
    margin: float | None = None
    doubt: str = ""
    """Why it is unclear which architecture it is, where it is."""
    warnings: list[str] = field(default_factory=list)
    new_head: NewHead | None = None
    """Of a network that was given one for another task."""

    def classifier(self, choice: Choice) -> Classifier:
        """The network behind `choice`, in evaluation mode on the device."""
        network = self.checkpoint.build(self.device, self.arch)
        return Classifier(network, choice.preprocess).eval().to(self.device)

    def without_head(self) -> Suspect:
        """The encoder that it is; raises Refused where it is none."""
        checkpoint = without_head(self.checkpoint)
        return replace(self, checkpoint=checkpoint, arch=checkpoint.arch)

    def with_new_head(self, classes: Sequence[str], seed: int, spec: str | None) -> Suspect:
        """The same network as a classifier of other `classes`, whose file would be recognised; raises Refused else."""
        checkpoint = with_new_head(self.checkpoint, classes, seed)
        check_recognised(checkpoint, spec)
        own = self.checkpoint
        left_out = [entry.name for entry in own.entries if entry.name not in own.names]
        head = NewHead(checkpoint.arch.head, list(classes), left_out)
        return replace(self, checkpoint=checkpoint, arch=checkpoint.arch, new_head=head)


def input_size(checkpoint: Checkpoint, inputs: Inputs) -> tuple[int, int]:
    """Height and width: what `--preprocess` says, else what statistics told, else what the file claims, else the usual.

    Raises Refused where the network cannot be run on what the user says; such a claim is passed over.
    """
    given = given_size(inputs)
    if given is not None and not accepts(checkpoint.arch, given):
        own = "x".join(map(str, checkpoint.arch.input[1:]))
        raise Refused(
            f"{checkpoint.arch.name} cannot be run on images of {given[0]}x{given[1]}: leave size out, it is {own}."
        )
    if given is not None:
        return given
    claimed = None if SIZED.search(checkpoint.arch.name) else claimed_size(checkpoint)
    return claimed or (checkpoint.arch.input[1], checkpoint.arch.input[2])


def given_size(inputs: Inputs) -> tuple[int, int] | None:
    """The height and width that `--preprocess` says, if it says any."""
    return parse_preprocess(inputs.preprocess).size if inputs.preprocess != "auto" else None


def claimed_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """The height and width that the file claims, if its network can be run on them."""
    said = claim(checkpoint.metadata, checkpoint.config, checkpoint.preprocessor, checkpoint.layer)
    size = said[0].size if said is not None else None
    return size if size is not None and accepts(checkpoint.arch, size) else None


def understand(
    checkpoint: Checkpoint,
    images: Tensor,
    preprocess: str,
    labels: Tensor | None,
    sure: bool,
    device: torch.device,
) -> Suspect:
    """Choose the normalisation, then the architecture where several fit, by `images` uint8 [n c h w].

    `preprocess` is what the user says or `auto`; `sure`: the user named the architecture.
    """
    if checkpoint.arch.kind == "classifier" and checkpoint.arch.classes < 2:
        raise Refused("the network has one output: two classes or more are needed to tell where images go.")
    images = as_trained(images, checkpoint.arch)
    if checkpoint.arch.kind == "encoder":
        labels = None  # its answers are no classes
    for _ in range(ROUNDS):  # which one it is tells how to normalise, and the other way round
        choices = choose(checkpoint, images, preprocess, labels)
        reading = read_off(checkpoint, choices[0], images, labels, sure)
        if reading.arch == checkpoint.arch:
            break
        checkpoint = replace(checkpoint, arch=reading.arch)
    else:
        choices = choose(checkpoint, images, preprocess, labels)
    if reading.arch.kind == "encoder" and choices[0].source in CLAIMED:
        choices = choices[:1]
    against = contradiction(checkpoint, images, preprocess, labels)
    if reading.doubt and against is not None:
        # Under a wrong normalisation the statistics part no architectures: its own tells which it is.
        (own, *_) = choose(checkpoint, images, "auto", labels)
        reading = read_off(checkpoint, own, images, labels, sure)
        checkpoint = replace(checkpoint, arch=reading.arch)
    warnings = [warning for warning in (reading.warning, against) if warning]
    return Suspect(
        checkpoint,
        reading.arch,
        choices,
        device,
        reading.others,
        reading.margin,
        reading.doubt or "",
        warnings,
    )


def as_trained(images: Tensor, arch: Arch) -> Tensor:
    """`images` as a network saw them in training, which its batch norm tells of: an encoder saw crops and colours.

    Of an encoder a draw of some of them: enough to tell, and views are floats.

    With them the right normalisation of an encoder is the nearest by far (0.0001, the next 0.0045; plain images 0.019
    and 0.011), and pictures do not seem to be of another size.
    """
    if arch.kind == "classifier":
        return images
    generator = torch.Generator().manual_seed(0)
    count = max(TELLING, TELLING_PIXELS // images[0, 0].numel())
    drawn = torch.randperm(len(images), generator=generator)[:count]
    views = Views()(images[drawn], generator)
    return (255 * views).round().to(torch.uint8)


def describe_suspect(entry: CheckpointEntry, suspect: Suspect, size: Sequence[int]) -> CheckpointEntry:
    """`entry` with how the suspect is read at `size`, height and width; in doubt, only with what was compared."""
    entry = replace(entry, alternatives=suspect.others, architecture_margin=suspect.margin)
    if suspect.doubt:
        return entry
    also = [
        {"name": c.preprocess.title, "reason": f"plausible normalisation ({c.source})"}
        for c in suspect.choices[1:]
    ]
    entry = replace(
        entry,
        architecture=suspect.arch.name,
        input_size=[suspect.arch.input[0], *size],
        alternatives=[*suspect.others, *also],
    )
    return describe_choice(entry, suspect.choices[0])


def describe_choice(entry: CheckpointEntry, choice: Choice) -> CheckpointEntry:
    """`entry` with the normalisation that is measured under."""
    preprocess = choice.preprocess
    return replace(
        entry,
        preprocess=preprocess.title,
        mean=list(preprocess.mean),
        std=list(preprocess.std),
        preprocess_source=choice.source,
        preprocess_margin=choice.margin if math.isfinite(choice.margin) else None,
    )


def describe_checkpoint(checkpoint: Checkpoint, path: Path) -> CheckpointEntry:
    read = [checkpoint.tensors[name] for name in checkpoint.names]
    return CheckpointEntry(
        path=str(path),
        sha256=checkpoint.sha256,
        format=checkpoint.format,
        architecture=checkpoint.arch.name,
        kind=checkpoint.arch.kind,
        classes=checkpoint.arch.classes or None,
        parameters=sum(t.numel() for t in read if t.is_floating_point()),
        unread=list(checkpoint.unread),
        resize=claimed_resize(checkpoint.config, checkpoint.preprocessor).spec(),
        layout=checkpoint.arch.layout or None,
        feature=checkpoint.arch.feature or None,
        feature_size=checkpoint.arch.width or None,
        matched=len(checkpoint.names),
        class_names=_class_names(checkpoint),
    )


def _class_names(checkpoint: Checkpoint) -> list[str] | None:
    """What the file calls its classes, if it names as many as it has."""
    names = claimed_names(checkpoint.metadata, checkpoint.config)
    return list(names) if names is not None and len(names) == checkpoint.arch.classes else None


def with_second(record: RunRecord, second: Mapping[str, str]) -> RunRecord:
    """`record`, without a pass where there is the network again with other weights, which nobody measured.

    `second`: where -> a sentence, as a Checkpoint has them.
    """
    if not second:
        return record
    left = [Skipped(name, why) for name, why in second.items()]
    record = replace(record, skipped=[*record.skipped, *left])
    if record.verdict != NO_EVIDENCE:
        return record
    return replace(record, verdict=NOT_ASSESSED, advice=next(iter(second.values())).rstrip("."))
