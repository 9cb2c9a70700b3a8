"""Detectors of a scan: those that are asked for, else the quick ones; what was not run is listed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bdclean import registry
from bdclean.detectors import calibration
from bdclean.errors import Refused
from bdclean.measuring import pictures
from bdclean.measuring.pull import holm
from bdclean.networks.ambiguity.choosing import Choice
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.progress import Tell
from bdclean.record.run import SUSPICIOUS, Calibration, Finding, Picture, Skipped
from bdclean.runs.options import Inputs
from bdclean.runs.suspect import Suspect
from bdclean.training.inversion import Detected
from bdclean.training.run import Precision, Run, probe_precision
from bdclean.training.students import frozen

Detector = Callable[[Classifier, Arch, Tensor, Run], Detected]
"""The suspect, its architecture and images uint8 [n c h w] to findings; raises Refused where it has too little."""

LEVEL, LEVEL_UNASKED = 0.05, 0.01
"""Of the corrected p-value, from which a detector makes a network suspicious: one that was asked for by name, and one
that runs by itself in every scan of a pipeline, where a false alarm in twenty would be no use."""


@dataclass
class Looked:
    """What detectors found, and which could not say anything. `precision` is what their networks were run in."""

    findings: list[Finding] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    calibration: list[Calibration] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    precision: str | None = None


def choose_detectors(names: Sequence[str], kind: str) -> tuple[dict[str, Detector], list[Skipped]]:
    """The detectors called `names`, else the quick ones of networks of this `kind`; and those that are not run.

    Raises UsageError for a detector of the other kind.
    """
    known = {name: entry for name, entry in registry.DETECTORS.items() if registry.path_for(entry, kind)}
    wanted = dict.fromkeys(names or (name for name, entry in known.items() if entry.quick))
    chosen = {name: registry.load_for(registry.DETECTORS, name, kind)() for name in wanted}
    left = [
        Skipped(f"detector {name}", f"not asked for: --detector {name} runs it")
        for name in known
        if name not in wanted
    ]
    return chosen, left


def look(
    detectors: Mapping[str, Detector], suspect: Suspect, choice: Choice, images: Tensor, inputs: Inputs,
    tell: Tell, *, asked: bool,
) -> Looked:  # fmt: skip
    """What `detectors` find in the suspect, read as `choice` says, on `images` uint8 [n c h w].

    `asked`: somebody named them, so that LEVEL holds in place of LEVEL_UNASKED.
    """
    if not detectors:
        return Looked()
    classifier = suspect.classifier(choice)
    precision = precision_for(detectors, classifier, images, suspect.device, inputs.precision)
    run, looked = Run(suspect.device, precision, inputs.seed, tell), Looked(precision=precision.name)
    found: dict[str, Detected] = {}
    for name, detector in detectors.items():
        try:
            found[name] = detector(frozen(classifier, run), suspect.arch, images, run)
        except Refused as error:  # what one lacks must not end the scan
            looked.skipped.append(Skipped(f"detector {name}", str(error)))
    kind = (suspect.arch.classes, max(images.shape[2:]))
    ranked = rank({name: each.statistic for name, each in found.items()}, kind, len(suspect.choices))
    tests = len(suspect.choices) * sum(each.p_value is not None for each in ranked.values())
    for name, each in found.items():
        looked.findings += _judged(each, ranked.get(name), LEVEL if asked else LEVEL_UNASKED, tests)
        looked.findings += [_undecided(finding, UNCOUNTED) for finding in each.uncounted]
        looked.pictures += pictures.masks(each.pictures)
    looked.calibration = list(ranked.values())
    return looked


def precision_for(
    detectors: Iterable[str],
    classifier: Classifier,
    images: Tensor,
    device: torch.device,
    wanted: str = "auto",
) -> Precision:
    """float32 where all are quick: no timing decides what a usual scan finds. Else what a short probe finds fastest."""
    if all(registry.DETECTORS[name].quick for name in detectors):
        return Precision()
    return probe_precision(classifier, images, device, wanted)


def rank(
    statistics: Mapping[str, float | None],
    kind: tuple[int, int],
    readings: int = 1,
    without: str | None = None,
) -> dict[str, Calibration]:
    """Where each detector's statistic lies among clean networks of this `kind` (classes, side), by detector.

    Corrected over the detectors that have enough clean networks (Holm), and for the file's `readings` (Bonferroni).
    `without`: a clean network that is left out, for counting false alarms on it.
    """
    ranked = {}
    for name, score in statistics.items():
        scores = calibration.matching(name, *kind, without=without)
        if score is not None and scores:
            value = calibration.p_value(score, scores)
            ranked[name] = Calibration(name, calibration.kind_said(*kind, name), score, scores, value)
    known = [each for each in ranked.values() if each.p_value is not None]
    for each, value in zip(known, holm([each.p_value or 0.0 for each in known]), strict=True):
        each.corrected = min(1.0, readings * value)
    return ranked


UNCOUNTED = "Not calibrated (no clean network was asked this way): it does not decide the verdict."


def _judged(found: Detected, ranked: Calibration | None, level: float, tests: int) -> list[Finding]:
    """Its findings with how odd the network is among clean ones: suspicious where that and its own threshold agree.

    `tests`: how many were asked, for which it is corrected.
    """
    if ranked is None or ranked.p_value is None or ranked.corrected is None:
        count = 0 if ranked is None else len(ranked.scores)
        said = (
            f"Not calibrated ({count} clean networks of its kind, {calibration.LEAST_MATCHING} are needed): it does "
            "not decide the verdict."
        )
        return [_undecided(finding, said) for finding in found.findings]
    above = sum(score >= ranked.score for score in ranked.scores)
    unusual = ranked.corrected <= level
    said = (
        f"Of {len(ranked.scores)} clean networks ({ranked.kind}) {above} score as high: p {ranked.p_value:.3f}, "
        f"corrected {ranked.corrected:.3f}, suspicious from {level} down"
    )
    if (least := tests / (len(ranked.scores) + 1)) > level:
        said += f", which so few cannot reach (least {least:.3f}): it does not decide the verdict"
    return [
        replace(
            finding,
            verdict=SUSPICIOUS if unusual and finding.verdict == "outlier" else finding.verdict,
            p_value=ranked.p_value,
            reason=f"{finding.reason}. {said}",
        )
        for finding in (Finding(**each) for each in found.findings)
    ]


def _undecided(finding: dict[str, Any], said: str) -> Finding:
    """A finding that decides no verdict, as is `said`."""
    return Finding(**finding | {"reason": f"{finding['reason']}. {said}"})
