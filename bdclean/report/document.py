"""What a report says, whatever its format: RunRecord -> Page of plain strings that the formats lay out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bdclean.record.run import (
    BACKDOORED,
    FAILS,
    INCONCLUSIVE,
    NO_EVIDENCE,
    NOT_ASSESSED,
    NOT_MEASURED,
    PASSES,
    RAN,
    SUSPICIOUS,
    RunRecord,
    TriggerRow,
)
from bdclean.report import sequela, wording
from bdclean.report.next_step import next_command
from bdclean.report.ranking import by_trigger, headline, of_source, same, worst_row
from bdclean.report.rows import Table, accuracy, beside, change, evidence, matrix, tables, why, without_empty

LIMITS = (
    "Only the triggers listed here were tried. Triggers that were not tried are not excluded: "
    "this report is evidence about these, never a guarantee."
)
RATES = "Rates are percent of n images, with 95 % intervals."
WARNINGS = "Warnings"


@dataclass
class Page:
    """One run, or the comparison of several: formats lay it out in this order."""

    title: str
    verdict: str = ""
    sentence: str = ""
    summary: list[tuple[str, str]] = field(default_factory=list)  # what a person asks first, in a few lines
    facts: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    lists: list[tuple[str, list[str]]] = field(default_factory=list)
    closing: list[str] = field(default_factory=list)
    ending: str = ""  # what the verdict is about, said again for who has scrolled to the end
    command: str = ""  # what to type next, quoted for a POSIX shell


def page(record: RunRecord) -> Page:
    """Returns the page of one run."""
    found = Page(
        title=title(record),
        verdict=record.verdict if record.outcome == RAN else record.outcome,
        sentence=f"{was(record)}{sentence(record)}",
        summary=summary(record),
        facts=facts(record),
        closing=[RATES, LIMITS],
    )
    found.tables = [table for table in [*tables(record), *sequela.tables(record)] if table.rows]
    found.ending = _ending(record)
    found.command = next_command(record)
    names = record.class_names()
    inconclusive = [why(row, names) for row in record.rows() if row.outcome == INCONCLUSIVE]
    skipped = [f"{item.what}: {item.reason}" for item in record.skipped]
    unread = [f"{item.get('path', '')}: {item.get('reason', '')}" for item in _unreadable(record)]
    unmeasured = [why(row, names) for row in record.rows() if row.outcome == NOT_MEASURED]
    found.lists = [
        (title, items)
        for title, items in (
            (WARNINGS, record.warnings),
            (sequela.TITLE, sequela.sentences(record)),
            ("Inconclusive", inconclusive),
            ("Not measured", unmeasured),
            ("Not done", skipped),
            ("Images left out as unreadable", unread),
        )
        if items
    ]
    return found


def title(record: RunRecord) -> str:
    """Returns what the verdict is about: the file that was written, where one was, else the one that was read."""
    return (
        record.output.path
        if record.output is not None
        else f"{record.command} {record.checkpoint.path}".strip()
    )


def was(record: RunRecord) -> str:
    """Returns what the suspect was before a file was written, in brackets; nothing of another run."""
    if record.output is None or record.before is None:
        return ""
    worst = worst_row([row for row in record.before.triggers if row.outcome == FAILS])
    if worst is None:
        return f"(was: {record.before.verdict}) "
    (rate, source), names = headline(worst), record.class_names()
    now = same(record.after.triggers, worst) if record.after is not None else None
    left = of_source(now, source) if now is not None else None
    of = "" if source is None else f" of {wording.label(source, names)}"
    return (
        f"(was: {record.before.verdict}, {worst.trigger.partition(':')[0]} {wording.percent(rate.value)}"
        f"{'' if left is None else f' -> {wording.percent(left.value)}'} %{of}) "
    )


def comparison(records: Sequence[RunRecord]) -> Page:
    """Returns the page that puts several runs side by side, numbered in the order given."""
    rows, brief = [], []
    for number, record in enumerate(records, 1):
        worst = worst_row(record.rows())
        said = accuracy(record)
        parts = [
            f"#{number} {f'cleanse {record.recipe.name}' if record.recipe else record.command}",
            "" if said == wording.NOTHING else f"accuracy {said} %",
            "" if worst is None else f"{worst.trigger} {change(record, worst)} %",
        ]
        brief.append(", ".join(part for part in parts if part))
        rows.append(
            [
                str(number),
                record.output.path if record.output is not None else record.checkpoint.path,
                f"cleanse {record.recipe.name}" if record.recipe else record.command,
                record.verdict if record.outcome == RAN else record.outcome,
                said,
                wording.measure(record.measure("agreement")),
                worst.trigger if worst else wording.NOTHING,
                change(record, worst),
                wording.duration(record.seconds),
                "" if worst is not None else sentence(record),
            ]
        )
    columns = [
        "#",
        "model",
        "run",
        "verdict",
        "accuracy %",
        "agreement %",
        "worst trigger",
        "its ASR %",
        "time",
        "why not",
    ]
    note = "For a cleansing: before -> after."
    shown = [without_empty(Table("Runs", columns, rows, note, "model", "verdict", brief))]
    rates = matrix(records)
    if rates.rows:
        shown.append(rates)
    return Page(f"{len(records)} runs", tables=shown, closing=[RATES, LIMITS])


def sentence(record: RunRecord) -> str:
    """Returns the verdict as a sentence with its evidence. It never calls a model good: see `LIMITS`."""
    if record.problem is not None:
        return record.problem.message
    rows = record.rows()
    if record.verdict == BACKDOORED:
        worst = worst_row([row for row in rows if row.outcome == FAILS] or rows)
        if worst is None:
            return "the rows that say so are missing from this record."
        return evidence(worst, record.class_names())
    if record.verdict == SUSPICIOUS:
        firing = [f for f in record.findings if f.verdict == SUSPICIOUS]
        fired = [f"{f.detector} ({f.reason})" if f.reason else f.detector for f in firing]
        return f"{'; '.join(fired) or 'a detector fires'}."
    if record.verdict == NO_EVIDENCE:
        tried = by_trigger(rows)
        passing = sum(row.outcome == PASSES for row in tried.values())
        undecided = sum(row.outcome == INCONCLUSIVE for row in tried.values())
        more = f", {undecided} inconclusive" if undecided else ""
        limit = "" if record.threshold is None else f" of {wording.percent(record.threshold, 0)} %"
        return (
            f"{passing} of {len(tried)} triggers tried stay below the threshold{limit}{more}. "
            f"{_highest(rows)}Triggers that were not tried are not excluded.{_limits(record)}"
        )
    return (record.advice or "nothing conclusive was measured").rstrip(".") + "."


def _highest(rows: Sequence[TriggerRow]) -> str:
    """What the highest rate is worth where it is inconclusive: a high one beside `no-evidence` asks for words."""
    worst = worst_row(rows)
    if worst is None or worst.outcome != INCONCLUSIVE or not (controls := beside(worst)):
        return ""
    return f"The highest rate is {wording.percent(worst.asr.value)} %, of {worst.trigger}; {controls}. "


def _ending(record: RunRecord) -> str:
    """What the verdict is about, a path; of a run without one with what is missing."""
    path = record.output.path if record.output is not None else record.checkpoint.path
    path = path or record.command
    decided = record.outcome == RAN and record.verdict != NOT_ASSESSED
    return path if decided else f"{path}: {sentence(record)}"


def _limits(record: RunRecord) -> str:
    """What the images could not show, of a run without evidence."""
    return "" if record.advice is None else f" {record.advice[0].upper()}{record.advice[1:]}."


def summary(record: RunRecord) -> list[tuple[str, str]]:
    """Returns what fired before and after, the accuracy, and where the output is: what is asked first."""
    found = [("model", record.checkpoint.path)] if record.command != "cleanse" else []
    found += [("accepted", str(record.accepted))] if record.accepted is not None else []
    if record.output is not None:
        digest = f" ({record.checkpoint.sha256[:8]})" if record.checkpoint.sha256 else ""
        found.append(("made from", f"{record.checkpoint.path}{digest}"))
    if record.before is not None and record.before.triggers:
        found.append(("fired before", fired(record.before.triggers, record.class_names())))
    if record.after is not None and record.after.triggers:
        found.append(("fires after", _still(record, fired(record.after.triggers, record.class_names()))))
    kept = record.measure("agreement")
    if (said := accuracy(record)) != wording.NOTHING:
        found.append(("accuracy", f"{said} %{_measured_by(record)}"))
    elif kept is not None and kept.value is not None:
        found.append(("agreement", f"{wording.measure(kept)} % of the suspect's clean answers are kept"))
    if record.output is not None:
        found.append(("written", record.output.path))
    checkpoint, data = record.checkpoint, record.data
    if checkpoint.architecture:
        found.append(("network", _joined([checkpoint.architecture, checkpoint.preprocess])))
    if data is not None:
        measured = data.held_out if data.held_out is not None else data.images
        kind = "labeled" if record.measure("clean_accuracy") is not None else "unlabeled"
        found.append(("measured on", f"{measured:,} {kind} images of {data.test or data.path}"))
    return found


def fired(rows: Sequence[TriggerRow], names: Sequence[str] | None) -> str:
    """Returns how many triggers fail, and what the worst of them does."""
    tried = by_trigger(rows)
    failing = [row for row in tried.values() if row.outcome == FAILS]
    of = f"{len(failing)} of {len(tried)} triggers"
    worst = worst_row(failing)
    return of if worst is None else f"{of}; {evidence(worst, names)}"


def _measured_by(record: RunRecord) -> str:
    """Returns what an accuracy is of, where it is not the network's own on both sides."""
    if record.output is not None and record.output.new_head is not None:
        return f", {wording.PROBED_BEFORE}"
    return " of a linear probe on the features" if record.checkpoint.kind == "encoder" else ""


