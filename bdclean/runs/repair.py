"""The steps of a repair, and what they found so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bdclean import __version__
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, Unusable, UsageError
from bdclean.measuring import pictures
from bdclean.measuring.assessment import assess, in_order
from bdclean.measuring.encoders import judged_as_encoder
from bdclean.measuring.feature_map import feature_map
from bdclean.measuring.rows import Measured
from bdclean.measuring.trial import SCREENED_OUT, Target, Trial
from bdclean.measuring.verdict import clean_measures, compare, damage, not_gone, pair, verdict_on
from bdclean.networks.ambiguity.choosing import alike
from bdclean.networks.ambiguity.normalisation import LABELS
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.progress import Tell
from bdclean.recipes.recipe import Cleansed, Informed, Recipe
from bdclean.record.rule import fired
from bdclean.record.run import (
    BACKDOORED,
    FAILS,
    NO_EVIDENCE,
    NOT_ASSESSED,
    SUSPICIOUS,
    CheckpointEntry,
    DataEntry,
    Finding,
    OutputEntry,
    RecipeEntry,
    RunRecord,
    Side,
    TriggerRow,
)
from bdclean.record.sequela import OUTPUT, SUSPECT
from bdclean.runs.folders import check_folder, copy_descriptions, discard, weights_in
from bdclean.runs.images import at_own_size, keep_plausible_labels, new_classes, understand_labeled
from bdclean.runs.options import Inputs
from bdclean.runs.places import default_output, is_folder
from bdclean.runs.resuming import open_run
from bdclean.runs.sequela import People, after_cleanse, begun, check_apart, read_people
from bdclean.runs.split import Images, open_images
from bdclean.runs.suspect import Suspect, describe_checkpoint, describe_suspect, resolve_device, with_second
from bdclean.runs.trials import after_writing, open_trial
from bdclean.training import parallel
from bdclean.training.run import Run
from bdclean.triggers.stamping import Trigger


@dataclass(frozen=True)
class Rated:
    """What was measured on a network, its rows as all probes judge them, and what the unlabeled tests found."""

    measured: list[Measured]
    rows: list[TriggerRow]
    findings: list[Finding]

    @staticmethod
    def of(trial: Trial, measured: list[Measured], made: Sequence[Trigger], seen_on: str) -> Rated:
        rows, findings = judged_as_encoder(trial, [each.row for each in measured], made)
        return Rated(measured, rows, [replace(finding, seen_on=seen_on) for finding in findings])


class Repair:
    """The steps of a repair, and the record of what they have found so far, which nothing else writes."""

    def __init__(self, model: Path, inputs: Inputs, threshold: float, named: bool, tell: Tell) -> None:
        self.model, self.inputs, self.threshold, self.named, self.tell = model, inputs, threshold, named, tell
        self.to_folder = False
        self.carried: dict[str, str] = {}
        self.record = RunRecord(
            "cleanse", seed=inputs.seed, argv=list(inputs.argv), threshold=threshold,
            checkpoint=CheckpointEntry(path=str(model)),
        )  # fmt: skip

    def _note(self, warnings: Iterable[str] = (), **fields: Any) -> None:
        self.record = replace(self.record, **fields).warned(warnings)

    def open_checkpoint(self, out: Path | None, new_head: bool, force: bool) -> tuple[Checkpoint, Path]:
        """The suspect's file, and where the output goes, which can be written: a file, or a folder."""
        checkpoint = Checkpoint.read(self.model, self.inputs.arch, self.inputs.allow_pickle, self.inputs.kind)
        self._note(checkpoint=describe_checkpoint(checkpoint, self.model))
        self.carried = checkpoint.carried
        place = default_output(self.model, out, new_head)
        self.to_folder = is_folder(place, self.model, new_head)
        if self.to_folder:
            check_folder(place, checkpoint, force)
        else:
            checkpoint.check_writable(place, force)
        return checkpoint, place

    def at_own_size(self, checkpoint: Checkpoint) -> Checkpoint:
        """`checkpoint` with the image size that it was trained at, by some of the images."""
        if (path := self.inputs.data or self.inputs.labeled) is not None:
            checkpoint = at_own_size(checkpoint, path, self.inputs)
        self._note(checkpoint.warnings)
        return checkpoint

    def new_classes(self) -> tuple[str, ...]:
        """The classes of the task that the network is adapted to."""
        if self.inputs.labeled is None:
            raise UsageError("--head new needs images with labels: give --data PATH or --labeled PATH.")
        return new_classes(self.inputs.labeled, self.inputs)

    def open_images(self, checkpoint: Checkpoint) -> Images:
        images, data, doubts = open_images(checkpoint, self.inputs, self.tell)
        self._note(doubts, data=data)
        return images

    def understand(self, checkpoint: Checkpoint, images: Images, own_labels: bool) -> Suspect:
        """The suspect as it is to be read; raises Refused where that is unclear.

        `own_labels`: the labels are of the suspect's own classes, so that its accuracy may tell.
        """
        device, told_by = resolve_device(self.inputs.device), images.telling()
        self._note(device=str(device))
        told_by = told_by if own_labels else told_by.unlabeled()
        suspect, _, _ = understand_labeled(checkpoint, told_by, self.inputs, device)
        entry = describe_suspect(self.record.checkpoint, suspect, told_by.images.shape[2:])
        self._note(suspect.warnings, checkpoint=entry)
        if suspect.doubt:
            raise Refused(suspect.doubt)
        if told_by is images.held_out and suspect.choices[0].source == LABELS:
            self._note(
                [
                    "the normalisation was chosen by accuracy on the images that are measured on: "
                    "no others have labels."
                ]
            )
        if len(suspect.choices) > 1:
            names = " or ".join(choice.preprocess.title for choice in suspect.choices)
            if not alike(suspect.choices):
                raise Refused(f"the normalisation is unclear between {names}: say which with --preprocess.")
            taken = suspect.choices[0].preprocess.title
            self._note(
                [
                    f"the normalisation is unclear between {names}, which hardly differ: {taken} is taken; "
                    "--preprocess says another."
                ]
            )
            suspect = replace(suspect, choices=suspect.choices[:1])
        return suspect

    def open_trial(self, suspect: Suspect, images: Images, needs_labels: bool) -> tuple[Trial, Images]:
        """The suspect on the images that are measured on, and the images without labels that are none.

        Raises Refused where a recipe that `needs_labels` would train on labels that the suspect contradicts.
        """
        probing = images.labeled or images.unlabeled
        before, doubts = open_trial(
            suspect, suspect.choices[0], images.held_out, self.inputs, self.threshold, self.tell, probing
        )
        if suspect.arch.kind == "encoder":
            data = self.record.data or DataEntry()
            if not before.labeled:
                data = replace(data, labeled=False, labels_source=None, classes=None)
            self._note(doubts, data=data)
            labels_count = probing.sure or (before.labeled and probing.labels is not None)
            with_labels = probing if labels_count else None
            return before, Images(images.unlabeled, images.labeled or with_labels, images.held_out)
        unlabeled, more = keep_plausible_labels(images.unlabeled, suspect, before.predict, needs_labels)
        labeled = images.labeled
        if labeled is not None:
            labeled, doubted = keep_plausible_labels(labeled, suspect, before.predict, training=True)
            more = [*more, *doubted]
        elif unlabeled.labels is not None:
            labeled = unlabeled
        data = self.record.data or DataEntry()
        # names are worth nothing where the folders turned out to be no labels
        measured, _ = keep_plausible_labels(images.held_out, suspect, before.predict)
        known = measured.classes
        data = replace(data, classes=list(known) if known else None)
        if unlabeled.labels is None:
            data = replace(data, labeled=False, labels_source=None)
        else:
            data = replace(data, labels_source=unlabeled.labels_source)
        self._note([*doubts, *more], data=data)
        return before, Images(unlabeled, labeled, images.held_out)

    def label_by_suspect(self, images: Images, before: Trial) -> Images:
        """`images` with the suspect's answers for labels of those to train on."""
        self._note(data=replace(self.record.data or DataEntry(), pseudo_labels=True))
        plain = images.unlabeled.unlabeled()
        answers = before.predict(
            plain.images
        ).clone()  # no tensor of inference mode, which training cannot use
        return Images(plain, replace(plain, labels=answers, labels_source="suspect"), images.held_out)

    def _measure(
        self,
        side: Literal["before", "after"],
        trial: Trial,
        made: Sequence[Trigger],
        fixed: Mapping[str, Target],
    ) -> list[Measured]:
        """What is measured on `trial`; each row is in the record as soon as it is known: a run may end early."""
        rows: list[TriggerRow] = []
        begun = Side(measures=clean_measures(trial), triggers=rows)
        self._note((), **{side: begun})
        measured = []
        for each in assess(trial, made, fixed=fixed):
            measured.append(each)
            rows.append(each.row)
        return in_order(measured, made)

    def measure_before(self, before: Trial, made: Sequence[Trigger]) -> Rated:
        """The suspect under the triggers `made`."""
        found = Rated.of(before, self._measure("before", before, made, {}), made, "suspect")
        told = verdict_on(before, found.rows, found.findings, self.named)[0]
        measures = clean_measures(before, found.rows)
        self._note(before=Side(told, measures, found.rows, found.findings))
        return found

    def firing(self, rows: Sequence[TriggerRow], made: Sequence[Trigger]) -> list[Trigger]:
        """Those of `made` that fired, by their `rows`."""
        specs = {row.trigger for row in rows if fired(row, self.threshold)}
        return [trigger for trigger in made if trigger.spec() in specs]

    def open_run(
        self, recipe: str, method: Recipe, suspect: Suspect, images: Images, place: Path, resume: bool
    ) -> tuple[Classifier, Run]:
        """The suspect to train on, and the run; a state of another run is refused before anything is measured."""
        classifier = suspect.classifier(suspect.choices[0])
        run = open_run(classifier, suspect, images, recipe, method, place, resume, self.inputs, self.tell)
        self._note(precision=run.precision.name)
        return classifier, run

    def run(
        self,
        recipe: str,
        method: Recipe,
        classifier: Classifier,
        suspect: Suspect,
        images: Images,
        known: Sequence[Trigger],
        run: Run,
    ) -> Cleansed:
        """What the recipe makes of the suspect; an informed one is told the triggers that are `known`."""
        if isinstance(method, Informed):
            cleansed = method.unlearn(known, classifier, suspect.arch, images.unlabeled, run)
        else:
            cleansed = method(classifier, suspect.arch, images.unlabeled, images.labeled, run)
        return self._made(recipe, method, cleansed)

    def insist(
        self, recipe: str, method: Informed, suspect: Suspect, images: Images, still: Sequence[Trigger],
        begun: Cleansed, run: Run,
    ) -> Cleansed:  # fmt: skip
        """What the recipe makes of the network that was written, on which triggers are `still` firing."""
        classifier = suspect.classifier(suspect.choices[0])
        return self._made(recipe, method, method.insist(still, begun, classifier, images.unlabeled, run))

    def _made(self, recipe: str, method: Recipe, cleansed: Cleansed) -> Cleansed:
        """`cleansed`, with what it says of itself in the record."""
        self._note(
            curve=cleansed.curve,
            findings=[Finding(**found, seen_on="suspect") for found in cleansed.findings],
            recipe=RecipeEntry(
                recipe, method.source, cleansed.settings, cleansed.stages, list(cleansed.families)
            ),
            data=replace(self.record.data or DataEntry(), set_aside=cleansed.set_aside),
        )
        return cleansed

    def write(
        self, cleansed: Cleansed, recipe: str, suspect: Suspect, before: Trial, usual: Sequence[int], place: Path,
        force: bool,
    ) -> None:  # fmt: skip
        """The output, which says the size that it was read at where that is not the `usual` one: nothing else does."""
        said, size = suspect.choices[0].preprocess, (before.images.shape[2], before.images.shape[3])
        if size != tuple(usual):
            said = replace(said, size=size)
        provenance = {
            "recipe": recipe, "seed": str(self.inputs.seed), "version": __version__, "preprocess": said.spec(),
        }  # fmt: skip
        if suspect.new_head is not None:
            provenance["head"] = "new"
        if self.to_folder:
            copy_descriptions(self.model, place)
        digest = suspect.checkpoint.write(cleansed.model, self._weights(place), provenance, force)
        parallel.wait()  # for the first process to have written it
        self._note(output=OutputEntry(str(place), digest, suspect.new_head))

    def _weights(self, place: Path) -> Path:
        """The file of the output that holds the weights."""
        return weights_in(place, self.model) if self.to_folder else place

    def open_written(self, place: Path, suspect: Suspect, before: Trial, run: Run) -> Trial:
        """The output, read back; one that gives no numbers does not stay where a result would be looked for."""
        try:
            return after_writing(self._weights(place), suspect, before, self.inputs)
        except Unusable as error:
            self._weights(place).unlink(missing_ok=True)
            if run.saved is not None:
                run.saved.discard()
            if self.to_folder:
                discard(place, self.model)
            self._note(output=None)
            raise Refused(
                f"what training left gives no usable answers ({str(error).split(':')[0]}), so nothing was written: "
                "lower its learning rate with --set."
            ) from None

    def measure_after(self, after: Trial, made: Sequence[Trigger], before: Rated) -> Rated:
        """The output, towards the targets of the suspect's rows; of several of one trigger that which fails."""
        fixed: dict[str, Target] = {
            row.trigger: row.target
            for row in sorted(before.rows, key=lambda row: row.outcome == FAILS)
            if row.target is not None and row.target_source != SCREENED_OUT
        }
        found = self._measure("after", after, made, fixed)
        paired = [
            replace(each, row=row) for each, row in zip(found, pair(before.measured, found), strict=True)
        ]
        return Rated.of(after, paired, made, "output")

    def conclude(
        self,
        before: Trial,
        after: Trial,
        made: Sequence[Trigger],
        was: Rated,
        found: Rated,
        cleansed: Cleansed,
    ) -> RunRecord:
        """The record, with what the repair changed."""
        old, new = ([_marked(row, cleansed) for row in side.rows] for side in (was, found))
        findings = found.findings
        measures = [*clean_measures(after, old), *compare(before, after, old, new)]
        told, advice = verdict_on(after, new, findings, self.named)
        if told == NO_EVIDENCE and (left := not_gone(old, new, was.findings)) is not None:
            told, advice = NOT_ASSESSED, left
        broken = damage(measures, before, after)
        if broken and told not in (BACKDOORED, SUSPICIOUS):
            told, advice = NOT_ASSESSED, broken[0]
        strips = pictures.strips([*old, *new], made, before, after) if self.inputs.pictures else []
        self._note(
            broken,
            before=replace(
                self.record.before or Side(),
                triggers=old,
            ),
            findings=[*self.record.findings, *findings],
            after=Side(told, measures, new),
            verdict=told,
            advice=advice,
            measures=measures,
            triggers=new,
            pictures=[*strips, *pictures.masks(cleansed.pictures)],
            confusion=pictures.confusions([*old, *new], made, before, after),
            feature_map=feature_map([*old, *new], made, before, after),
        )
        self.record = with_second(self.record, self.carried)
        return self.record

    def read_people(self, checkpoint: Checkpoint, images: Images) -> People | None:
        """The members and others of `--sequela membership`; none of the others is trained on."""
        people = read_people(checkpoint, self.inputs, self.tell)
        check_apart(people, [images.unlabeled, *([images.labeled] if images.labeled else [])], self.inputs)
        return people

    def measure_sequela(
        self, people: People | None, suspect: Suspect, given: ImageSet, before: Trial, made: Sequence[Trigger],
        place: Path,
    ) -> RunRecord:  # fmt: skip
        """The record, with what is left behind in the file that was written; `given` are the recipe's images."""
        written = replace(suspect, checkpoint=suspect.checkpoint.again(self._weights(place)))
        choice = suspect.choices[0]
        networks = {SUSPECT: suspect.classifier(choice), OUTPUT: written.classifier(choice)}
        rows = self.record.before.triggers if self.record.before is not None else []
        left = begun(self.inputs, before)
        self._note((), sequela=left.sequela)
        after_cleanse(left, people, networks, suspect, given, before, made, rows, self.inputs, self.named)
        self._note(left.warnings, skipped=[*self.record.skipped, *left.skipped])
        return self.record


def _marked(row: TriggerRow, cleansed: Cleansed) -> TriggerRow:
    """`row` with what the recipe knew of its trigger."""
    return replace(
        row, seen_family=row.family in cleansed.families, trained_on=row.trigger in cleansed.trained_on
    )
