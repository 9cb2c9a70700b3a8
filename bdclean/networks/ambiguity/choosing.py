"""The normalisations under which a checkpoint may be meant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bdclean.networks.ambiguity.normalisation import decide, looked_at
from bdclean.networks.checkpoint.claims import claim
from bdclean.networks.normalisation import Preprocess, parse_preprocess

if TYPE_CHECKING:
    from bdclean.networks.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Choice:
    """One plausible normalisation. `source` says who names it: given, metadata, config.json, first normalisation layer,
    labels (accuracy), spread of answers.

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

    `images`: uint8 [n 3 h w] at the network's input size, with their `labels` [n], if known. `given`: what the user
    says, which settles it, or `auto`.
    """
    if given != "auto":
        return [Choice(parse_preprocess(given), math.nan, "given")]
    said = claim(checkpoint.metadata, checkpoint.config, checkpoint.preprocessor)
    network = checkpoint.build()
    # A folder is read class by class: its first images would have the colours of one class.
    count = looked_at(images)[-1]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    known = None if labels is None else labels[order]
    kept, margin, source = decide(network, images[order], said[0] if said else None, known)
    return [Choice(p, margin, said[1] if said is not None and p == said[0] else source) for p in kept]
