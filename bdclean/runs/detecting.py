"""Detectors of a scan: those that are asked for, else the quick ones; what was not run is listed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from bdclean import registry
from bdclean.errors import Refused
from bdclean.measuring import pictures
from bdclean.networks.ambiguity.choosing import Choice
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.progress import Tell
from bdclean.record.run import Finding, Picture, Skipped
from bdclean.runs.options import Inputs
from bdclean.runs.suspect import Suspect
from bdclean.training.inversion import Detected
from bdclean.training.run import Precision, Run, probe_precision
from bdclean.training.students import frozen

Detector = Callable[[Classifier, Arch, Tensor, Run], Detected]
"""The suspect, its architecture and images uint8 [n c h w] to findings; raises Refused where it has too little."""


@dataclass
class Looked:
    """What detectors found, and which could not say anything. `precision` is what their networks were run in."""

    findings: list[Finding] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
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
    tell: Tell,
) -> Looked:  # fmt: skip
    """What `detectors` find in the suspect, read as `choice` says, on `images` uint8 [n c h w]."""
    if not detectors:
        return Looked()
    classifier = suspect.classifier(choice)
    precision = Precision()  # no timing decides what a usual scan finds
    if not all(registry.DETECTORS[name].quick for name in detectors):
        precision = probe_precision(classifier, images, suspect.device, inputs.precision)
    run, looked = Run(suspect.device, precision, inputs.seed, tell), Looked(precision=precision.name)
    for name, detector in detectors.items():
        try:
            found = detector(frozen(classifier, run), suspect.arch, images, run)
        except Refused as error:  # what one lacks must not end the scan
            looked.skipped.append(Skipped(f"detector {name}", str(error)))
            continue
        looked.findings += [Finding(**finding) for finding in found.findings]
        looked.pictures += pictures.masks(found.pictures)
    return looked
