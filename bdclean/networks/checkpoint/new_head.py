"""A checkpoint for another task: the same network without its head, or with a fresh one for other classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bdclean.errors import Refused, UsageError
from bdclean.files.tensorfile import lay_out
from bdclean.files.text import shown
from bdclean.networks.arch import Arch
from bdclean.networks.checkpoint.checkpoint import CLASSES_KEY, CONFIG_KEY, CONFIG_PARTS, Checkpoint
from bdclean.networks.encoder import headed, submodule
from bdclean.networks.recognition.identify import identify, trunk
from bdclean.networks.recognition.matching import Match
from bdclean.networks.recognition.variants import SIZED

# What a file or its config says of the classes of the old task.
OLD_CLASSES = ("classes", "class_names", "id2label", "label2id", "label_names")


def without_head(checkpoint: Checkpoint) -> Checkpoint:
    """The encoder that a classifier is without its head; an encoder as it is. Raises Refused where there is none."""
    if checkpoint.arch.kind == "encoder":
        return checkpoint
    match = trunk(Match(checkpoint.arch, checkpoint.names, checkpoint.unread, checkpoint.parts))
    return replace(
        checkpoint,
        arch=match.arch,
        names=match.names,
        unread=match.unread,
        parts=match.parts,
        candidates=(match.arch,),
    )


def with_new_head(checkpoint: Checkpoint, classes: Sequence[str], seed: int) -> Checkpoint:
    """The classifier that `checkpoint` is with a fresh linear head for `classes`, drawn by `seed` as PyTorch does.

    A classifier keeps its names. An encoder gets those of the architecture itself, under which it is recognised as a
    classifier, and the head is called as it is there (`fc` of a ResNet). Only what the network reads is in it: other
    tensors (projectors, queues, text towers, second copies of the network) belong to the old task, and copies may hold
    the backdoor. Metadata and config say nothing of the old classes any more. Raises Refused where no place for a head
    is known.
    """
    try:
        arch = headed(checkpoint.arch, len(classes))
    except ValueError as error:
        raise Refused(f"{checkpoint.arch.name} cannot be given a new head: {error}.") from None
    own = checkpoint if checkpoint.arch.kind == "classifier" else _by_own_names(checkpoint)
    tensors = {e.name: own.tensors[e.name] for e in own.entries if e.name in own.names}
    names, parts = dict(own.names), dict(own.parts)
    floats = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    for name, values in fresh_head(arch, seed).items():
        key = next((key for key, to in names.items() if to == name), name)
        before = tensors.get(key)
        tensors[key], names[key] = values.to(floats[-1] if before is None else before.dtype), name
        parts.pop(key, None)
    metadata, config = _about(checkpoint, classes)
    return replace(
        checkpoint,
        arch=arch,
        candidates=(arch,),
        names=names,
        tensors=tensors,
        entries=lay_out(tensors),
        parts=parts,
        tied={},
        unread=(),
        metadata=metadata,
        config=config,
    )


def check_recognised(checkpoint: Checkpoint, spec: str | None) -> None:
    """Raises where nobody could read a file of these tensors as this classifier again, before any work is done on it.

    `spec`: the `--arch` of user code or of timm's, without which the suspect is not read either.
    """
    again = spec if spec is not None and ":" in spec else None
    shapes = {entry.name: entry.shape for entry in checkpoint.entries}
    name = SIZED.sub("", checkpoint.arch.name)
    try:
        found = identify(shapes, again, checkpoint.config)[0]
    except (Refused, UsageError) as error:
        raise Refused(f"{name} with a new head would not be recognised: {error}") from None
    if not any(match.arch.name == name and match.arch.kind == "classifier" for match in found):
        raise Refused(
            f"{shown(name)} with a new head would be read as {found[0].arch.name}: no file of it is written."
        )


def fresh_head(arch: Arch, seed: int) -> dict[str, Tensor]:
    """The tensors of the head of `arch` by the network's names, drawn by `seed` as PyTorch draws a linear layer."""
    place = submodule(arch, arch.head)
    assert isinstance(place, nn.Linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(place.in_features, place.out_features, place.bias is not None)
    return {f"{arch.head}.{name}": tensor.detach() for name, tensor in head.named_parameters()}


def _by_own_names(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with what the network reads under the network's own names, in the file's types."""
    types = {to: checkpoint.tensors[name].dtype for name, to in checkpoint.names.items()}
    tensors = {name: tensor.to(types[name]) for name, tensor in checkpoint.state().items()}
    return replace(
        checkpoint, tensors=tensors, names={n: n for n in tensors}, parts={}, entries=lay_out(tensors)
    )


def _about(checkpoint: Checkpoint, classes: Sequence[str]) -> tuple[dict[str, str], dict | None]:
    """Metadata and config with the new classes in place of the old ones.

    An encoder's config is of another class of networks and other names, except timm's, which is its own.
    """
    metadata = {k: v for k, v in checkpoint.metadata.items() if k not in (*OLD_CLASSES, CONFIG_KEY)}
    metadata[CLASSES_KEY] = json.dumps(list(classes))
    if checkpoint.config is None:
        return metadata, None
    foreign = checkpoint.arch.kind == "encoder" and checkpoint.arch.layout != "timm"
    gone = (*OLD_CLASSES, *(CONFIG_PARTS if foreign else ()))
    config = {k: v for k, v in checkpoint.config.items() if k not in gone}
    if "num_classes" in config:
        config["num_classes"] = len(classes)
    return metadata, config
