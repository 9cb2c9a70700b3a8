"""Run by each of two processes: every recipe that says it is data-parallel, together and alone, as JSON per rank.

Started as `training/two_processes.py` is.
"""

import json
import sys
from pathlib import Path

import torch
from contracts.test_grey import IMAGES, suspect
from recipes.test_recipes import QUICK, QUICK_ENCODER, QUICK_TEACHER

from bdclean import ranks, registry
from bdclean.training import parallel
from bdclean.training.run import Precision, Run

RUNS = [
    *(
        (name, "classifier", settings) for name, settings in QUICK.items() if name != "auto"
    ),  # which is inoculate
    *((name, "encoder", settings) for name, settings in QUICK_ENCODER.items()),
    ("distill", "encoder", QUICK_ENCODER["distill"] | QUICK_TEACHER | {"teacher": "ft"}),
]


def weights(model):
    return torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()])


def main():
    parallel.join("cpu")
    found = {}
    for name, kind, settings in RUNS:
        recipe = registry.configure(registry.load_recipe(name, kind), settings)
        if not getattr(recipe, "data_parallel", False):
            continue
        made = []
        for together in (False, True):
            model, arch = suspect(kind)
            run = Run(torch.device("cpu"), Precision(), 1, together=together)
            labeled = IMAGES if recipe.needs_labels or "teacher" in settings else None
            made.append(recipe(model, arch, IMAGES.unlabeled(), labeled, run))
        before, (alone, both) = weights(suspect(kind)[0]), map(weights, (made[0].model, made[1].model))
        found[f"{name} {kind} {settings.get('teacher', '')}".strip()] = {
            "apart": float((alone - both).norm() / (alone - before).norm()),
            "weights": float(both.sum()),
            "stages": made[0].stages == made[1].stages,
        }
    Path(f"{sys.argv[1]}.{ranks.own().number}").write_text(json.dumps(found))


main()
