"""The run that a recipe is part of, with its resume state beside the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bdclean import __version__
from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.progress import Tell
from bdclean.recipes.recipe import Recipe
from bdclean.runs.options import Inputs
from bdclean.runs.places import resume_state
from bdclean.runs.split import Images
from bdclean.runs.suspect import Suspect
from bdclean.training.parallel import from_first, joined, processes
from bdclean.training.resume import Saved
from bdclean.training.run import Precision, Run, probe_precision
from bdclean.triggers.stamping import Trigger


def open_run(
    classifier: Classifier, suspect: Suspect, images: Images, recipe: str, method: Recipe, out: Path, resume: bool,
    inputs: Inputs, tell: Tell,
) -> Run:  # fmt: skip
    """The run with its resume state: what is there is opened with `resume`, else the state starts anew."""
    settings: dict[str, Any] = asdict(method)  # type: ignore[call-overload]
    arguments = {
        "source_sha256": suspect.checkpoint.sha256,
        "recipe": recipe,
        "settings": {key: repr(value) for key, value in settings.items()},
        "data": images.unlabeled.digest,
        "labeled": images.labeled.digest if images.labeled is not None else None,
        "seed": inputs.seed,
        "precision": inputs.precision,
        "device": str(suspect.device),
        "processes": processes(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bdclean": __version__,
        "preprocess": classifier.preprocess.spec(),
        "architecture": suspect.arch.name,
        "new_head": suspect.new_head.classes if suspect.new_head is not None else None,
    }
    saved = Saved(resume_state(out), from_first(arguments))
    if resume and saved.open():
        precision = Precision.parse(str(saved.notes.get("precision")))
    else:
        # timing decides, so what was decided belongs to the state: a resumed run must not decide anew
        probed = probe_precision(classifier, images.unlabeled.images, suspect.device, inputs.precision)
        precision = from_first(probed)
        saved.notes["precision"] = precision.name
    return Run(suspect.device, precision, inputs.seed, tell, saved, together=joined())


def hold_known(run: Run, known: Sequence[Trigger]) -> None:
    """Keep in the resume state which triggers the recipe is told; raises Refused where it was begun with others.

    They are known once the suspect was measured, long after the state was opened.
    """
    saved, specs = run.saved, [trigger.spec() for trigger in known]
    if saved is not None and saved.notes.setdefault("known", specs) != specs:
        raise Refused(
            f"the resume state {saved.path} was made in a run in which other triggers fired on the suspect: "
            "repeat that run's arguments, or start anew without --resume."
        )
