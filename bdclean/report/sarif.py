"""RunRecords -> SARIF 2.1.0 (OASIS, errata 01), as far as GitHub code scanning reads it.

One log with one run, since code scanning takes no two runs of one tool and category in a file; each record is one of
its invocations. A trigger row that fails is an error, a suspicious finding a warning, an inconclusive row a note; rows
that pass are no results. What was refused, failed or could not be assessed has no errors either, so its invocation is
unsuccessful and says why: without that it would read as if nothing had been found.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from bdclean import __version__
from bdclean.files.text import plain
from bdclean.record.rule import moved
from bdclean.record.run import (
    BACKDOORED,
    FAILS,
    INCONCLUSIVE,
    NOT_ASSESSED,
    NOT_MEASURED,
    RAN,
    SUSPICIOUS,
    Finding,
    RunRecord,
    TriggerRow,
)
from bdclean.registry import DETECTORS
from bdclean.report.document import LIMITS, sentence, was
from bdclean.report.rows import evidence

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
ROOT = "%SRCROOT%"  # what relative URIs are relative to; code scanning takes it for the repository
LONGEST = 1000  # characters of a message: code scanning shows 1,024
FIRST_CHARACTER = {"startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1}
"""A checkpoint has no lines, and code scanning shows no result without a region."""

OTHER = "other"
FAMILIES = {
    "patch": "a patch stamped on the image",
    "blend": "a picture or noise blended over the image",
    "wave": "waves or stripes added to the image",
    "low": "a pattern of low frequencies added to the image",
    "noise": "faint noise added to the image",
    "warp": "a small warp of the image",
    "tone": "a change of the image's colors or brightness",
    "quantise": "colors rounded to a few levels",
    "blur": "a blur of the image",
    OTHER: "a trigger of another family",
}
"""What a trigger of each family does, the subject of a rule's sentence."""
LOOKED_FOR = {
    **{name: entry.line for name, entry in DETECTORS.items()},
    "pull": "encoders: how far stamping pulls the features of all images together, beside controls",
    OTHER: "a detector that this version of bdclean does not know",
}
"""What each detector that can make a run suspicious looks at."""
VERDICT = "verdict"
"""The rule for a record that says what it found and lacks the rows that say so: it must not read as nothing found."""
ADVICE = (
    "Do not use this checkpoint. `bdclean cleanse MODEL --data IMAGES` makes a cleansed drop-in replacement and "
    f"measures it before and after. {LIMITS}"
)


def render(records: Sequence[RunRecord]) -> str:
    """Returns the log as ASCII JSON, ending in a newline; strangers' text is escaped and takes no part in markup."""
    rules = _rules()
    places = {rule["id"]: number for number, rule in enumerate(rules)}
    artifacts: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, record in enumerate(records):
        index = _index(artifacts, _artifact(record))
        for result in _suppressed(_results(record), record):
            location = {"artifactLocation": _location(record, index), "region": FIRST_CHARACTER}
            results.append(
                {
                    **result,
                    "ruleIndex": places[result["ruleId"]],
                    "locations": [{"physicalLocation": location}],
                    "provenance": {"invocationIndex": number},
                }
            )
    driver = {
        "name": "bdclean",
        "version": __version__,
        "semanticVersion": __version__,
        "shortDescription": {"text": "Finds backdoors in vision checkpoints."},
        "fullDescription": {"text": LIMITS},
        "rules": rules,
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [_invocation(record) for record in records],
        "originalUriBaseIds": {ROOT: {"description": {"text": "The folder that bdclean was run in."}}},
        "artifacts": artifacts,
        "results": results,
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, allow_nan=False, indent=1) + "\n"


# --- rules --------------------------------------------------------------------------------------------------


def _rules() -> list[dict[str, Any]]:
    """All rules, whether or not they have results: their places never depend on what was found."""
    return [
        *(
            _rule(
                f"trigger/{family}",
                "error",
                f"Backdoor: {what} changes what the network answers",
                f"{_capital(what)} sends images of other classes to one class, far more often than controls of the "
                "same strength do.",
            )
            for family, what in FAMILIES.items()
        ),
        *(
            _rule(
                f"detector/{name}",
                "warning",
                f"Possible backdoor: {name} finds the network unusual",
                f"{_capital(what)}. No trigger was shown to work: look at the network more closely.",
            )
            for name, what in LOOKED_FOR.items()
        ),
        _rule(
            VERDICT,
            "error",
            "Backdoored or suspicious by its record",
            "The record says so and lacks the rows or findings that it follows from.",
        ),
    ]


