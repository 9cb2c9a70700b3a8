"""One run, kept from crashing: whatever is raised becomes the record's problem, a sentence and an exit code."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from bdclean import ranks
from bdclean.cli.console import Shown, kept_for_the_result, warn, where_to_look
from bdclean.cli.defects import problem_of, trace
from bdclean.cli.doctor import versions
from bdclean.cli.places import Records
from bdclean.cli.progress import Progress
from bdclean.cli.project import Project
from bdclean.errors import ENDING, Refused, attach
from bdclean.files.weights import digest
from bdclean.record import gate
from bdclean.record.gate import Gate
from bdclean.record.run import FAILED, NOT_ASSESSED, RunRecord


def run_all(
    command: str,
    models: Sequence[str],
    work: Callable[[str, Progress], RunRecord],
    judge: Gate,
    shown: Shown,
    records: Records,
    quiet: bool,
    project: Project | None = None,
) -> int:
    """Runs every model, one after another, and returns the exit code of all; one that fails stops no other."""
    found: list[RunRecord] = []
    codes: list[int] = []
    at_once = shown.form == "jsonl" and shown.out is None
    several = len(models) > 1
    progress = Progress(quiet, models=len(models))
    for number, model in enumerate(models, 1):
        with progress:
            progress.begin(model if several else "")
            with kept_for_the_result():
                record = guarded(command, model, partial(work, model, progress))
        settled = _settle(number, record)
        if not ranks.first():  # of several processes of torchrun the first alone tells
            codes.append(record.problem.exit_code if record.problem else 0)
            if settled:
                continue
            break
        record = project.judge(record) if project is not None else record
        if not at_once:  # of many models, pictures would pile up that were printed long ago
            found.append(record)
        code = judge.exit_code(record)
        codes.append(code)
        prefix = f"{model}: " if several else ""
        said = (
            [f"what is found is accepted {record.accepted}."] if record.excused and not record.problem else []
        )
        said += [record.problem.message] if record.problem else sum(judge.check(record), [])
        for line in said:
            warn(f"{prefix}{line}{f' {where_to_look([command])}' if code == 2 else ''}")
        try:
            records.write(record, model)
        except Refused as error:
            warn(str(error))
            codes.append(error.exit_code)
        if at_once:
            codes += _show(shown, [record])
        # Ctrl-C means all of them; wrong usage would be wrong for the next model, too, unless it is about this one.
        wrong = code == 2 and number == 1 and record.checkpoint.sha256 is None
        if code >= 128 or wrong or not settled:
            break
    if not ranks.first():
        return max(codes)
    lone = len(found) == 1 and found[0].problem is not None and shown.form in ("table", "md")
    if not at_once and (shown.out is not None or not lone):
        codes += _show(shown, found)
    return gate.exit_code(codes)


def _settle(number: int, record: RunRecord) -> bool:
    """Whether all processes of torchrun have come to the end of the `number`-th model, and can begin the next."""
    parallel = sys.modules.get("bdclean.training.parallel")
    if parallel is None or ranks.own().count == 1:
        return True
    settled: bool = parallel.settle(number, record.problem.kind if record.problem else None)
    if not settled:
        for each in ENDING:  # torchrun ends all where one has ended; what is known is told first
            signal.signal(each, signal.SIG_IGN)
    return settled


def _show(shown: Shown, records: Sequence[RunRecord]) -> list[int]:
    """Shows `records`; a place that cannot be written adds its exit code, and hides no verdict's."""
    try:
        shown.show(records)
    except Refused as error:
        warn(str(error))
        return [error.exit_code]
    return []


def _naming(command: str, model: str, work: Callable[[], RunRecord]) -> RunRecord:
    """Returns the record of `work`; what it raises carries one that says which bytes `model` is, read or not."""
    try:
        return work()
    except Exception as error:
        attach(error, RunRecord(command))
        known = getattr(error, "record", None)
        if isinstance(known, RunRecord) and known.checkpoint.sha256 is None:
            known.checkpoint.sha256 = digest(Path(model))
        raise


def guarded(command: str, model: str, work: Callable[[], RunRecord]) -> RunRecord:
    """Returns the record of `work`, also when it raises: refused, failed or interrupted, with what was known."""
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    try:
        record = _naming(command, model, work)
    except BaseException as error:  # a crash must never exit 1, which reads as a verdict
        known = getattr(error, "record", None)
        record = known if isinstance(known, RunRecord) else RunRecord(command)
        record.checkpoint.path = record.checkpoint.path or model
        record.verdict = NOT_ASSESSED
        record.outcome, record.problem = problem_of(error)
        if not ranks.first() and (parallel := sys.modules.get("bdclean.training.parallel")) is not None:
            parallel.give_reason(error, record.problem.message, record.problem.exit_code)
        if record.outcome == FAILED:
            trace(error)
    record.started = record.started or started
    record.seconds = record.seconds if record.seconds is not None else round(time.monotonic() - clock, 3)
    record.argv = record.argv or list(sys.argv)
    record.versions = {**versions(), **record.versions}
    return record
