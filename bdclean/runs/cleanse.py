"""Use case: read, measure, run a recipe, write, measure the written file -> a record of both."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bdclean import __version__, registry
from bdclean.errors import Refused, attach
from bdclean.measuring import assessment, pictures, trial, verdict
from bdclean.networks.ambiguity.normalisation import LABELS
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.progress import Tell
from bdclean.recipes.recipe import Recipe
from bdclean.record import gate
from bdclean.record.run import CheckpointEntry, Finding, OutputEntry, RecipeEntry, RunRecord, Side
from bdclean.runs.images import at_own_size, keep_plausible_labels
from bdclean.runs.options import Inputs
from bdclean.runs.places import default_output, resume_state
from bdclean.runs.split import Images, open_images
from bdclean.runs.suspect import Suspect, describe_checkpoint, input_size, understand
from bdclean.runs.trials import after_writing, open_bench
from bdclean.training.resume import Saved
from bdclean.training.run import Precision, Run, probe_precision
from bdclean.triggers.bank import make_triggers

LEAST_AGREEMENT = 0.8
"""Below this agreement with the suspect on clean images a warning says that the output is damaged."""


def cleanse(
    model: Path,
    inputs: Inputs,
    *,
    recipe: str = "auto",
    settings: dict[str, str] | None = None,
    triggers: tuple[str, ...] = (),
    out: Path | None = None,
    force: bool = False,
    resume: bool = False,
    fail_on: tuple[str, ...] = (),
    tell: Tell,
) -> RunRecord:
    """Write a cleansed copy of `model` to `out`, measured before and after; raises BdcleanError carrying the record."""
    record = RunRecord("cleanse", seed=inputs.seed, argv=list(inputs.argv))
    record.checkpoint = CheckpointEntry(path=str(model))
    record.threshold = gate.parse(fail_on).threshold
    try:
        method: Recipe = registry.configure(registry.load(registry.RECIPES, recipe), settings or {})
        checkpoint = Checkpoint.read(model, inputs.arch, inputs.allow_pickle)
        record.checkpoint = describe_checkpoint(checkpoint, model)
        out = default_output(model, out)
        checkpoint.check_writable(out, force)
        usual = checkpoint.arch.input
        if (path := inputs.data or inputs.labeled) is not None:
            checkpoint = at_own_size(checkpoint, path, inputs)
        record.warnings += checkpoint.warnings
        made = make_triggers(triggers, input_size(checkpoint, inputs))
        images = open_images(checkpoint, inputs, record, tell)
        told_by = images.telling()
        suspect = understand(checkpoint, told_by.images, inputs, record, told_by.labels)
        if told_by is images.held_out and suspect.choices[0].source == LABELS:
            record.warnings.append(
                "the normalisation was chosen by accuracy on the images that are measured on: no others have labels."
            )
        if len(suspect.choices) > 1:
            names = " or ".join(c.preprocess.name or c.preprocess.spec() for c in suspect.choices)
            raise Refused(f"the normalisation is unclear between {names}: say which with --preprocess.")
        before = open_bench(
            suspect, suspect.choices[0], images.held_out, inputs, record.threshold, record, tell
        )
        before = replace(before, hits={})
        if record.data is not None:  # names are worth nothing where the folders turned out to be no labels
            known = images.held_out.classes if before.labeled else None
            record.data.classes = list(known) if known else None
        classifier = suspect.classifier(suspect.choices[0])
        images.unlabeled = keep_plausible_labels(images.unlabeled, suspect, before.predict, record)
        if record.data is not None and images.unlabeled.labels is None:
            record.data.labeled, record.data.labels_source = False, None
        if images.labeled is None and images.unlabeled.labels is not None:
            images.labeled = images.unlabeled
        if method.needs_labels and images.labeled is None:
            raise Refused(
                f"{recipe} needs labels and {inputs.data} has none: give --labeled, with images in one "
                "folder per class or a CSV as --classes, or use --recipe bcu."
            )
        record.before = Side(measures=verdict.clean_measures(before))
        rows_before = assessment.assess(before, made, found=record.before.triggers)
        record.before = Side(
            verdict.verdict(rows_before)[0], verdict.clean_measures(before, rows_before), rows_before
        )

        run = _run(classifier, suspect, images, recipe, method, out, resume, inputs, tell)
        record.precision = run.precision.name
        cleansed = method(classifier, suspect.arch, images.unlabeled, images.labeled, run)
        record.curve = cleansed.curve
        record.findings = [Finding(**found) for found in cleansed.findings]
        record.recipe = RecipeEntry(
            recipe, method.source, cleansed.settings, cleansed.stages, list(cleansed.families)
        )
        if record.data is not None:
            record.data.set_aside = cleansed.set_aside
        said, size = suspect.choices[0].preprocess, (before.images.shape[2], before.images.shape[3])
        if size != usual[1:]:  # then the output must say it: nothing else does
            said = replace(said, size=size)
        provenance = {
            "recipe": recipe, "seed": str(inputs.seed), "version": __version__,
            "preprocess": said.spec(),
        }  # fmt: skip
        digest = checkpoint.write(cleansed.model, out, provenance, force)
        record.output = OutputEntry(str(out), digest)

        after = after_writing(out, suspect, before, inputs, tell)
        fixed = {
            row.trigger: row.target
            for row in rows_before
            if row.target is not None and row.target_source != trial.SCREENED_OUT
        }
        record.after = Side(measures=verdict.clean_measures(after))
        rows_after = assessment.assess(after, made, fixed=fixed, found=record.after.triggers)
        verdict.pair(before, after, rows_after)
        for row in [*rows_before, *rows_after]:
            row.seen_family = row.family in cleansed.families
        found, record.advice = verdict.verdict(rows_after)
        measures = [
            *verdict.clean_measures(after, rows_before),
            *verdict.compare(before, after, rows_before, rows_after),
        ]
        kept = next(m.value for m in measures if m.name == "agreement")
        if kept is not None and kept < LEAST_AGREEMENT:
            record.warnings.append(
                f"the written network keeps only {100 * kept:.0f} % of the suspect's answers on clean images: "
                "it is damaged, do not use it; try other settings or more images."
            )
        worst = [*rows_before, *rows_after]
        if inputs.pictures:
            record.pictures = pictures.strips(worst, made, before, after)
        record.pictures += pictures.masks(cleansed.pictures)
        record.confusion = pictures.confusions(worst, made, before, after)
        record.after = Side(found, measures, rows_after)
        record.verdict, record.measures, record.triggers = found, measures, rows_after
        return record
    except BaseException as error:  # whatever ends the run: what was measured so far belongs into its record
        attach(error, record)
        raise


def _run(
    classifier: Classifier, suspect: Suspect, images: Images, recipe: str, method: Recipe, out: Path, resume: bool,
    inputs: Inputs, tell: Tell,
) -> Run:  # fmt: skip
    """The run with its resume state: what is there is opened with `resume`, else the state starts anew."""
    settings: dict[str, Any] = asdict(method)  # type: ignore[call-overload]
    arguments = {
        "source_sha256": suspect.checkpoint.sha256,
        "recipe": recipe,
        "settings": {key: repr(value) for key, value in settings.items()},
        "data": images.unlabeled.digest,
        "labeled": images.labeled.digest if images.labeled is not None else None,
        "seed": inputs.seed,
        "precision": inputs.precision,
        "device": str(suspect.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bdclean": __version__,
        "preprocess": classifier.preprocess.spec(),
        "architecture": suspect.arch.name,
    }
    saved = Saved(resume_state(out), arguments)
    if resume and saved.open():
        precision = Precision.parse(str(saved.notes.get("precision")))
    else:
        # timing decides, so what was decided belongs to the state: a resumed run must not decide anew
        precision = probe_precision(classifier, images.unlabeled.images, suspect.device, inputs.precision)
        saved.notes["precision"] = precision.name
    return Run(suspect.device, precision, inputs.seed, tell, saved)
