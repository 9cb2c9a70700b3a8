"""Re-injection: how many poisoned images, and how many steps, put the backdoor in again?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bdclean.errors import Refused
from bdclean.measuring.sequela.ground import Ground, Threat
from bdclean.measuring.sequela.tuning import inject
from bdclean.networks.classifier import Classifier
from bdclean.record.sequela import CONTROL, TRIGGER, Injection

NAME = "reinjection"
COUNTS, STEPS = (10, 50, 100, 500), (50, 100, 200, 500, 1000)
MOST_POISON = 0.5
"""Poisoned images are at most so large a share: with more the labels are wrong, rather than poisoned."""


def fitting(images: int) -> tuple[tuple[int, ...], str]:
    """The numbers of poisoned images that so many images allow, and why not the others, if there are such.

    Raises Refused where there is none.
    """
    counts = tuple(count for count in COUNTS if count <= MOST_POISON * images)
    left = [str(count) for count in COUNTS if count not in counts]
    if not counts:
        raise Refused(f"{images} images to tune on: {round(COUNTS[0] / MOST_POISON)} or more are needed.")
    if not left:
        return counts, ""
    needed = round(COUNTS[len(counts)] / MOST_POISON)
    return counts, (
        f"with {' and '.join(left)} poisoned images: there are {images:,} to tune on, {needed:,} or more are needed"
    )


def reinject(
    networks: Mapping[str, Classifier], threat: Threat, ground: Ground, counts: tuple[int, ...] = COUNTS
) -> Iterator[Injection]:
    """`networks` by name, each tuned with so many poisoned images: with the trigger, and with a control of it.

    The control, which has the place and strength of the trigger and other content, is what any new backdoor of this
    kind takes on the same network; a clean twin among the networks is what this trigger takes without a past. An output
    that obeys the trigger sooner than both still knows it. (2212.09067 asks the question; how it answered is not
    known to us: counts, steps and controls are our own.)
    """
    done, total = 0, len(networks) * len(counts) * 2
    for name, model in networks.items():
        for count in counts:
            for stamped in (TRIGGER, CONTROL):
                yield inject(model, name, threat, ground, ground.tuning, count, stamped, STEPS, NAME)
                done += 1
                ground.trial.tell(NAME, done, total)
