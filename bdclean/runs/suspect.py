"""The suspect as it was opened: its image size, its normalisation, its architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bdclean.errors import Refused
from bdclean.networks.ambiguity.choosing import Choice, choose
from bdclean.networks.ambiguity.variant import read_off
from bdclean.networks.arch import Arch
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.checkpoint.claims import claim, claimed_resize
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.recognition.identify import accepts
from bdclean.record.run import CheckpointEntry, RunRecord
from bdclean.runs.options import Inputs

ROUNDS = 3
"""So often normalisation and architecture are chosen in turn until the architecture stays."""


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
