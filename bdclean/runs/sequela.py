"""What is left behind: the images, triggers and networks of `--sequela`, and what was measured with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from bdclean.data.duplicates import exact_copies
from bdclean.data.imageset import ImageSet
from bdclean.data.shared import Shared
from bdclean.data.splitting import split
from bdclean.errors import Refused, UsageError
from bdclean.measuring.sequela import membership, path, reactivation, reinjection, retuning
from bdclean.measuring.sequela.ground import Ground, Threat
from bdclean.measuring.trial import SCREENED_OUT, Trial, make_predictor
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.progress import Tell
from bdclean.record.rule import fired
from bdclean.record.run import NOT_MEASURED, Skipped, TriggerRow
from bdclean.record.sequela import OUTPUT, REFERENCE, SUSPECT, Membership, Sequela
from bdclean.runs.images import keep_plausible_labels, read_images
from bdclean.runs.options import Inputs
from bdclean.runs.suspect import Suspect
from bdclean.triggers.stamping import Trigger

MOST = 10_000
"""So many members and non-members are read at most, whatever `--limit` says: the lowest rate needs 5,000."""
ATTACKS = ("reinjection", "retuning", "reactivation")
"""Parts that take a clean twin beside a scanned network; `path` takes two networks by itself."""
GIVEN, CLEANSING = "given", "cleansing"
LABELS, ANSWERS = "labels", "own answers"


@dataclass(frozen=True)
class People:
    """Images that a network was trained on, and others: with labels where all have them, no picture in both."""

    members: ImageSet
    non_members: ImageSet


@dataclass
class Left:
    """What was measured, and what could not be."""

    sequela: Sequela
    skipped: list[Skipped] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def tried(self, part: str, measure: Callable[[], None]) -> None:
        """Measures a part; one that lacks something is skipped with the reason, and warned of: it was asked for."""
        try:
            measure()
        except Refused as error:
            self.skip(part, str(error))

    def skip(self, part: str, reason: str) -> None:
        self.skipped.append(Skipped(f"sequela {part}", reason.rstrip(".")))
        self.warnings.append(f"--sequela {part} was not measured: {reason.rstrip('.')}.")


def check_kind(kind: str, inputs: Inputs, new_head: bool = False) -> None:
    """Raises UsageError where what is left behind is asked of a network that is no classifier before and after."""
    if not inputs.sequela:
        return
    if new_head:
        raise UsageError("--sequela cannot be with --head new: suspect and output have other classes.")
    if kind == "encoder":
        raise UsageError("--sequela is for classifiers: this is an encoder.")


def read_people(
    checkpoint: Checkpoint, inputs: Inputs, tell: Tell, shared: Shared | None = None
) -> People | None:
    """The images of `--members` and `--non-members`, None where they are not asked for.

    Raises UsageError where one picture, to the pixel at the network's size, is in both: it cannot be both.
    """
    if "membership" not in inputs.sequela:
        return None
    assert inputs.members is not None and inputs.non_members is not None
    asked = replace(inputs, limit=MOST)
    sets = [
        read_images(given, checkpoint, asked, tell, csv="may", shared=shared)
        for given in (inputs.members, inputs.non_members)
    ]
    both = int(exact_copies(sets[0].images, sets[1].images).sum())
    if both:
        raise UsageError(
            f"{both:,} of {len(sets[0]):,} images of --members {inputs.members} are among those of --non-members "
            f"{inputs.non_members}: an image is one or the other."
        )
    return People(*sets)


def check_apart(people: People | None, cleansing: Iterable[ImageSet], inputs: Inputs) -> None:
    """Raises UsageError where an image that cleanses is a non-member: the output was trained on it."""
    if people is None:
        return
    for images in cleansing:
        both = int(exact_copies(images.images, people.non_members.images).sum())
        if both:
            raise UsageError(
                f"{both:,} of the images to cleanse with are among those of --non-members {inputs.non_members}: the "
                "output is trained on them."
            )


def begun(inputs: Inputs, trial: Trial) -> Left:
    """What was asked for, and nothing measured yet: parts join it as they are, for a run may end early."""
    return Left(Sequela(list(inputs.sequela), "labels" if trial.labeled else "the suspect's own answers"))


def after_scan(
    left: Left, people: People | None, classifier: Classifier, reference: Suspect | None, suspect: Suspect,
    images: ImageSet, trial: Trial, made: Sequence[Trigger], rows: Sequence[TriggerRow], inputs: Inputs, named: bool,
) -> None:  # fmt: skip
    """Adds to `left` what `--sequela` asks of one network, and of a clean twin, the `reference`, beside it.

    Those images that are tuned on are not scored, and the other way round.
    """
    if people is not None:
        _members(left, {SUSPECT: classifier}, _agreed(people, suspect, trial), None, inputs, suspect)
    if not attacks(inputs):
        return

    def attack() -> None:
        known = replace(images, labels=trial.reference)
        tuning, scored, _ = split(known, inputs.seed)
        assert scored.labels is not None
        own = replace(
            trial, images=scored.images, reference=scored.labels, clean=trial.predict(scored.images)
        )
        ground = Ground.of(tuning, own, suspect.device, inputs.batch_size)
        threats = _threats(rows, made, named, trial.threshold)
        networks = {SUSPECT: classifier}
        if reference is not None:
            networks[REFERENCE] = reference.classifier(reference.choices[0])
        _attack(left, networks, networks, threats, ground, inputs)

    left.tried(", ".join(attacks(inputs)), attack)


def after_cleanse(
    left: Left, people: People | None, networks: dict[str, Classifier], suspect: Suspect, cleansing: ImageSet,
    before: Trial, made: Sequence[Trigger], rows: Sequence[TriggerRow], inputs: Inputs, named: bool,
) -> None:  # fmt: skip
    """Adds to `left` what `--sequela` asks of suspect and output; `cleansing` are the images that the recipe had.

    An attacker tunes on those, with their labels or the suspect's answers; `rows` are the suspect's.
    """
    if people is not None:
        _members(left, networks, _agreed(people, suspect, before), cleansing, inputs, suspect)
    if not attacks(inputs):
        return

    def attack() -> None:
        labels = cleansing.labels if before.labeled else None
        if before.labeled and cleansing.labels_source == "suspect":
            left.sequela.labels = "the suspect's own answers (what is tuned on) and labels (what is scored)"
        # a copy: tensors of inference mode cannot be trained on
        known = labels if labels is not None else before.predict(cleansing.images).clone()
        ground = Ground.of(replace(cleansing, labels=known), before, suspect.device, inputs.batch_size)
        threats = _threats(rows, made, named, before.threshold)
        _attack(left, networks, {OUTPUT: networks[OUTPUT]}, threats, ground, inputs)

    left.tried(", ".join(attacks(inputs)), attack)


# --- membership ---------------------------------------------------------------------------------------------


def _agreed(people: People, suspect: Suspect, trial: Trial) -> tuple[People, list[str]]:
    """`people` with the labels that the suspect does not contradict, and what is to be warned of.

    Where one side has none, neither has: a loss of labels and one of answers cannot be compared.
    """
    sets, doubts = [], []
    for images in (people.members, people.non_members):
        kept, more = keep_plausible_labels(images, suspect, trial.predict)
        sets.append(kept)
        doubts += more
    if any(kept.labels is None for kept in sets):
        sets = [kept.unlabeled() for kept in sets]
    return People(*sets), doubts


def _members(
    left: Left, networks: dict[str, Classifier], agreed: tuple[People, list[str]], cleansing: ImageSet | None,
    inputs: Inputs, suspect: Suspect,
) -> None:  # fmt: skip
    """Membership of those given, and of those that cleansed, on each of the networks."""
    people, doubts = agreed
    left.warnings += doubts
    groups = {GIVEN: people.members} | ({CLEANSING: cleansing} if cleansing is not None else {})
    logits: dict[tuple[str, str], Tensor] = {}
    for name, model in networks.items():
        ask = make_predictor(model, suspect.device, inputs.batch_size, people.members.images)
        for group, images in {**groups, "": people.non_members}.items():
            logits[name, group] = ask.outputs(images.images)
    for group, images in groups.items():
        labels, others = images.labels, people.non_members.labels
        if labels is None or others is None or images.labels_source == "suspect":
            labels = others = None
        first: tuple[Tensor, Tensor] | None = None
        for name in networks:
            sure = membership.margins(logits[name, group], labels)
            unsure = membership.margins(logits[name, ""], others)
            left.sequela.membership.append(
                Membership(
                    name, group, len(images), len(people.non_members), LABELS if labels is not None else ANSWERS,
                    membership.area(sure, unsure), membership.low_rates(sure, unsure),
                    None if first is None else membership.area_change(first, (sure, unsure)),
                )
            )  # fmt: skip
            first = first or (sure, unsure)


# --- attacks on a network that stands -----------------------------------------------------------------------


def attacks(inputs: Inputs) -> list[str]:
    """The parts that were asked for and that put a trigger to a network."""
    return [name for name in inputs.sequela if name != "membership"]


def _threats(
    rows: Sequence[TriggerRow], made: Sequence[Trigger], named: bool, threshold: float
) -> list[Threat]:
    """Each trigger that was named, with its target; else the one that fired most. Raises Refused if there is none."""
    aimed = [
        row
        for row in rows
        if row.target is not None and row.outcome != NOT_MEASURED and row.target_source != SCREENED_OUT
    ]
    if not named:
        aimed = [row for row in aimed if fired(row, threshold)]
    aimed.sort(key=lambda row: row.asr.value or 0.0, reverse=True)
    by_spec = {trigger.spec(): trigger for trigger in made}
    found = {
        row.trigger: Threat(by_spec[row.trigger], row.target)
        for row in reversed(aimed)
        if row.target is not None
    }
    if not found and named:
        raise Refused("no class is known that a named trigger sends images to: scan knows --target")
    if not found:
        raise Refused("no trigger fired: name one with --trigger")
    return list(found.values()) if named else [found[aimed[0].trigger]]


def _attack(
    left: Left, networks: dict[str, Classifier], tuned: dict[str, Classifier], threats: Sequence[Threat],
    ground: Ground, inputs: Inputs,
) -> None:  # fmt: skip
    """The parts that were asked for, each with every threat; `tuned` are those that a backdoor is put into.

    Rows join `left` one by one, so that those that are finished stay where the run ends early.
    """
    sequela = left.sequela

    def put_in(threat: Threat) -> None:
        counts, why = reinjection.fitting(len(ground.tuning))
        if why:
            left.skipped.append(Skipped("sequela reinjection", why))
        for injection in reinjection.reinject(tuned, threat, ground, counts):
            sequela.injections.append(injection)

    def retune(threat: Threat) -> None:
        for injection in retuning.retune(tuned, threat, ground):
            sequela.injections.append(injection)

    def reactivate(threat: Threat) -> None:
        for row in reactivation.reactivate(networks, threat, ground):
            sequela.reactivation.append(row)

    def walk(threat: Threat) -> None:
        for point in path.along(networks[SUSPECT], networks[OUTPUT], threat, ground):
            sequela.path.append(point)

    parts = {"reinjection": put_in, "retuning": retune, "reactivation": reactivate, "path": walk}
    for name in attacks(inputs):
        for threat in threats:
            left.tried(name, partial(parts[name], threat))
