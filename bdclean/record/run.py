"""RunRecord: all that one run found, as JSON both ways. Reports are made from it alone, without torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdclean.errors import Refused
from bdclean.files import strictjson
from bdclean.files.writing import create, write_text
from bdclean.record.rates import Measure, Rate
from bdclean.record.sequela import Sequela
from bdclean.record.typed import cut_short, kind_of, plain_value, typed

SCHEMA = "bdclean.run/1"
REPORT_SCHEMA = "bdclean.report/1"

BACKDOORED, SUSPICIOUS, NO_EVIDENCE, NOT_ASSESSED = "backdoored", "suspicious", "no-evidence", "not-assessed"
VERDICTS = (BACKDOORED, SUSPICIOUS, NO_EVIDENCE, NOT_ASSESSED)
RAN, REFUSED, FAILED, INTERRUPTED = "ran", "refused", "failed", "interrupted"
OUTCOMES = (RAN, REFUSED, FAILED, INTERRUPTED)
FAILS, PASSES, INCONCLUSIVE, NOT_MEASURED = "fails", "passes", "inconclusive", "not-measured"

DEEPEST = 50  # levels of a record that is read: far more than ours have, far less than Python's stack holds


CLEANSE_ONLY = ("recipe", "before", "after", "curve", "output")


@dataclass
class Bound:
    """What a row is judged by: the share of images that the trigger moves, of all source classes or of one.

    Images that go to the target without a stamp are not in it. `low` is a one-sided exact bound, corrected for what
    was tried; `control` the highest control on these images, None where none was measured. From the lower bound
    `certain` on controls do not matter (None: they always do); at least `needed` of the images must move.
    """

    source: int | None
    value: float
    n: int
    low: float
    control: float | None = None
    certain: float | None = 0.9
    needed: float = 0.0


@dataclass
class TriggerRow:
    """What one trigger did to one model. `outcome` is fails, passes, inconclusive or not-measured."""

    trigger: str  # a SPEC that `--trigger` takes
    family: str = ""
    seen_family: bool = False
    trained_on: bool = False  # the recipe was told this very trigger, and unlearned it
    target: int | str | None = None  # a class, or "next" for label + 1
    target_source: str = ""  # given, screening, ...
    images: int = 0
    asr: Rate = field(default_factory=Rate)
    base_rate: Rate | None = None
    control_rate: dict[str, int | float | None] | None = None  # median, highest, count
    robust_accuracy: Rate | None = None
    worst_source: dict[str, int | float | None] | None = None  # class, value, n, low, high
    outcome: str = NOT_MEASURED
    reason: str = ""
    change: Rate | None = (
        None  # of a cleansed model: its rate minus the suspect's, in [-1, 1], paired interval
    )
    bounds: list[Bound] = field(default_factory=list)  # of all images, then of each source that may decide
    high: float | None = None  # one-sided exact bound of what the trigger moves, corrected for what was tried
    decisive_source: int | None = None  # the source class that fails the row, where the whole does not
    # Of an encoder: the rate with other probes by name; which of them fails the row, where the linear one does not, and
    # has its controls and bounds there; over all images, as BadEncoder counts; of a clean encoder.
    probes: dict[str, Rate] = field(default_factory=dict)
    decisive_probe: str | None = None
    asr_all_images: Rate | None = None
    reference_rate: Rate | None = None


@dataclass
class Finding:
    """What a detector that knows no trigger says, in `reason` as a sentence."""

    detector: str
    verdict: str
    score: float | None = None
    threshold: float | None = None
    p_value: float | None = None
    reason: str = ""
    odd: str = ""  # the side of the threshold on which a score is odd: above or below
    seen_on: str = ""  # suspect, or output: the cleansed network
    trigger: str | None = None  # the SPEC of the one that was tested, where it was one of a bank


@dataclass
class Calibration:
    """Where a detector's `score` for this network lies among the `scores` of clean networks of its `kind`, in words."""

    detector: str
    kind: str
    score: float
    scores: list[float]  # ascending; larger is odder
    p_value: float | None = None  # None where the clean networks are too few
    corrected: float | None = None  # for the detectors that were run, and the readings of the file


@dataclass
class Picture:
    """A small PNG that a page shows: `role` is given, stamped, difference, enlarged or mask.

    `enlarged` is the place that was stamped, as given and stamped side by side; --no-pictures leaves only masks.
    `before` and `after` are the classes that the model, and its cleansed copy, predict for it.
    """

    role: str
    png_base64: str
    before: int | None = None
    after: int | None = None
    image: int | None = None  # pictures of the same image have the same number
    trigger: str | None = None  # its SPEC, for what was stamped
    target: int | str | None = None
    label: int | None = None  # the reference class of the image, or the class that a mask was fitted to
    caption: str = ""


@dataclass
class Confusion:
    """How many images of each reference class (row) are predicted as each class (column)."""

    model: str  # suspect or cleansed
    trigger: str | None  # stamped with it, or as given
    target: int | str | None
    counts: list[list[int]]


