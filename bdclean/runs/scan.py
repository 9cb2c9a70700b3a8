"""Use case: a checkpoint, images and triggers -> a record of what they do to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bdclean.data.duplicates import without_duplicates
from bdclean.data.imageset import ImageSet
from bdclean.data.shared import Shared
from bdclean.errors import Refused, UsageError, attach
from bdclean.files.text import shown
from bdclean.measuring import pictures
from bdclean.measuring.assessment import assess, in_order
from bdclean.measuring.encoders import judged_as_encoder, unsaid
from bdclean.measuring.feature_map import feature_map
from bdclean.measuring.predictor import Predictor
from bdclean.measuring.rows import Measured
from bdclean.measuring.trial import Trial, make_predictor
from bdclean.measuring.verdict import clean_measures, verdict_on
from bdclean.networks.ambiguity.choosing import Choice
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.progress import Tell
from bdclean.record import gate
from bdclean.record.run import (
    BACKDOORED,
    NO_EVIDENCE,
    NOT_ASSESSED,
    SUSPICIOUS,
    CheckpointEntry,
    Finding,
    RunRecord,
    TriggerRow,
)
from bdclean.runs.detecting import Looked, choose_detectors, look
from bdclean.runs.encoders import again
from bdclean.runs.images import at_own_size, copies, describe_images, read_images, understand_labeled
from bdclean.runs.options import Inputs
from bdclean.runs.sequela import ATTACKS, after_scan, attacks, begun, check_kind, read_people
from bdclean.runs.suspect import (
    Suspect,
    describe_checkpoint,
    describe_choice,
    describe_suspect,
    input_size,
    resolve_device,
    understand,
    with_second,
)
from bdclean.runs.trials import open_trial
from bdclean.training import parallel
from bdclean.triggers.bank import make_triggers
from bdclean.triggers.stamping import Trigger

NEEDS_LABELS = "--reference is for encoders that are scanned with labeled images"


def scan(
    model: Path,
    inputs: Inputs,
    *,
    triggers: tuple[str, ...] = (),
    target: str = "auto",
    detectors: tuple[str, ...] = (),
    fail_on: tuple[str, ...] = (),
    tell: Tell,
    shared: Shared | None = None,
) -> RunRecord:
    """Measure `triggers` (the stock bank where none is given) on `model`, and run `detectors` (else the quick ones).

    Images that are in `shared` are not read again; with and without it the records are the same. Raises BdcleanError
    carrying the record.
    """
    record = RunRecord(
        "scan", seed=inputs.seed, argv=list(inputs.argv), precision="fp32",
        threshold=gate.parse(fail_on).threshold, checkpoint=CheckpointEntry(path=str(model)),
    )  # fmt: skip
    try:
        checkpoint = Checkpoint.read(model, inputs.arch, inputs.allow_pickle, inputs.kind)
        record = replace(record, checkpoint=describe_checkpoint(checkpoint, model))
        check_kind(checkpoint.arch.kind, inputs)
        looking, left = choose_detectors(detectors, checkpoint.arch.kind)
        record = replace(record, skipped=left)
        path = images_of(inputs, checkpoint.arch.kind)
        checkpoint = at_own_size(checkpoint, path, inputs, shared)
        record = record.warned(checkpoint.warnings)
        made = make_triggers(triggers, input_size(checkpoint, inputs), checkpoint.arch.kind)
        forced = path == inputs.labeled
        images = read_images(path, checkpoint, inputs, tell, forced=forced, shared=shared)
        record = replace(record, data=describe_images(path, images))
        record = record.warned([*images.warnings, *copies(images)])
        people = read_people(checkpoint, inputs, tell, shared)
        probing, duplicates = None, 0
        if inputs.labeled is not None and path != inputs.labeled:
            probing = read_images(inputs.labeled, checkpoint, inputs, tell, forced=True, shared=shared)
            probing, duplicates = without_duplicates(probing, images)
            if not len(probing):
                raise Refused(
                    f"every image of {inputs.labeled} is also among those to measure on: give others for the probes."
                )
        device = resolve_device(inputs.device)
        record = replace(record, device=str(device))
        suspect, images, doubts = understand_labeled(checkpoint, images, inputs, device)
        entry = describe_suspect(record.checkpoint, suspect, images.images.shape[2:])
        data = replace(describe_images(path, images), duplicates=duplicates)
        record = replace(record, checkpoint=entry, data=data)
        record = record.warned([*suspect.warnings, *doubts])
        if suspect.doubt:
            raise Refused(suspect.doubt)
        reference = read_reference(suspect, images, inputs)
        readings = []
        for choice in suspect.choices:
            trial, doubts = open_trial(
                suspect, choice, images, inputs, record.threshold or 0.0, tell, probing
            )
            aim, floor = check_target(target, trial), floor_of(reference, trial, inputs)
            found: list[TriggerRow] = []  # in the record before all are: a run may end early
            record = replace(record, triggers=found).warned(doubts)
            measured = []
            for each in assess(trial, made, aim):
                measured.append(each)
                found.append(each.row)
            looked = look(looking, suspect, choice, images.images, inputs, tell, asked=bool(detectors))
            ordered = in_order(measured, made)
            readings.append(_Reading.of(choice, trial, ordered, made, floor, looked, bool(triggers)))
        worst = _worst(readings)
        record = _conclude(record, worst, readings, made, inputs.pictures)
        if inputs.sequela:
            behind = begun(inputs, worst.trial)
            record = replace(record, sequela=behind.sequela)
            after_scan(
                behind, people, suspect.classifier(worst.choice), reference, suspect, images, worst.trial, made,
                worst.rows, inputs, bool(triggers),
            )  # fmt: skip
            skipped = [*record.skipped, *behind.skipped]
            record = replace(record, skipped=skipped).warned(behind.warnings)
        return with_second(record, checkpoint.second)
    except BaseException as error:  # whatever ends the run: what was measured so far belongs into its record
        attach(error, record)
        raise


@dataclass(frozen=True)
class _Reading:
    """What was measured under one plausible normalisation."""

    choice: Choice
    trial: Trial
    rows: list[TriggerRow]
    findings: list[Finding]
    looked: Looked
    verdict: str
    advice: str | None

    @staticmethod
    def of(
        choice: Choice,
        trial: Trial,
        measured: Sequence[Measured],
        made: Sequence[Trigger],
        floor: Trial | None,
        looked: Looked,
        named: bool,
    ) -> _Reading:
        rows, findings = judged_as_encoder(trial, [each.row for each in measured], made, floor)
        findings = [replace(finding, seen_on="suspect") for finding in [*findings, *looked.findings]]
        return _Reading(choice, trial, rows, findings, looked, *verdict_on(trial, rows, findings, named))


def _worst(readings: Sequence[_Reading]) -> _Reading:
    """The worst of the readings: not assessed is worse than no evidence."""
    rank = {BACKDOORED: 0, SUSPICIOUS: 1, NOT_ASSESSED: 2, NO_EVIDENCE: 3}
    return min(readings, key=lambda reading: rank[reading.verdict])


def _conclude(
    record: RunRecord, worst: _Reading, readings: Sequence[_Reading], made: Sequence[Trigger], shown: bool
) -> RunRecord:
    """`record` with the `worst` of the readings."""
    record = replace(
        record,
        verdict=worst.verdict,
        measures=clean_measures(worst.trial, worst.rows),
        triggers=worst.rows,
        findings=worst.findings,
        advice=worst.advice,
        pictures=[
            *(pictures.strips(worst.rows, made, worst.trial) if shown else []),
            *worst.looked.pictures,
        ],
        calibration=worst.looked.calibration or None,
        skipped=[*record.skipped, *worst.looked.skipped, *unsaid(worst.trial)],
        precision=worst.looked.precision or record.precision,
        forward_passes=passes([reading.trial for reading in readings]),
        confusion=pictures.confusions(worst.rows, made, worst.trial),
        feature_map=feature_map(worst.rows, made, worst.trial),
    )
    if not worst.trial.labeled and record.data is not None:
        record = replace(record, data=replace(record.data, labeled=False, labels_source=None, classes=None))
    if len(readings) == 1:
        return record
    name = worst.choice.preprocess.title
    found = ", ".join(f"{reading.choice.preprocess.title}: {reading.verdict}" for reading in readings)
    return replace(record, checkpoint=describe_choice(record.checkpoint, worst.choice)).warned(
        [f"the normalisation is unclear, each plausible one was scanned ({found}); shown is {name}."]
    )


def passes(trials: Sequence[Trial]) -> float | None:
    """How many times the images ran through the network so far; None for an encoder, whose features are remembered."""
    predictors = [trial.predict for trial in trials if isinstance(trial.predict, Predictor)]
    if not predictors:
        return None
    seen = parallel.total(sum(predictor.seen for predictor in predictors))
    return round(seen / len(trials[0].images), 2)


def images_of(inputs: Inputs, kind: str = "classifier") -> Path:
    """The one set of images that a scan measures on; an encoder's probes may have `--labeled` beside it."""
    if kind == "classifier" and inputs.labeled is not None and (inputs.data or inputs.test) is not None:
        raise UsageError(
            "scan measures one set of images: give --data, --test or --labeled, not --labeled beside."
        )
    path = inputs.test or inputs.data or inputs.labeled
    if path is None:
        raise UsageError("scan needs images: give --data PATH.")
    return path


