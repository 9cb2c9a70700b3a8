"""The normalisations under which a checkpoint may be meant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bdclean.networks.ambiguity.normalisation import BESIDE, decide, looked_at
from bdclean.networks.checkpoint.claims import claim
from bdclean.networks.normalisation import Preprocess, parse_preprocess

if TYPE_CHECKING:
    from bdclean.networks.checkpoint.checkpoint import Checkpoint


AUTHORS = "the authors' layout"
NEAR = 0.2
"""Normalisations that differ by no more for any pixel, in units of 4 from black to white, do not contradict
each other."""


@dataclass(frozen=True)
class Choice:
    """One plausible normalisation. `source` says who names it: given, metadata, config.json, the file's mean and std,
    first normalisation layer, labels (accuracy), spread of answers, the authors' layout (what they use, of an encoder),
    no evidence.

    `margin`: distance of the nearest other candidate over the largest distance that still counts as plausible, so
    above 1 the choice is clear. NaN where no distances were compared.
    """

    preprocess: Preprocess
    margin: float
    source: str


def choose(
    checkpoint: Checkpoint, images: Tensor, given: str = "auto", labels: Tensor | None = None
) -> list[Choice]:
    """The plausible normalisations, the likeliest first; more than one where it is unclear or a claim is contradicted.

    `images`: uint8 [n c h w] at the network's input size, with their `labels` [n], if known. `given`: what the user
    says, which settles it, or `auto`.
    """
    channels = checkpoint.arch.input[0]
    if given != "auto":
        return [Choice(parse_preprocess(given).of_channels(channels), math.nan, "given")]
    said = claim(checkpoint.metadata, checkpoint.config, checkpoint.preprocessor, checkpoint.layer)
    if said is not None:
        said = said[0].of_channels(channels), said[1]
    network = checkpoint.build()
    # A folder is read class by class: its first images would have the colours of one class.
    count = looked_at(images)[-1]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    known = None if labels is None else labels[order]
    if checkpoint.arch.kind == "encoder":
        return of_encoder(network, images[order], said, checkpoint.arch.usual_preprocess)
    kept, margin, source = decide(network, images[order], said[0] if said else None, known)
    return [Choice(p, margin, said[1] if said is not None and p == said[0] else source) for p in kept]


def alike(choices: Sequence[Choice]) -> bool:
    """Whether the plausible normalisations hardly differ, so that the likeliest may stand for all."""
    return all(choice.preprocess.gap(choices[0].preprocess) <= BESIDE for choice in choices[1:])


def contradiction(
    checkpoint: Checkpoint, images: Tensor, given: str, labels: Tensor | None = None
) -> str | None:
    """What speaks against the normalisation that the user says, as a sentence; None where nothing does.

    Arguments as in `choose`. The given one is obeyed all the same: a wrong one was seen to hide a backdoor.
    """
    if given == "auto":
        return None
    named = parse_preprocess(given).of_channels(images.shape[1])
    others = choose(checkpoint, images, "auto", labels)
    if any(other.preprocess.gap(named) <= NEAR and other.preprocess.bgr == named.bgr for other in others):
        return None
    titles = " or ".join(dict.fromkeys(f"{other.preprocess.title} ({other.source})" for other in others[:2]))
    return (
        f"--preprocess {named.title} is obeyed, but contradicted by what the network itself shows, which speaks for "
        f"{titles}: a wrong normalisation can hide a backdoor."
    )


def of_encoder(
    network: nn.Module, images: Tensor, said: tuple[Preprocess, str] | None, usual: str
) -> list[Choice]:
    """The same for a network whose answers are features: no answer or label speaks.

    The first normalisation layer decides, else the claim, else what the authors of such files use (`usual`), which is
    first where it is plausible, and unlike a claim is dropped where it is not. Nothing known at all leaves every
    normalisation plausible.
    """
    authors = parse_preprocess(usual).of_channels(images.shape[1]) if usual else None
    first = said[0] if said is not None else authors
    kept, margin, source = decide(network, images, first, probabilities=False)
    if said is None and len(kept) > 1 and authors in kept and kept[0] != authors:
        kept.remove(authors)
    names = {first: said[1] if said is not None else AUTHORS} if first is not None else {}
    return [Choice(p, margin, names.get(p, source)) for p in kept]