def _still(record: RunRecord, said: str) -> str:
    """Returns what the output does under the trigger that was worst on the suspect, behind `said`."""
    worst = (
        worst_row([row for row in record.before.triggers if row.outcome == FAILS]) if record.before else None
    )
    now = same(record.after.triggers, worst) if worst is not None and record.after is not None else None
    if worst is None or now is None or now.outcome == FAILS:
        return said
    base, names = "", record.class_names()
    if now.base_rate is not None:
        base = f", {wording.rate(now.base_rate)} % without it"
    told = ", which the recipe trained on," if now.trained_on else ""
    source = headline(worst)[1]
    left = of_source(now, source)
    if source is None or left is None:
        moved = f"{wording.rate(now.asr)} % of images"
    else:
        moved, base = f"{wording.rate(left)} % of the images of {wording.label(source, names)}", ""
    return f"{said}; {now.trigger}{told} sends {moved} to {wording.label(now.target, names)}{base}"


# --- parts of a page ----------------------------------------------------------------------------------------


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Returns where the run's numbers are from: model, network, images, recipe, output, seed, device."""
    checkpoint, data = record.checkpoint, record.data
    size = "x".join(map(str, checkpoint.input_size or [])) or None
    network = [
        checkpoint.architecture,
        None if checkpoint.classes is None else f"{checkpoint.classes} classes",
        None if size is None else f"input {size}",
        None if checkpoint.parameters is None else f"{checkpoint.parameters:,} parameters",
    ]
    found = [("model", checkpoint.path), ("sha256", checkpoint.sha256 or ""), ("network", _joined(network))]
    found += [("accepted", str(record.accepted))] if record.accepted is not None else []
    if checkpoint.kind == "encoder":
        matched = None if checkpoint.matched is None else f"{checkpoint.matched} tensors read"
        feature = None if checkpoint.feature is None else f"feature: {checkpoint.feature}"
        size = None if checkpoint.feature_size is None else f"{checkpoint.feature_size} numbers"
        found.append(("encoder", _joined([checkpoint.layout, feature, size, matched])))
    if checkpoint.preprocess or checkpoint.mean:
        margin = checkpoint.preprocess_margin
        found.append(
            (
                "preprocessing",
                _joined(
                    [
                        checkpoint.preprocess,
                        None if checkpoint.mean is None else f"mean {_numbers(checkpoint.mean)}",
                        None if checkpoint.std is None else f"std {_numbers(checkpoint.std)}",
                        None
                        if checkpoint.preprocess_source is None
                        else f"from {checkpoint.preprocess_source}",
                        None if margin is None else f"margin {margin:.2f}",
                        checkpoint.resize,
                    ]
                ),
            )
        )
    for other in checkpoint.alternatives:
        found.append(("also fits", _joined([str(other.get("name", "")), str(other.get("reason", ""))])))
    if checkpoint.unread:
        found.append(("not read", ", ".join(checkpoint.unread)))
    if data is not None:
        measured = "all" if data.held_out is None else f"{data.held_out:,}"
        found.append(
            (
                "images",
                _joined(
                    [
                        data.path,
                        f"{data.images:,}",
                        "labeled" if data.labeled else "unlabeled",
                        "trained on with the suspect's answers as labels" if data.pseudo_labels else None,
                        None
                        if data.held_out is None or data.test is not None
                        else f"{data.held_out:,} held out",
                        None if data.test is None else f"measured on {measured} of {data.test}",
                        f"{data.skipped} unreadable" if data.skipped else None,
                        f"{data.duplicates} duplicates removed" if data.duplicates else None,
                        f"{data.set_aside} set aside" if data.set_aside else None,
                    ]
                ),
            )
        )
    if record.recipe is not None:
        settings = ", ".join(f"{key}={value}" for key, value in record.recipe.settings.items())
        found.append(("recipe", _joined([record.recipe.name, record.recipe.source])))
        found.append(("settings", settings))
        found.append(("trains on", ", ".join(record.recipe.families)))
    if record.output is not None:
        found.append(("written", _joined([record.output.path, f"sha256 {record.output.sha256}"])))
        if (head := record.output.new_head) is not None:
            found.append(("new head", f"{head.name}, {len(head.classes)} classes: {', '.join(head.classes)}"))
            found.append(("not in it", ", ".join(head.left_out)))
    version = record.versions.get("bdclean")
    seed = None if record.seed is None else f"seed {record.seed}"
    found.append(
        (
            "run",
            _joined(
                [
                    f"bdclean {version}" if version else None,
                    record.device,
                    record.precision,
                    seed,
                    record.started,
                    None if record.seconds is None else wording.duration(record.seconds),
                    None
                    if record.forward_passes is None
                    else f"{record.forward_passes:.1f} passes over the images",
                ]
            ),
        )
    )
    return [(name, value) for name, value in found if value]


def _unreadable(record: RunRecord) -> list[dict[str, object]]:
    return list(record.data.unreadable) if record.data is not None else []


def _joined(parts: Iterable[str | None]) -> str:
    return ", ".join(part for part in parts if part)


def _numbers(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