def read_reference(suspect: Suspect, images: ImageSet, inputs: Inputs) -> Suspect | None:
    """The clean twin of `--reference`, None where none is given; raises Refused where it cannot be one.

    Of a classifier it is what a backdoor is put into beside the suspect, and nothing else.
    """
    if inputs.reference is None:
        return None
    kind = suspect.arch.kind
    if kind != "encoder" and not attacks(inputs):
        raise UsageError(
            f"{NEEDS_LABELS}, or beside --sequela {','.join(ATTACKS)}: this is a classifier without it."
        )
    with _about(inputs.reference):
        checkpoint = Checkpoint.read(inputs.reference, inputs.arch, inputs.allow_pickle, inputs.kind)
        if checkpoint.arch.kind != kind:
            raise Refused(
                "it is a classifier: give a clean encoder, or --kind encoder to take both without heads."
                if kind == "encoder"
                else "it is an encoder: give a clean classifier."
            )
        if checkpoint.arch.name != suspect.checkpoint.arch.name:
            raise Refused(
                f"it is a {checkpoint.arch.name}, the model a {suspect.checkpoint.arch.name}: give a clean {kind} "
                "of the same architecture."
            )
        if checkpoint.arch.classes != suspect.arch.classes:
            raise Refused(f"it has {checkpoint.arch.classes} classes, the model {suspect.arch.classes}.")
        sure = inputs.arch is not None
        read = understand(checkpoint, images.images, "auto", images.labels, sure, suspect.device)
        if read.doubt:
            raise Refused(read.doubt)
        return read


