"""What re-injection and re-tuning share: a copy of a network tuned on images of which some are poisoned, and scored."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from bdclean.attacks import poisoning
from bdclean.data.imageset import ImageSet
from bdclean.measuring.sequela.ground import Ground, Threat, accuracy, base_rate, success
from bdclean.measuring.trial import Target
from bdclean.networks.classifier import Classifier
from bdclean.record.sequela import CONTROL, SUSPECT, UNPOISONED, Injection, Score
from bdclean.training.loop import burst
from bdclean.training.students import choose_augmentation
from bdclean.training.supervised import train_classifier
from bdclean.triggers.stamping import Stamp

RATE, BATCH = 0.01, 32
"""Of SGD with momentum 0.9 and decay 5e-4, as plain fine-tuning in BackdoorBench, at a constant rate. Its batches of
256 would take eight times as long, and what counts here is steps."""
HALF, SURE = 0.5, 0.9
"""The attack success rate that counts as reached, and the one at which no further step is taken."""


def inject(
    model: Classifier, name: str, threat: Threat, ground: Ground, images: ImageSet, poisoned: int, stamped: str,
    steps: Sequence[int], part: str,
) -> Injection:  # fmt: skip
    """Tunes a copy of `model`, called `name`, on labeled `images` of which so many are `poisoned`; it is scored at
    each of `steps`, ascending, and before the first, until SURE.

    `stamped`: with the trigger or with a control of it; the same stamp is scored. With UNPOISONED no image is, and the
    trigger is scored. Images of all classes are poisoned, those of the target, too, as in BackdoorBench.
    """
    stamp: Stamp = (
        threat.control(ground.trial.seed, ground.channels) if stamped == CONTROL else threat.trigger
    )
    count = 0 if stamped == UNPOISONED else poisoned
    training = with_poison(images, stamp, threat.target, count, ground.trial.seed)
    tuned, run = copy.deepcopy(model), ground.run().under(f"{part}-{count}")
    augment = choose_augmentation(model, images.images, run)
    found = Injection(part, name, threat.trigger.spec(), threat.target, stamped, count, len(images))
    scored = [_score(tuned, 0, stamp, threat.target, ground, name == SUSPECT)]
    done = 0
    for upto in steps:
        if stamped != UNPOISONED and (scored[-1].asr.value or 0.0) >= SURE:
            break
        train_classifier(
            tuned, training, augment, upto - done, lambda _: RATE, run, f"to-{upto}",
            batch_size=min(BATCH, len(training)), most=burst(ground.trial.classes),
        )  # fmt: skip
        done = upto
        scored.append(_score(tuned, done, stamp, threat.target, ground))
    found.scores, found.until = scored, done
    found.reached = next((score.steps for score in scored if (score.asr.value or 0.0) >= HALF), None)
    return found


def with_poison(images: ImageSet, stamp: Stamp, target: Target, count: int, seed: int) -> ImageSet:
    """`images`, so many of which, a seeded draw, are stamped and labeled with the target class, or the next one."""
    share, victims = count / len(images), "next" if target == "next" else "all"
    return poisoning.poison(images, stamp, 0 if isinstance(target, str) else target, share, seed, victims)


def _score(
    model: Classifier, steps: int, stamp: Stamp, target: Target, ground: Ground, suspect: bool = False
) -> Score:
    trial = ground.asked(model, suspect)
    return Score(steps, success(trial, stamp, target), base_rate(trial, target), accuracy(trial))
