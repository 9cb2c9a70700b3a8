"""`--fail-on`: what makes a run exit 1 beyond its verdict, and the exit code of one run and of several."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bdclean.errors import UsageError
from bdclean.files.text import closest
from bdclean.record.rule import excess, fails_at, moved, worst_source_rate
from bdclean.record.run import FAILS, INCONCLUSIVE, NOT_MEASURED, PASSES, RunRecord, TriggerRow

DEFAULT = "asr>=0.2"
ROW_NAMES = ("asr", "excess_asr", "base_rate", "robust_accuracy")
SCORES = ("defence_effectiveness_rating", "balanced_score")
"""Measures that are no shares of images."""
MEASURE_NAMES = (
    "clean_accuracy",
    "class_mean_accuracy",
    "worst_class_accuracy",
    "target_class_accuracy",
    "clean_accuracy_change",
    "agreement",
    "knn_accuracy",
    "probe_accuracy",
    *SCORES,
)
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Condition:
    """One comparison, such as `clean_accuracy<0.8`."""

    name: str
    sign: str
    value: float

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.value:g}"


@dataclass(frozen=True)
class Gate:
    """Parsed `--fail-on` expressions; `threshold` is the attack success rate that rows are judged by."""

    conditions: tuple[Condition, ...] = ()
    inconclusive: bool = False
    never: bool = False

    @property
    def threshold(self) -> float:
        """The lowest rate that an `asr` condition names, else that of the default."""
        rates = [c.value for c in self.conditions if c.name == "asr"]
        return min(rates) if rates else _condition(DEFAULT).value

    def check(self, record: RunRecord) -> tuple[list[str], list[str]]:
        """Returns which expressions `record` reaches, and which it lacks a measurement for, as sentences.

        What triggers do is not looked at where it is accepted; accuracy and its kin still are.
        """
        if record.problem is not None:
            return [], [f"the run ended early: {record.problem.message}"]
        reached: list[str] = []
        missing: list[str] = []
        for condition in self.conditions:
            if record.excused and condition.name in ROW_NAMES:
                continue
            hits, measured = _hits(condition, record)
            if hits:
                reached.append(f"{condition}: {', '.join(hits)}.")
            elif not measured:
                missing.append(f"{condition}: {condition.name} was not measured.")
            elif open_rows := _unjudged(condition, record):
                missing.append(
                    f"{condition}: {', '.join(open_rows)} would have to be held against controls, which the run had no "
                    "need to measure: scan again with this --fail-on."
                )
        if self.inconclusive and not record.excused:
            rows = [row.trigger for row in record.rows() if row.outcome == INCONCLUSIVE]
            if rows:
                reached.append(f"inconclusive: {', '.join(rows)}.")
            elif not record.rows():
                missing.append("inconclusive: no trigger was measured.")
        return reached, missing

    def exit_code(self, record: RunRecord) -> int:
        """Returns a run's exit code: its verdict's, raised by what is reached or could not be checked.

        A finding that is accepted exits 0; what was refused or not assessed has no finding.
        """
        code = record.exit_code
        if record.problem is not None:
            return code
        if code == 1:
            if not self.never and not record.excused:
                return code
            code = 0
        reached, missing = self.check(record)
        if reached:
            return 1
        return 3 if missing else code


def parse(expressions: Iterable[str]) -> Gate:
    """Returns the gate of `--fail-on` expressions; raises UsageError on one that is not known."""
    conditions: list[Condition] = []
    words: set[str] = set()
    for text in expressions:
        word = text.strip()
        if word in ("inconclusive", "never"):
            words.add(word)
        else:
            conditions.append(_condition(word))
    if "never" in words and (conditions or len(words) > 1):
        raise UsageError("--fail-on never contradicts the other --fail-on: leave one of them out.")
    return Gate(tuple(conditions), "inconclusive" in words, "never" in words)


def exit_code(codes: Sequence[int]) -> int:
    """Returns the exit code of several runs: an interruption's, else 70, else 1, else 3 (also for 2), else 0."""
    if len(codes) == 1:
        return codes[0]
    stopped = [code for code in codes if code >= 128]
    if stopped:
        return stopped[0]
    return next((code for code in (70, 1, 3) if code in codes), 3 if any(codes) else 0)


def _condition(text: str) -> Condition:
    match = re.fullmatch(r"([a-z_]+)\s*(>=|<=|>|<)\s*(-?[0-9]*\.?[0-9]+(?:e-?[0-9]+)?)", text)
    if match is None:
        raise UsageError(
            f"--fail-on {text!r} is not known: write NAME>=NUMBER (or >, <=, <), inconclusive, or never."
        )
    name, sign, number = match.groups()
    if name not in ROW_NAMES + MEASURE_NAMES:
        raise UsageError(f"--fail-on knows no {name!r}: {closest(name, ROW_NAMES + MEASURE_NAMES)}")
    value = float(number)
    if abs(value) > 1:
        raise UsageError(f"--fail-on {text!r}: rates are shares of 1, so write 0.2 for 20 %.")
    if name in ("asr", "excess_asr") and sign[0] == "<":
        raise UsageError(
            f"--fail-on {text!r}: a low attack success rate is no failure; write {name}>={number}."
        )
    return Condition(name, sign, value)


def _said(name: str, value: float) -> str:
    """A share in percent, as reports have it; a score as it is."""
    return f"{value:.4g}" if name in SCORES else f"{100 * value:.1f} %"


def _hits(condition: Condition, record: RunRecord) -> tuple[list[str], bool]:
    """Returns what reaches the condition, in words, and whether anything was measured for it at all."""
    compare = COMPARE[condition.sign]
    if condition.name not in ROW_NAMES:
        measure = record.measure(condition.name)
        if measure is None or measure.value is None:
            return [], False
        return (
            [_said(condition.name, measure.value)] if compare(measure.value, condition.value) else []
        ), True
    values: list[tuple[TriggerRow, float | None]] = []
    for row in record.rows():
        rate = {"asr": row.asr, "base_rate": row.base_rate, "robust_accuracy": row.robust_accuracy}
        if row.outcome == NOT_MEASURED:
            continue
        if condition.name == "excess_asr":
            values.append((row, excess(row)))
        elif condition.name == "asr" and row.outcome == FAILS:
            values.append((row, max(moved(row).value or 0.0, worst_source_rate(row))))
        else:
            found = rate[condition.name]
            values.append((row, found.value if found is not None else None))
    hits = [
        f"{row.trigger} {_said(condition.name, value)}"
        for row, value in values
        if value is not None
        and compare(value, condition.value)
        and (condition.name != "asr" or fails_at(row, condition.value, record.threshold))
    ]
    return hits, any(value is not None for _, value in values)


def _unjudged(condition: Condition, record: RunRecord) -> list[str]:
    """Rows that surely reach a condition stricter than the run's threshold, and have no control to tell by."""
    if condition.name != "asr" or record.threshold is None or condition.value >= record.threshold:
        return []
    return [
        row.trigger
        for row in record.rows()
        if row.outcome == PASSES and row.control_rate is None and (row.asr.low or 0.0) >= condition.value
    ]