def floor_of(reference: Suspect | None, trial: Trial, inputs: Inputs) -> Trial | None:
    """The clean encoder on the images of `trial`, with probes of its own; None where there is none."""
    if reference is None or reference.arch.kind != "encoder":
        return None
    if trial.encoded is None or not trial.encoded.probing.labeled:
        raise UsageError(f"{NEEDS_LABELS}.")
    with _about(inputs.reference):
        classifier = reference.classifier(reference.choices[0])
        return again(trial, make_predictor(classifier, reference.device, inputs.batch_size, trial.images))


@contextmanager
def _about(reference: Path | None) -> Iterator[None]:
    """Says of a refusal inside that it is about the reference, not the model."""
    try:
        yield
    except Refused as error:
        raise Refused(f"--reference {shown(reference)} cannot be used: {error}") from None


def check_target(target: str, trial: Trial) -> str | int:
    """`--target` as a class, or the word that it is; raises UsageError for a class that there is not."""
    if target != "auto" and trial.encoded is not None and not trial.encoded.probing.labeled:
        raise UsageError("--target needs labeled images where the network is an encoder: it has no classes.")
    if not target.isdigit():
        return target
    if int(target) >= trial.classes:
        raise UsageError(
            f"--target {target}: the network has {trial.classes} classes, 0 to {trial.classes - 1}."
        )
    return int(target)