def _rule(name: str, level: str, short: str, full: str) -> dict[str, Any]:
    # No security-severity: it is a rule's, and would rank inconclusive rows as high as those that fail.
    return {
        "id": name,
        "shortDescription": {"text": short},
        "fullDescription": {"text": full},
        "help": {"text": f"{full} {ADVICE}", "markdown": f"{full}\n\n{ADVICE}"},
        "defaultConfiguration": {"level": level},
        "properties": {"tags": ["security", "backdoor"]},
    }


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- results ------------------------------------------------------------------------------------------------


def _results(record: RunRecord) -> list[dict[str, Any]]:
    """What the run's verdict hangs on, without places; of a cleansing what is left in the file that it wrote."""
    if record.outcome != RAN:
        return []
    seen: Counter[str] = Counter()
    found = []
    for row in record.rows():
        if row.outcome in (FAILS, INCONCLUSIVE):
            digest = _identity(record, row.trigger, row.target)
            seen[digest] += 1
            found.append(_of_row(row, f"{digest}:{seen[digest]}"))
    for finding in record.findings:
        # Counted also where nothing is unusual, so that the others keep their numbers.
        digest = _identity(record, f"detector {finding.detector}", finding.trigger)
        seen[digest] += 1
        if finding.verdict == SUSPICIOUS:
            found.append(_of_finding(finding, f"{digest}:{seen[digest]}"))
    if record.verdict in (BACKDOORED, SUSPICIOUS) and all(each["level"] == "note" for each in found):
        level = "error" if record.verdict == BACKDOORED else "warning"
        said = f"The record says {record.verdict}: {sentence(record)}"
        found.append(_result(VERDICT, level, said, f"{_identity(record, VERDICT, record.verdict)}:1"))
    return found


def _suppressed(results: list[dict[str, Any]], record: RunRecord) -> list[dict[str, Any]]:
    """The results, marked where the project file accepts them: they stay in the log, and ask nobody to act."""
    if record.accepted is None or not record.excused:
        return results
    why = _message(f"{_capital(str(record.accepted))}.")["text"]
    return [
        {**result, "suppressions": [{"kind": "external", "status": "accepted", "justification": why}]}
        for result in results
    ]


def _of_row(row: TriggerRow, fingerprint: str) -> dict[str, Any]:
    rule = f"trigger/{row.family if row.family in FAMILIES else OTHER}"
    said = evidence(row)
    if row.outcome == INCONCLUSIVE:
        said = f"Inconclusive: {said}{_ended(row.reason)}"
    level, rate = "error" if row.outcome == FAILS else "note", moved(row)
    measured = {
        "trigger": plain(row.trigger),
        "target": row.target if isinstance(row.target, int) or row.target is None else plain(row.target),
        "attackSuccessRate": rate.value,
        "low": rate.low,
        "high": rate.high,
        "images": rate.n,
    }
    return {**_result(rule, level, said, fingerprint), "properties": measured}


def _of_finding(finding: Finding, fingerprint: str) -> dict[str, Any]:
    rule = f"detector/{finding.detector if finding.detector in LOOKED_FOR else OTHER}"
    said = f"{finding.detector} finds the network unusual.{_ended(finding.reason)}"
    return _result(rule, "warning", said, fingerprint)


def _ended(reason: str) -> str:
    """A reason as the next sentence, where there is one."""
    return f" {_capital(reason.rstrip('.'))}." if reason else ""


def _result(rule: str, level: str, said: str, fingerprint: str) -> dict[str, Any]:
    return {
        "ruleId": rule,
        "level": level,
        "message": _message(said),
        # The only fingerprint that code scanning reads: what is flagged, and how often it was before.
        "partialFingerprints": {"primaryLocationLineHash": fingerprint},
    }


def _identity(record: RunRecord, what: str, towards: int | str | None) -> str:
    """Sixteen hex digits that are the same in every run on the same bytes at the same place, and in no other.

    Neither rates nor versions take part, nor words: an alert that was dismissed stays so until the checkpoint changes.
    """
    path, sha256 = record.judged_file()
    parts = json.dumps([uri_of(path)[0], sha256, what, towards])
    return hashlib.sha256(parts.encode("ascii")).hexdigest()[:16]


