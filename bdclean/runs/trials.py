"""The suspect, and what was made of it, on the images that they are measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bdclean.data.imageset import ImageSet
from bdclean.measuring.trial import Trial, make_predictor, staying_share
from bdclean.networks.ambiguity.choosing import Choice
from bdclean.progress import Tell
from bdclean.runs.encoders import again, open_encoder_trial
from bdclean.runs.images import keep_plausible_labels, one_answer
from bdclean.runs.options import Inputs
from bdclean.runs.suspect import Suspect


def open_trial(
    suspect: Suspect, choice: Choice, images: ImageSet, inputs: Inputs, threshold: float, tell: Tell,
    probing: ImageSet | None = None,
) -> tuple[Trial, list[str]]:  # fmt: skip
    """The suspect on `images`, and what is to be warned of.

    It is held against labels where they are plausible, else against its own clean answers. An encoder's probes are
    trained on `probing`, else on a half of `images`.
    """
    predict = make_predictor(suspect.classifier(choice), suspect.device, inputs.batch_size, images.images)
    readings = len(suspect.choices)
    if suspect.arch.kind == "encoder":
        return open_encoder_trial(predict, images, probing, threshold, inputs.seed, readings, tell)
    clean = predict(images.images)
    kept, doubts = keep_plausible_labels(images, suspect, predict, clean=clean)
    reference = clean if kept.labels is None else kept.labels
    trial = Trial(
        predict, images.images, reference, clean, suspect.arch.classes, kept.labels is not None, kept.labels is None,
        threshold, inputs.seed, tell, readings,
        staying=staying_share(predict, images.images, clean),
    )  # fmt: skip
    if not trial.steady:
        doubts = [
            *doubts,
            f"The network changes {100 * (1 - trial.staying):.0f} % of its answers when images move by a sixteenth of "
            "their side, as one does that has hardly learnt its task: a trigger counts only from a higher rate on.",
        ]
    return trial, [*doubts, *one_answer(clean)]


def after_writing(out: Path, suspect: Suspect, before: Trial, inputs: Inputs) -> Trial:
    """The written file, read back, on the images and reference classes of `before`."""
    written = replace(suspect, checkpoint=suspect.checkpoint.again(out))
    predict = make_predictor(
        written.classifier(suspect.choices[0]), suspect.device, inputs.batch_size, before.images
    )
    if suspect.arch.kind == "encoder":
        return again(before, predict)
    return replace(before, predict=predict, clean=predict(before.images), own_reference=False, encoded=None)
