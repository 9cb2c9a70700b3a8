"""A network adapted to another task: a shipped classifier and its trunk, to signs sorted in another way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdclean.errors import Refused, UsageError
from bdclean.progress import quiet
from bdclean.record.run import RunRecord
from bdclean.report.formats import render
from bdclean.runs.cleanse import cleanse
from bdclean.runs.options import Inputs
from bdclean.runs.scan import scan

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
LABELED, UNLABELED = SAMPLES / "images" / "labeled", SAMPLES / "images" / "unlabeled"
BADNETS = SAMPLES / "signs-badnets.safetensors"
TASK = {
    "limit": ("speed-30", "speed-50", "speed-80"),
    "order": ("stop", "give-way", "no-entry", "priority-road"),
    "turn": ("turn-left", "turn-right", "ahead-only"),
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """(to train on, to measure on), one folder a class of the new task each."""
    root = tmp_path_factory.mktemp("task")
    for name, signs in TASK.items():
        for sign in signs:
            for number, path in enumerate(sorted((LABELED / sign).iterdir())):
                if number % 4 == 3:
                    continue
                place = root / ("test" if number % 2 else "data") / name
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place / f"{sign}-{path.name}")
    return root / "data", root / "test"


def adapted(task, out, model=BADNETS, recipe="ft", settings=None, triggers=("badnets:size=3",), **more):
    data, test = task
    inputs = Inputs(**{
        "data": data, "test": test, "limit": 0, "device": "cpu", "precision": "fp32", "pictures": False, **more,
    })  # fmt: skip
    return cleanse(
        model, inputs, recipe=recipe, settings={"epochs": "4", "batch_size": "32"} | (settings or {}),
        new_head=True, triggers=triggers, out=out, tell=quiet,
    )  # fmt: skip


@pytest.mark.slow
def test_a_classifier_is_adapted_to_other_classes(task, tmp_path):
    out = tmp_path / "out.safetensors"
    record = adapted(task, out)
    assert record.checkpoint.kind == "classifier" and record.checkpoint.classes == 12
    assert record.data.classes == list(TASK) and record.data.labeled
    values = [{m.name: m for m in side.measures} for side in (record.before, record.after)]
    n = len(list(task[1].rglob("*.png")))
    assert values[0]["clean_accuracy"].value > 0.9 and "knn_accuracy" in values[0]
    assert values[1]["clean_accuracy"].value > 0.8 and "knn_accuracy" not in values[1]
    assert {side["clean_accuracy"].n for side in values} == {n}
    assert record.before.triggers[0].probes and not record.triggers[0].probes
    assert record.triggers[0].target == record.before.triggers[0].target
    head = record.output.new_head
    assert (head.name, head.classes, head.left_out) == ("fc", list(TASK), [])
    assert RunRecord.from_json(json.loads(record.dump())) == record

    before, after = load_file(BADNETS), load_file(out)
    assert list(before) == list(after)
    changed = {n for n in before if before[n].shape != after[n].shape}
    assert changed == {n for n in before if n.startswith("fc.")} and after["fc.weight"].shape[0] == 3
    for form in ("md", "html", "table"):
        shown = render([record], form)
        assert "linear probe" in shown and "written classifier" in shown, form

    # As a stranger finds it: no flag says what it is, how it is normalised, or what its classes are.
    found = scan(out, Inputs(data=task[1], limit=0, device="cpu"), triggers=("badnets:size=3",), tell=quiet)
    assert (found.checkpoint.kind, found.checkpoint.classes) == ("classifier", 3)
    assert found.checkpoint.preprocess == record.checkpoint.preprocess
    assert found.data.labels_source == "names" and found.data.classes == list(TASK)
    assert found.measure("clean_accuracy").value == record.after.measures[0].value


@pytest.mark.slow
def test_an_encoder_becomes_a_classifier_and_its_projector_stays_behind(task, tmp_path):
    state = {n: t for n, t in load_file(BADNETS).items() if not n.startswith("fc.")}
    suspect = {f"backbone.{n}": t.clone() for n, t in state.items()} | {
        "projector.0.weight": torch.randn(8, 64)
    }
    model = tmp_path / "encoder.safetensors"
    save_file(suspect, model, {"bdclean.preprocess": "half"})
    # Its statistics are of plain images, not of views, so that they do not part it from other stems.
    record = adapted(
        task, tmp_path / "out.safetensors", model, "sft", {"first_epochs": "1", "first_peak": "0.01"},
        arch="resnet8-cifar-b",
    )  # fmt: skip
    assert record.checkpoint.kind == "encoder" and record.checkpoint.unread == ["projector.0.weight"]
    assert record.output.new_head.left_out == ["projector.0.weight"]
    after = load_file(tmp_path / "out.safetensors")
    assert after.keys() == state.keys() | {"fc.weight", "fc.bias"}
    assert record.measure("clean_accuracy").value > 0.8
    assert "not in it: projector.0.weight" in render([record], "md").replace("\\", "")
    found = scan(tmp_path / "out.safetensors", Inputs(data=task[1], limit=0, device="cpu"),
                 triggers=("badnets:size=3",), tell=quiet)  # fmt: skip
    assert found.checkpoint.kind == "classifier" and found.measure("clean_accuracy").value > 0.8


@pytest.mark.slow
def test_images_without_labels_are_measured_by_the_probes_answers(task, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in task[1].rglob("*.png"):
        shutil.copy(path, flat / path.name)
    record = adapted(task, tmp_path / "out.safetensors", test=flat)
    assert record.measure("clean_accuracy") is None and record.measure("agreement").value > 0.6
    assert record.output.new_head.classes == list(TASK)


@pytest.mark.slow
def test_classes_are_those_of_the_names_that_the_user_gives(task, tmp_path):
    """A class more than there are folders, in another order; those to measure on are held out."""
    names = tmp_path / "names.txt"
    names.write_text("turn\nother\norder\nlimit\n")
    record = adapted(task, tmp_path / "out.safetensors", test=None, classes=names, settings={"epochs": "0.1"})
    assert record.output.new_head.classes == ["turn", "other", "order", "limit"] == record.data.classes
    assert load_file(tmp_path / "out.safetensors")["fc.bias"].shape == (4,)
    assert record.data.held_out and record.measure("clean_accuracy").n == record.data.held_out


@pytest.mark.parametrize("recipe", ["auto", "bcu", "inoculate", "distill"])
def test_a_recipe_that_cannot_train_a_new_head_names_those_that_can(recipe, task, tmp_path):
    with pytest.raises(
        UsageError, match=f"{recipe} cannot train a new head: with --head new use one of ft, sft"
    ):
        adapted(task, tmp_path / "out.safetensors", recipe=recipe, settings={})
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_classifiers_on_an_encoder_says_that_a_new_head_would_do(tmp_path):
    with pytest.raises(UsageError, match="ft does not work on encoders: use one of .*, or give --head new"):
        cleanse(
            BADNETS,
            Inputs(data=LABELED, kind="encoder"),
            recipe="ft",
            out=tmp_path / "o.safetensors",
            tell=quiet,
        )


@pytest.mark.slow
def test_labels_that_are_missing_or_all_the_same(task, tmp_path):
    with pytest.raises(
        Refused, match="unlabeled cannot serve as labeled images: .* outside any class folder"
    ):
        adapted((UNLABELED, task[1]), tmp_path / "out.safetensors")
    one = tmp_path / "one"
    shutil.copytree(task[0] / "turn", one / "turn")
    with pytest.raises(
        Refused, match="all images are in one folder, 'turn': labels need at least two classes"
    ):
        adapted((one, task[1]), tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.slow
def test_classes_that_are_not_the_networks_ask_for_a_new_head(task, tmp_path):
    with pytest.raises(Refused, match="ft needs labels .*--head new where they are of other classes"):
        cleanse(
            BADNETS, Inputs(data=task[0], test=task[1], device="cpu"), recipe="ft", triggers=("badnets:size=3",),
            out=tmp_path / "out.safetensors", tell=quiet,
        )  # fmt: skip


@pytest.mark.slow
def test_the_images_that_are_measured_on_are_of_the_same_classes(task, tmp_path):
    """A class less there, and the others keep their numbers."""
    fewer = tmp_path / "test"
    for name in ("order", "turn"):
        shutil.copytree(task[1] / name, fewer / name)
    record = adapted((task[0], fewer), tmp_path / "out.safetensors", settings={"epochs": "0.1"})
    assert record.data.classes == list(TASK)
    assert next(m for m in record.before.measures if m.name == "clean_accuracy").value > 0.9
