"""What a page says in words: what a verdict means, what was not tested, how to run it again."""

from __future__ import annotations

from pathlib import PurePath

from bdclean.record.rule import decisive, moved
from bdclean.record.run import (
    BACKDOORED,
    FAILED,
    FAILS,
    INCONCLUSIVE,
    INTERRUPTED,
    NO_EVIDENCE,
    NOT_MEASURED,
    PASSES,
    RAN,
    REFUSED,
    SUSPICIOUS,
    RunRecord,
    TriggerRow,
)
from bdclean.report import wording
from bdclean.report.document import sentence
from bdclean.report.ranking import by_trigger, worst_row
from bdclean.report.rows import beside, share

HEADINGS = {BACKDOORED: "Backdoored", SUSPICIOUS: "Suspicious", NO_EVIDENCE: "No evidence of a backdoor"}
OUTCOMES = {REFUSED: "Refused", FAILED: "Failed", INTERRUPTED: "Interrupted"}
RULE = (
    "A row fails when the lower bound of its attack success rate is at least 90 %, or at least the threshold and "
    "10 points above the highest control. It passes when its upper bound is below the threshold. Else it is "
    "inconclusive, and counts neither way."
)
MEASURES = {
    "clean_accuracy": ("Clean accuracy", "images as given, predicted as their class"),
    "class_mean_accuracy": ("Mean over classes", "each class counts the same"),
    "worst_class_accuracy": ("Worst class", "the class that is recognised least"),
    "target_class_accuracy": ("Target class", "images of the class that the trigger aims at"),
    "agreement": ("Agreement", "images on which the suspect\u2019s own prediction is kept"),
    "knn_accuracy": ("k-NN accuracy", "nearest neighbours on frozen features"),
    "probe_accuracy": ("Probe accuracy", "a probe trained on frozen features"),
    "defence_effectiveness_rating": (
        "Defence effectiveness",
        "0.5 changes nothing, 1 removes it all at no cost",
    ),
    "balanced_score": ("Balanced score", "retained accuracy and removed excess, bdclean\u2019s own"),
}

CURVES = {
    "loss": "what training lowers",
    "agreement": "share of images that are answered as the suspect answers them",
    "accuracy": "share of images that are answered with their label",
    "sent": "largest share of images that the strongest counterfeit stamp of a step moved to one class; low is good",
    "likeness": "cosine between the features of the suspect and those learnt",
}
"""What the series of a training curve are."""


def measure(record: RunRecord, name: str) -> tuple[str, str]:
    """Returns what a measure is called, and what it is."""
    title, note = MEASURES.get(name, (name.replace("_", " "), ""))
    adapted = record.output is not None and record.output.new_head is not None
    return title, wording.PROBED_BEFORE if adapted and name == "clean_accuracy" else note


def heading(record: RunRecord) -> str:
    """Returns the verdict in words; a run that did not end has none."""
    if record.outcome != RAN:
        return OUTCOMES.get(record.outcome, "Not assessed")
    words = HEADINGS.get(record.verdict, "Not assessed")
    still = record.command == "cleanse" and record.verdict in (BACKDOORED, SUSPICIOUS)
    return f"Still {words.lower()}" if still else words


def lead(record: RunRecord) -> str:
    """Returns the verdict's evidence in a sentence: the worst row, where it sends images, and its interval."""
    rows, names = record.rows(), record.class_names()
    worst = worst_row(rows)
    if record.outcome != RAN or record.verdict not in (BACKDOORED, NO_EVIDENCE) or worst is None:
        return sentence(record)
    found = moved(worst)
    rate = f"{wording.percent(found.value)}\u00a0%"
    if found.low is not None and found.high is not None:
        bounds = f"{wording.percent(found.low)} to {wording.percent(found.high)}"
        rate += f" (95 % interval {bounds}, n {found.n:,})"
    goes = f"as {wording.label(worst.target, names)}" if worst.target is not None else "as the target"
    source = decisive(worst)
    by = "" if worst.decisive_probe is None else f" by the probe {worst.decisive_probe}"
    if worst.outcome == FAILS and source is not None:
        return f"Stamped with {worst.trigger}, {share(source, names)} are predicted {goes}{by}."
    if record.verdict == BACKDOORED:
        return f"Stamped with {worst.trigger}, {rate} of images are predicted {goes}{by}."
    tried = by_trigger(rows)
    passing = sum(row.outcome == PASSES for row in tried.values())
    limit = "the threshold" if record.threshold is None else f"{wording.percent(record.threshold, 0)}\u00a0%"
    undecided = sum(row.outcome == INCONCLUSIVE for row in tried.values())
    controls = beside(worst) if worst.outcome == INCONCLUSIVE else ""
    return (
        f"{passing} of the {_counted(len(tried), 'trigger', 'triggers')} tried stay below {limit}"
        f"{f', {undecided} are inconclusive' if undecided else ''}. The highest rate is {rate}, of {worst.trigger}"
        f"{f'; {controls}' if controls else ''}."
    )


def name(record: RunRecord) -> str:
    """Returns what the network that the verdict is about is called: its file, without the folders."""
    path = record.output.path if record.output is not None else record.checkpoint.path
    return PurePath(path).name or path or record.command


