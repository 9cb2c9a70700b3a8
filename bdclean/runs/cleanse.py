"""Use case: read, measure, run a recipe, write, measure the written file -> a record of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bdclean import registry
from bdclean.errors import Refused, UsageError, attach
from bdclean.networks.checkpoint.new_head import with_new_head
from bdclean.progress import Tell
from bdclean.recipes.recipe import Informed, Recipe
from bdclean.record import gate
from bdclean.record.run import RunRecord
from bdclean.runs.options import Inputs
from bdclean.runs.repair import Repair
from bdclean.runs.resuming import hold_known
from bdclean.runs.sequela import check_kind
from bdclean.runs.suspect import input_size
from bdclean.training import parallel
from bdclean.triggers.bank import make_triggers


def cleanse(
    model: Path,
    inputs: Inputs,
    *,
    recipe: str = "auto",
    settings: dict[str, str] | None = None,
    new_head: bool = False,
    pseudo_labels: bool = False,
    triggers: tuple[str, ...] = (),
    out: Path | None = None,
    force: bool = False,
    resume: bool = False,
    fail_on: tuple[str, ...] = (),
    tell: Tell,
) -> RunRecord:
    """Write a cleansed copy of `model` to `out`, measured before and after; raises BdcleanError carrying the record.

    `new_head`: the copy is a classifier of the classes of the labeled images, `--data` where `--labeled` gives none;
    the suspect is measured as an encoder, by probes for these classes on its frozen features. `pseudo_labels`: a recipe
    that needs labels gets the suspect's answers on `--data` in their place, whether there are others or not.
    """
    if pseudo_labels and (new_head or inputs.labeled is not None):
        other = "--head new: they are of its old head" if new_head else "--labeled: give one of them"
        raise UsageError(f"--pseudo-labels, the suspect's own answers, cannot be with {other}.")
    if new_head and inputs.labeled is None:
        inputs = replace(inputs, data=None, labeled=inputs.data)
    repair = Repair(model, inputs, gate.parse(fail_on).threshold, bool(triggers), tell)
    try:
        checkpoint, place = repair.open_checkpoint(out, new_head, force)
        check_kind(checkpoint.arch.kind, inputs, new_head)
        chosen = registry.load_recipe(recipe, checkpoint.arch.kind, new_head)
        method: Recipe = registry.configure(chosen, settings or {})
        if pseudo_labels and not method.needs_labels:
            raise UsageError(f"{recipe} needs no labels: leave --pseudo-labels out.")
        check_parallel(recipe, method)
        usual = checkpoint.arch.input[1:]
        checkpoint = repair.at_own_size(checkpoint)
        made = make_triggers(triggers, input_size(checkpoint, inputs), checkpoint.arch.kind)
        classes = repair.new_classes() if new_head else None
        # Images are labeled for the head that is to be: here nothing but its classes counts.
        images = repair.open_images(with_new_head(checkpoint, classes, 0) if classes else checkpoint)
        suspect = repair.understand(checkpoint, images, classes is None)
        probed = trained = suspect
        if classes:
            probed, trained = suspect.without_head(), suspect.with_new_head(classes, inputs.seed, inputs.arch)
        before, images = repair.open_trial(probed, images, method.needs_labels and not pseudo_labels)
        if pseudo_labels:
            images = repair.label_by_suspect(images, before)
        if method.needs_labels and images.labeled is None:
            raise Refused(
                f"{recipe} needs labels and {inputs.data} has none: give --labeled, with images in one "
                "folder per class or a CSV as --classes (--head new where they are of other classes than the "
                "network's), let the suspect's answers serve with --pseudo-labels, or use --recipe bcu."
            )
        people = repair.read_people(checkpoint, images)
        classifier, run = repair.open_run(recipe, method, trained, images, place, resume)
        old = repair.measure_before(before, made)
        known = repair.firing(old.rows, made) if isinstance(method, Informed) else []
        hold_known(run, known)
        cleansed = repair.run(recipe, method, classifier, trained, images, known, run)
        repair.write(cleansed, recipe, trained, before, usual, place, force)
        after = repair.open_written(place, trained, before, run)
        new = repair.measure_after(after, made, old)
        if isinstance(method, Informed) and (still := repair.firing(new.rows, made)):
            cleansed = repair.insist(recipe, method, trained, images, still, cleansed, run)
            repair.write(cleansed, recipe, trained, before, usual, place, force)
            after = repair.open_written(place, trained, before, run)
            new = repair.measure_after(after, made, old)
        record = repair.conclude(before, after, made, old, new, cleansed)
        if not inputs.sequela:
            return record
        given = images.labeled if method.needs_labels and images.labeled is not None else images.unlabeled
        return repair.measure_sequela(people, suspect, given, before, made, place)
    except BaseException as error:  # whatever ends the run: what was measured so far belongs into its record
        attach(error, repair.record)
        raise


def check_parallel(recipe: str, method: Recipe) -> None:
    """Raises Refused where torchrun started several processes and the recipe does not say that they can share it."""
    if parallel.joined() and not getattr(method, "data_parallel", False):
        raise Refused(
            f"{recipe} cannot be shared by several processes: run it without torchrun, or use one that "
            "bdclean ls recipe NAME calls data parallel."
        )