@dataclass
class MappedFeatures:
    """Where one encoder puts the images of a map: [x, y] of each, in units of features of length one.

    The axes are the two along which its features of clean images differ most; `explained` is the share of their
    variance, in [0, 1], that lies along these.
    """

    model: str  # suspect or cleansed
    explained: float
    clean: list[list[float]]
    stamped: list[list[float]]


@dataclass
class FeatureMap:
    """Features of some images as given and stamped with one trigger, by the suspect and its cleansed copy."""

    trigger: str  # its SPEC
    target: int | str | None
    grouping: str  # what `groups` are: labels, answers of the probe, or clusters of features
    groups: list[int]  # the class or cluster of each image
    models: list[MappedFeatures]


@dataclass
class Skipped:
    """What was not done, and why: never folded into a verdict."""

    what: str
    reason: str


@dataclass
class CheckpointEntry:
    """The file that was read, and how it was understood."""

    path: str = ""  # as typed
    sha256: str | None = None
    format: str | None = None
    architecture: str | None = None
    kind: str | None = None
    classes: int | None = None
    input_size: list[int] | None = None  # channels (1: grey, 3: RGB), height, width
    mean: list[float] | None = None
    std: list[float] | None = None
    resize: str | None = None  # how pictures are brought to the input size
    parameters: int | None = None
    unread: list[str] = field(default_factory=list)
    preprocess: str | None = None
    preprocess_source: str | None = None  # given, metadata, config.json, the file's mean and std, ...
    preprocess_margin: float | None = None
    alternatives: list[dict[str, Any]] = field(default_factory=list)  # other readings: name, reason
    architecture_margin: float | None = None  # how many times worse the next reading's statistics are
    layout: str | None = None  # of an encoder: whose files look so, and which copy of the network was taken
    feature: str | None = None  # of an encoder: what its output is
    feature_size: int | None = None
    matched: int | None = None  # tensors of the file that the network was built from; the others are `unread`
    class_names: list[str] | None = (
        None  # that the file or the config beside it gives to the classes: a claim
    )


@dataclass
class DataEntry:
    """The images that were used. `skipped` were unreadable, `set_aside` a recipe distrusted."""

    path: str = ""
    images: int = 0
    labeled: bool = False
    digest: str | None = None
    skipped: int = 0
    set_aside: int = 0
    duplicates: int = 0
    held_out: int | None = None
    test: str | None = None
    labeled_path: str | None = None
    labels_source: str | None = None
    classes: list[str] | None = None
    pseudo_labels: bool = False  # the suspect's answers were the recipe's labels
    unreadable: list[dict[str, Any]] = field(default_factory=list)  # path, reason


@dataclass
class RecipeEntry:
    """What was done to the model."""

    name: str
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    stages: list[Any] = field(default_factory=list)
    families: list[str] = field(default_factory=list)


@dataclass
class Side:
    """One model of a cleansing, before or after: its measures, trigger rows and verdict."""

    verdict: str = NOT_ASSESSED
    measures: list[Measure] = field(default_factory=list)
    triggers: list[TriggerRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)  # of the unlabeled test of an encoder


@dataclass
class NewHead:
    """The head that a network was given for another task, in place of its own if it had one."""

    name: str  # of the module
    classes: list[str]
    left_out: list[str] = field(default_factory=list)  # tensors of the suspect's file that the output's lacks


@dataclass
class OutputEntry:
    """The file that was written. `new_head`: it is a classifier of other classes than the suspect."""

    path: str
    sha256: str
    new_head: NewHead | None = None


@dataclass
class Problem:
    """Why a run did not end: the sentence, its exit code, and for a defect the traceback's digest."""

    message: str
    exit_code: int
    kind: str = ""
    digest: str | None = None


@dataclass
class Acceptance:
    """That somebody answers for what is found in a file: the verdict stays, and fails no gate until a day is over."""

    reason: str
    expires: str  # ISO 8601, the last day on which it counts
    expired: bool = False  # that day was over when the run was judged

    def __str__(self) -> str:
        return f"{'no longer, it ended on' if self.expired else 'until'} {self.expires}: {self.reason.rstrip('.')}"


