"""Re-tuning: does a little fine-tuning, with a few poisoned images, bring the backdoor back at once?

It does on most published repairs (Min et al., NeurIPS 2024, arXiv 2410.09838): what they hid was not gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from bdclean.errors import Refused
from bdclean.measuring.sequela.ground import Ground, Threat
from bdclean.measuring.sequela.tuning import inject
from bdclean.networks.classifier import Classifier
from bdclean.record.sequela import CONTROL, TRIGGER, UNPOISONED, Injection

NAME = "retuning"
SHARE, POISONED, LEAST = 0.02, 0.1, 50
"""Of the given images so many are tuned on, of which so many are poisoned; not fewer than LEAST, where there are."""
STEPS = (10, 20, 50, 100)


def retune(networks: Mapping[str, Classifier], threat: Threat, ground: Ground) -> Iterator[Injection]:
    """`networks` by name, each tuned with the trigger, with a control of it, and without any poison.

    Raises Refused where there are fewer than LEAST images. The share is of the given images, which an attacker's are
    not; a trainer's set, of which the paper's 2 % are, is not known.
    """
    images = ground.tuning
    if len(images) < LEAST:
        raise Refused(f"{len(images)} images to tune on: {LEAST} or more are needed.")
    seeded = torch.Generator().manual_seed(ground.trial.seed)
    few = images.select(
        torch.randperm(len(images), generator=seeded)[: max(LEAST, round(SHARE * len(images)))]
    )
    poisoned, done = max(1, round(POISONED * len(few))), 0
    for name, model in networks.items():
        for stamped in (TRIGGER, CONTROL, UNPOISONED):
            yield inject(model, name, threat, ground, few, poisoned, stamped, STEPS, NAME)
            done += 1
            ground.trial.tell(NAME, done, 3 * len(networks))
