"""Use case: read, measure, run a recipe, write, measure the written file -> a record of both."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bdclean import __version__, gate, measure, pictures, registry
from bdclean.arguments import default_output, resume_state
from bdclean.checkpoint import Checkpoint
from bdclean.data import ImageSet, split, without_duplicates
from bdclean.deciding import LABELS
from bdclean.errors import Refused, UsageError, attach
from bdclean.inputs import (
    CSV,
    Inputs,
    Suspect,
    at_own_size,
    describe_checkpoint,
    describe_images,
    input_size,
    keep_plausible_labels,
    make_predictor,
    make_triggers,
    read_images,
    understand,
)  # fmt: skip
from bdclean.measure import Bench
from bdclean.preprocessing import Classifier
from bdclean.recipes import Recipe
from bdclean.record import CheckpointEntry, Finding, OutputEntry, RecipeEntry, RunRecord, Side
from bdclean.saving import Saved
from bdclean.scan import open_bench
from bdclean.training import Precision, Run, Tell, probe_precision

ENOUGH_LABELED = 600
"""With fewer labeled images than that, a third of which would be under 200, those to measure on are of `--data`."""
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
        images = _images(checkpoint, inputs, record, tell)
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
        record.before = Side(measures=measure.clean_measures(before))
        rows_before = measure.assess(before, made, found=record.before.triggers)
        record.before = Side(
            measure.verdict(rows_before)[0], measure.clean_measures(before, rows_before), rows_before
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

        after = _after(out, suspect, before, inputs, tell)
        fixed = {
            row.trigger: row.target
            for row in rows_before
            if row.target is not None and row.target_source != measure.SCREENED_OUT
        }
        record.after = Side(measures=measure.clean_measures(after))
        rows_after = measure.assess(after, made, fixed=fixed, found=record.after.triggers)
        measure.pair(before, after, rows_after)
        for row in [*rows_before, *rows_after]:
            row.seen_family = row.family in cleansed.families
        verdict, record.advice = measure.verdict(rows_after)
        measures = [
            *measure.clean_measures(after, rows_before),
            *measure.compare(before, after, rows_before, rows_after),
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
        record.after = Side(verdict, measures, rows_after)
        record.verdict, record.measures, record.triggers = verdict, measures, rows_after
        return record
    except BaseException as error:  # whatever ends the run: what was measured so far belongs into its record
        attach(error, record)
        raise


@dataclass
class _Images:
    """What the recipe gets (`labeled` only where labels are there), and what is measured on. No picture is in both."""

    unlabeled: ImageSet
    labeled: ImageSet | None
    held_out: ImageSet

    def telling(self) -> ImageSet:
        """Those that tell most of how the network is to be read: with labels, where any have them.

        Labels that only a count of classes speaks for come last, and those of images that are measured on after others.
        """
        sets = [
            s for s in (self.labeled, self.unlabeled, self.held_out) if s is not None and s.labels is not None
        ]
        return next((s for s in sets if s.labels_source != "count"), sets[0] if sets else self.unlabeled)


def _images(checkpoint: Checkpoint, inputs: Inputs, record: RunRecord, tell: Tell) -> _Images:
    """Images are held out of the labeled ones where there are such, else of `--data`, unless `--test` is given."""
    path = inputs.data or inputs.labeled
    if path is None:
        raise UsageError("cleanse needs images: give --data PATH; they need no labels.")
    # A CSV of labels is about the labeled images and those to measure on, where there are such beside `--data`.
    beside = [given for given in (inputs.labeled, inputs.test) if given is not None]
    csv: CSV = "may" if len(beside) == 2 else "must"
    unlabeled = read_images(
        path, checkpoint, inputs, tell, forced=inputs.data is None,
        csv="not" if inputs.data is not None and beside else csv,
    )  # fmt: skip
    labeled = None
    if inputs.data is not None and inputs.labeled is not None:
        labeled = read_images(inputs.labeled, checkpoint, inputs, tell, forced=True, csv=csv)
    record.data = describe_images(path, unlabeled)
    record.data.labeled_path = str(inputs.labeled) if inputs.labeled else None
    record.warnings += [*unlabeled.warnings, *(labeled.warnings if labeled is not None else ())]
    if inputs.test is not None:
        held_out, duplicates = read_images(inputs.test, checkpoint, inputs, tell, csv=csv), 0
        record.data.test = str(inputs.test)
        record.warnings += held_out.warnings
    elif labeled is not None and len(labeled) >= min(ENOUGH_LABELED, len(unlabeled)):
        labeled, held_out, duplicates = split(labeled, inputs.seed)
    else:
        unlabeled, held_out, duplicates = split(unlabeled, inputs.seed)
    if inputs.test is not None or labeled is not None:
        unlabeled, removed = without_duplicates(unlabeled, held_out)
        duplicates += removed
    if labeled is not None:
        labeled, removed = without_duplicates(labeled, held_out)
        duplicates += removed
    if len(unlabeled) == 0 or (labeled is not None and len(labeled) == 0):
        raise Refused(
            f"every image of {path} is also among those to measure on: nothing is left to train on."
        )
    record.data.duplicates, record.data.held_out = duplicates, len(held_out)
    return _Images(unlabeled, labeled, held_out)


def _run(
    classifier: Classifier, suspect: Suspect, images: _Images, recipe: str, method: Recipe, out: Path, resume: bool,
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


def _after(out: Path, suspect: Suspect, before: Bench, inputs: Inputs, tell: Tell) -> Bench:
    """The written file, read back, on the images and reference classes of `before`."""
    written = Suspect(suspect.checkpoint.again(out), suspect.arch, suspect.choices, suspect.device)
    predict = make_predictor(written.classifier(suspect.choices[0]), suspect.device, inputs, before.images)
    return replace(before, predict=predict, clean=predict(before.images), own_reference=False, hits={})
