"""Use case: a checkpoint, images and triggers -> a record of what they do to it."""

from __future__ import annotations

import math
from pathlib import Path

from bdclean.errors import UsageError, attach
from bdclean.measuring import assessment, pictures, verdict
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.progress import Tell
from bdclean.record import gate
from bdclean.record.run import BACKDOORED, NO_EVIDENCE, CheckpointEntry, RunRecord, Side
from bdclean.runs.images import (
    at_own_size,
    describe_images,
    read_images,
    warn_of_copies,
)
from bdclean.runs.options import Inputs
from bdclean.runs.suspect import Suspect, describe_checkpoint, input_size, understand
from bdclean.runs.trials import open_bench
from bdclean.triggers.bank import make_triggers


def scan(
    model: Path,
    inputs: Inputs,
    *,
    triggers: tuple[str, ...] = (),
    target: str = "auto",
    detectors: tuple[str, ...] = (),
    fail_on: tuple[str, ...] = (),
    tell: Tell,
) -> RunRecord:
    """Measure `triggers` (the stock bank where none is given) on `model`; raises BdcleanError carrying the record."""
    record = RunRecord("scan", seed=inputs.seed, argv=list(inputs.argv), precision="fp32")
    record.checkpoint = CheckpointEntry(path=str(model))
    record.threshold = threshold = gate.parse(fail_on).threshold
    try:
        checkpoint = Checkpoint.read(model, inputs.arch, inputs.allow_pickle)
        record.checkpoint = describe_checkpoint(checkpoint, model)
        if inputs.labeled is not None and (inputs.data or inputs.test) is not None:
            raise UsageError(
                "scan measures one set of images: give --data, --test or --labeled, not --labeled beside."
            )
        path = inputs.test or inputs.data or inputs.labeled
        if path is None:
            raise UsageError("scan needs images: give --data PATH.")
        checkpoint = at_own_size(checkpoint, path, inputs)
        record.warnings += checkpoint.warnings
        made = make_triggers(triggers, input_size(checkpoint, inputs))
        images = read_images(path, checkpoint, inputs, tell, forced=path == inputs.labeled)
        record.data = describe_images(path, images)
        record.warnings += images.warnings
        warn_of_copies(images, record)
        suspect = understand(checkpoint, images.images, inputs, record, images.labels)
        aim = check_target(target, suspect)
        sides = []
        for choice in suspect.choices:
            bench = open_bench(suspect, choice, images, inputs, threshold, record, tell)
            record.triggers = []  # of the reading at hand, until all are measured
            rows = assessment.assess(bench, made, aim, found=record.triggers)
            found, missing = verdict.verdict(rows)
            sides.append((Side(found, verdict.clean_measures(bench, rows), rows), missing, bench, choice))
        # the worst of the plausible readings counts; "not assessed" is worse than "no evidence"
        rank = {BACKDOORED: 0, NO_EVIDENCE: 2}
        side, missing, bench, choice = min(sides, key=lambda s: rank.get(s[0].verdict, 1))
        if not bench.labeled:
            record.data.without_labels()
        record.verdict, record.measures, record.triggers, record.advice = (
            side.verdict,
            side.measures,
            side.triggers,
            missing,
        )
        if inputs.pictures:
            record.pictures = pictures.strips(side.triggers, made, bench)
        record.confusion = pictures.confusions(side.triggers, made, bench)
        if len(sides) > 1:
            name = choice.preprocess.name or choice.preprocess.spec()
            record.checkpoint.preprocess = name
            record.checkpoint.mean, record.checkpoint.std = (
                list(choice.preprocess.mean),
                list(choice.preprocess.std),
            )
            record.checkpoint.preprocess_source = choice.source
            record.checkpoint.preprocess_margin = choice.margin if math.isfinite(choice.margin) else None
            found = ", ".join(
                f"{s[3].preprocess.name or s[3].preprocess.spec()}: {s[0].verdict}" for s in sides
            )
            record.warnings.append(
                f"the normalisation is unclear, each plausible one was scanned ({found}); shown is {name}."
            )
        return record
    except BaseException as error:  # whatever ends the run: what was measured so far belongs into its record
        attach(error, record)
        raise


def check_target(target: str, suspect: Suspect) -> str | int:
    if not target.isdigit():
        return target
    if int(target) >= suspect.arch.classes:
        raise UsageError(
            f"--target {target}: the network has {suspect.arch.classes} classes, 0 to {suspect.arch.classes - 1}."
        )
    return int(target)