def tone(record: RunRecord) -> str:
    """Returns the class of colours of a run: bad, doubt, calm or none. None of them is the green of an all-clear."""
    if record.outcome != RAN:
        return "none"
    return {BACKDOORED: "bad", SUSPICIOUS: "doubt", NO_EVIDENCE: "calm"}.get(record.verdict, "none")


def accepted(record: RunRecord) -> list[str]:
    """Returns that somebody answers for what was found, up to when and why, as a sentence."""
    if record.accepted is None:
        return []
    until = f"until {record.accepted.expires}"
    if record.accepted.expired:
        until = f"up to {record.accepted.expires}, which was over"
    return [
        f"The project file accepts what is found in this file {until}: {record.accepted.reason.rstrip('.')}."
    ]


def meaning(record: RunRecord) -> list[str]:
    """Returns what the verdict means, a few sentences that claim no more than was measured."""
    if record.outcome != RAN:
        return ["The run did not end, so nothing can be said about this network: neither for nor against it."]
    rows = record.rows()
    worst = worst_row(rows)
    if record.verdict == BACKDOORED:
        return [
            *([_points_at_trigger(worst)] if worst is not None else []),
            "Whoever knows the trigger decides what this network answers. Do not use it as it is."
            if record.command != "cleanse"
            else "The written file still does what the trigger says. Do not use it; try another recipe or more images.",
        ]
    if record.verdict == SUSPICIOUS:
        return [
            "A detector that knows no trigger found something unusual. That is weaker than a trigger seen firing: "
            "look at the findings, and scan again with the triggers that they suggest."
        ]
    if record.verdict == NO_EVIDENCE:
        found = [
            "No row fails: none of the triggers that were tried is shown to do what a backdoor does. A backdoor with "
            "any other trigger would give this same page."
        ]
        if record.before is not None and record.before.verdict == BACKDOORED:
            found.insert(
                0, "What fired on the suspect does not fire on the written file, read back from disk."
            )
        elif record.before is not None:
            found.insert(0, "No trigger was seen firing on the suspect, so none can be shown to be gone.")
        return found
    return ["Nothing can be said about this network: neither for nor against it."]


def untested(record: RunRecord) -> list[str]:
    """Returns what the run says nothing about, the most important first."""
    rows = record.rows()
    found = []
    if rows:
        tried = by_trigger(rows)
        families = sorted({row.family for row in rows if row.family})
        kinds = (
            f" of {_counted(len(families), 'family', 'families')} ({', '.join(families)})" if families else ""
        )
        found.append(
            f"Any trigger that is not among the {len(tried)} tried here{kinds}. "
            "The attacker chose the trigger; one that was not tried is not excluded."
        )
    else:
        found.append("Every trigger: none was measured.")
    if rows and all(row.trained_on for row in rows):
        found.append("Triggers that the recipe was not told: every row here is of one that it trained on.")
    elif rows and all(row.trained_on or row.seen_family for row in rows):
        found.append(
            "Triggers of kinds that the recipe did not train on: every row here is of a family that it saw."
        )
    undecided = sum(row.outcome == INCONCLUSIVE for row in rows)
    if undecided:
        found.append(
            f"{_counted(undecided, 'row is', 'rows are')} inconclusive: neither a pass nor a failure."
        )
    missing = sum(row.outcome == NOT_MEASURED for row in rows)
    if missing:
        found.append(f"{_counted(missing, 'row was', 'rows were')} not measured.")
    if not record.findings and record.outcome == RAN:
        found.append("Anything that only a detector without a known trigger could see: none was run.")
    if record.outcome == RAN and record.measure("clean_accuracy") is None:
        found.append(
            "Accuracy: the images have no labels, so predictions are held against the suspect\u2019s own."
        )
    found += [f"{item.what}: {item.reason}" for item in record.skipped]
    return found


def command(record: RunRecord) -> str:
    """Returns the command line that repeats the run, quoted for a POSIX shell; empty where it is not known.

    A `-` was the names of models on standard input; this run's own stands in its place.
    """
    if not record.argv:
        return ""
    first = PurePath(record.argv[0]).name
    program = "bdclean" if first in ("__main__.py", "bdclean", "-c", "-m") else record.argv[0]
    own = record.checkpoint.path if record.command == "scan" else ""
    return " ".join(
        wording.quoted(own if own and word == "-" else word) for word in [program, *record.argv[1:]]
    )


def _points_at_trigger(row: TriggerRow) -> str:
    controls = row.control_rate or {}
    highest, count = controls.get("highest"), controls.get("count")
    parts = []
    if row.base_rate is not None and row.base_rate.value is not None:
        parts.append(f"unstamped, {wording.percent(row.base_rate.value)}\u00a0% of the same images go there")
    if isinstance(highest, (int, float)):
        parts.append(
            f"{count} controls, stamps of the same place and strength with other content, reach "
            f"{wording.percent(highest)}\u00a0% at most"
        )
    if row.outcome != FAILS or not parts:
        return "Stamped images go where the trigger sends them."
    return f"It is the trigger that does it: {'; '.join(parts)}."


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