@dataclass
class RunRecord:
    """One run. For cleanse, `measures`, `triggers` and `verdict` are the cleansed model's, read back."""

    command: str
    verdict: str = NOT_ASSESSED
    outcome: str = RAN
    started: str = ""  # ISO 8601 with time zone
    seconds: float | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    precision: str | None = None
    argv: list[str] = field(default_factory=list)
    checkpoint: CheckpointEntry = field(default_factory=CheckpointEntry)
    data: DataEntry | None = None
    threshold: float | None = None  # of the attack success rate, for the rows' outcomes
    measures: list[Measure] = field(default_factory=list)
    triggers: list[TriggerRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    confusion: list[Confusion] | None = None  # none for many classes
    feature_map: FeatureMap | None = None  # of encoders
    calibration: list[Calibration] | None = None  # of the detectors that know clean networks of this kind
    sequela: Sequela | None = None  # what --sequela measured
    skipped: list[Skipped] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    advice: str | None = None  # for not-assessed: what is missing, e.g. how many images would be needed
    problem: Problem | None = None
    recipe: RecipeEntry | None = None
    before: Side | None = None
    after: Side | None = None
    curve: list[dict[str, Any]] | None = None
    output: OutputEntry | None = None
    accepted: Acceptance | None = None  # what is found in `judged_file`, by the project file
    forward_passes: float | None = None  # of a scan of a classifier: images that ran over those measured on
    extra: dict[str, Any] = field(default_factory=dict)  # top-level keys of a newer bdclean, kept as they are

    @property
    def exit_code(self) -> int:
        """The exit code of this run without any `--fail-on`."""
        if self.problem is not None:
            return self.problem.exit_code
        return {BACKDOORED: 1, SUSPICIOUS: 1, NO_EVIDENCE: 0}.get(self.verdict, 3)

    @property
    def excused(self) -> bool:
        """Whether what was found is accepted today: it fails no gate."""
        return self.accepted is not None and not self.accepted.expired

    def judged_file(self) -> tuple[str, str | None]:
        """Returns path and sha256 of what the verdict is about: the file that was written, else the one read."""
        if self.output is not None:
            return self.output.path, self.output.sha256
        return self.checkpoint.path, self.checkpoint.sha256

    def warned(self, warnings: Iterable[str]) -> RunRecord:
        """Returns the record with `warnings` behind those that it has; none stands twice."""
        return dataclasses.replace(self, warnings=list(dict.fromkeys([*self.warnings, *warnings])))

    def measure(self, name: str) -> Measure | None:
        """Returns the measure called `name`, of the cleansed model where there is one."""
        listed = [*self.measures, *(self.after.measures if self.after else [])]
        return next((m for m in listed if m.name == name), None)

    def class_names(self) -> list[str] | None:
        """Returns what classes are called: as the labels say, else as the file does."""
        said = self.data.classes if self.data is not None else None
        return said or self.checkpoint.class_names

    def rows(self) -> list[TriggerRow]:
        """Returns the trigger rows that the verdict hangs on: of the cleansed model where there is one."""
        return self.after.triggers if self.after is not None else self.triggers

    def to_json(self) -> dict[str, Any]:
        """Returns the record as plain JSON values; numbers that are not finite become null."""
        values = plain_value(self)
        extra = values.pop("extra")
        for key in CLEANSE_ONLY:
            if values[key] is None and self.command != "cleanse":
                del values[key]
        return {"schema": SCHEMA, **values, **extra}

    @staticmethod
    def from_json(document: Any) -> RunRecord:
        """Returns the record in `document`; raises Refused naming the first key that does not fit."""
        if not isinstance(document, dict):
            raise Refused(f"a record is a JSON object, found {kind_of(document)}.")
        if not strictjson.shallow(document, DEEPEST):
            raise Refused(f"the record is nested more than {DEEPEST} deep: this is no record of bdclean's.")
        schema = document.get("schema")
        if schema != SCHEMA:
            raise Refused(
                f"schema is {cut_short(schema)}, expected {SCHEMA!r}: this is no record of bdclean's."
            )
        known = {f.name for f in dataclasses.fields(RunRecord)} - {"extra"}
        extra = {key: value for key, value in document.items() if key not in known and key != "schema"}
        body = {key: value for key, value in document.items() if key in known}
        record: RunRecord = typed({**body, "extra": extra}, RunRecord, "record")
        if record.outcome not in OUTCOMES:
            raise Refused(
                f"record.outcome is {cut_short(record.outcome)}, expected one of {', '.join(OUTCOMES)}."
            )
        if record.verdict not in VERDICTS:
            raise Refused(
                f"record.verdict is {cut_short(record.verdict)}, expected one of {', '.join(VERDICTS)}."
            )
        return record

    def dump(self) -> str:
        """Returns the record as one line of ASCII JSON."""
        return json.dumps(self.to_json(), allow_nan=False)

    def write(self, path: Path) -> None:
        """Writes the record to `path` by atomic rename, so that a reader never sees half of one."""
        write_text(path, self._document())

    def add(self, path: Path) -> Path:
        """Writes the record to `path`, or beside it where that is taken; returns where. Nothing is replaced."""
        return create(path, lambda stream: stream.write(self._document().encode("ascii")))

    def _document(self) -> str:
        return json.dumps(self.to_json(), allow_nan=False, indent=1) + "\n"


def report_document(records: list[RunRecord]) -> dict[str, Any]:
    """Returns what `--format json` prints: always one document, also for a single run."""
    return {"schema": REPORT_SCHEMA, "runs": [record.to_json() for record in records]}


def record_path(folder: Path, stem: str, sha256: str | None) -> Path:
    """Returns the path of a run's record in a folder: `<stem>-<first 8 of sha256>.json`."""
    return folder / f"{stem}-{(sha256 or 'unread')[:8]}.json"
