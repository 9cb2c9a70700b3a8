"""The suspect, and what was made of it, on the images that they are measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bdclean.data.imageset import ImageSet
from bdclean.measuring.trial import Bench, make_predictor
from bdclean.networks.ambiguity.choosing import Choice
from bdclean.progress import Tell
from bdclean.record.run import RunRecord
from bdclean.runs.images import (
    keep_plausible_labels,
    warn_of_one_answer,
)
from bdclean.runs.options import Inputs
from bdclean.runs.suspect import Suspect


def after_writing(out: Path, suspect: Suspect, before: Bench, inputs: Inputs, tell: Tell) -> Bench:
    """The written file, read back, on the images and reference classes of `before`."""
    written = Suspect(suspect.checkpoint.again(out), suspect.arch, suspect.choices, suspect.device)
    predict = make_predictor(
        written.classifier(suspect.choices[0]), suspect.device, inputs.batch_size, before.images
    )
    return replace(before, predict=predict, clean=predict(before.images), own_reference=False, hits={})


def open_bench(
    suspect: Suspect,
    choice: Choice,
    images: ImageSet,
    inputs: Inputs,
    threshold: float,
    record: RunRecord,
    tell: Tell,
) -> Bench:
    """The suspect on `images`: held against labels where they are plausible, else against its own clean answers."""
    predict = make_predictor(suspect.classifier(choice), suspect.device, inputs.batch_size, images.images)
    kept = keep_plausible_labels(images, suspect, predict, record)
    clean = predict(images.images)
    warn_of_one_answer(clean, record)
    reference = clean if kept.labels is None else kept.labels
    return Bench(
        predict, images.images, reference, clean, suspect.arch.classes, kept.labels is not None, kept.labels is None,
        threshold, inputs.seed, tell, len(suspect.choices),
    )  # fmt: skip