def _message(text: str) -> dict[str, str]:
    """`text` as SARIF's plain text (3.11): braces doubled, since single ones are placeholders, and no link in it."""
    line = plain(text)
    line = line if len(line) <= LONGEST else f"{line[: LONGEST - 4]} ..."
    return {"text": line.replace("{", "{{").replace("}", "}}").replace("](", "] (")}


# --- invocations --------------------------------------------------------------------------------------------


def _invocation(record: RunRecord) -> dict[str, Any]:
    """How one run went: its verdict, and what was not done or doubtful, as notifications."""
    assessed = record.outcome == RAN and record.verdict != NOT_ASSESSED
    told = record.verdict if record.outcome == RAN else record.outcome
    notes = [
        _notification(
            record, told, "note" if assessed else "error", f"{told}: {was(record)}{sentence(record)}"
        )
    ]
    notes += [_notification(record, "warning", "warning", text) for text in record.warnings]
    notes += [_notification(record, "skipped", "note", f"{s.what}: {s.reason}") for s in record.skipped]
    notes += [
        _notification(record, NOT_MEASURED, "note", f"{row.trigger}: {row.reason or NOT_MEASURED}")
        for row in record.rows()
        if row.outcome == NOT_MEASURED
    ]
    said = {"command": record.command, "verdict": record.verdict, "outcome": record.outcome}
    said["version"] = record.versions.get("bdclean", "")
    return {
        "executionSuccessful": assessed,
        **_times(record),
        "toolExecutionNotifications": notes,
        "properties": {key: plain(value) for key, value in said.items()},
    }


def _notification(record: RunRecord, kind: str, level: str, text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"descriptor": {"id": kind}, "level": level, "message": _message(text)}
    if record.judged_file()[0]:
        found["locations"] = [{"physicalLocation": {"artifactLocation": _location(record)}}]
    return found


def _times(record: RunRecord) -> dict[str, str]:
    """When the run began and ended, as far as the record says so with a time zone."""
    with suppress(ValueError, OverflowError):
        began = datetime.fromisoformat(record.started)
        if began.tzinfo is not None:
            ended = began + timedelta(seconds=record.seconds or 0.0)
            return {"startTimeUtc": _utc(began), "endTimeUtc": _utc(ended)}
    return {}


def _utc(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


# --- places -------------------------------------------------------------------------------------------------


def _artifact(record: RunRecord) -> dict[str, Any] | None:
    path, sha256 = record.judged_file()
    if not path:
        return None
    found: dict[str, Any] = {"location": _location(record)}
    if sha256 is not None and re.fullmatch("[0-9a-f]{64}", sha256):
        found["hashes"] = {"sha-256": sha256}
    return found


def _index(artifacts: list[dict[str, Any]], artifact: dict[str, Any] | None) -> int | None:
    """Where the artifact is in the list, which it joins if it is new."""
    if artifact is None:
        return None
    if artifact not in artifacts:
        artifacts.append(artifact)
    return artifacts.index(artifact)


def _location(record: RunRecord, index: int | None = None) -> dict[str, Any]:
    uri, relative = uri_of(record.judged_file()[0])
    found: dict[str, Any] = {"uri": uri}
    if relative:
        found["uriBaseId"] = ROOT
    return found if index is None else {**found, "index": index}


def uri_of(path: str) -> tuple[str, bool]:
    """Returns a path as a URI, and whether that is relative to the working directory.

    It is for every path in there, however it was typed, so that the same file has the same URI; others that are
    absolute become file: URIs. Dots are resolved by their words alone: the file may lie on another machine.
    """
    path = posixpath.normpath(_slashes(path))
    with suppress(OSError):  # the working directory may be gone
        path = path.removeprefix(f"{_slashes(os.getcwd()).rstrip('/')}/")
    escaped = quote(_utf8(path), safe="/")
    if not path.startswith("/"):
        return escaped, True
    escaped = re.sub("^/([A-Za-z])%3A/", r"/\1:/", escaped)
    return f"file:{escaped}" if path.startswith("//") else f"file://{escaped}", False


def _slashes(path: str) -> str:
    """The path with slashes alone, one in front of a drive and two of a server. Windows' are known by these."""
    if os.sep == "\\" or re.match(r"[A-Za-z]:[\\/]|\\\\[^\\]", path):
        path = path.replace("\\", "/")
        return f"/{path}" if re.match("[A-Za-z]:/", path) else path
    return re.sub("^//+", "/", path)


def _utf8(text: str) -> bytes:
    """The bytes of a file name: those that Python could not decode as they are on disk."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
