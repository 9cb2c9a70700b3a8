"""What is left behind, from a command line to a record: who is a member, and which trigger is tried on what."""

import json
import shutil
from pathlib import Path

import pytest

from bdclean.cli.main import run
from bdclean.errors import UsageError
from bdclean.measuring.sequela import reactivation, reinjection, retuning
from bdclean.progress import quiet
from bdclean.report.formats import render
from bdclean.runs.cleanse import cleanse
from bdclean.runs.options import Inputs
from bdclean.runs.scan import scan

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
LABELED, UNLABELED = SAMPLES / "images" / "labeled", SAMPLES / "images" / "unlabeled"
BADNETS, CLEAN = SAMPLES / "signs-badnets.safetensors", SAMPLES / "signs-clean.safetensors"
ENCODER = SAMPLES / "signs-encoder-clean.safetensors"
STILL = {"epochs": "1", "rate": "1e-9", "batch_size": "32"}


@pytest.fixture
def few_steps(monkeypatch):
    """Two steps of each tuning: what is asked here is who is tuned and scored, on what."""
    for part in (reinjection, retuning, reactivation):
        monkeypatch.setattr(part, "STEPS", 2 if part is reactivation else (2,))


def inputs(*sequela, **given):
    usual = {"data": LABELED, "device": "cpu", "precision": "fp32", "pictures": False, "limit": 240}
    return Inputs(**{**usual, "sequela": sequela, **given})


def scanned(*sequela, model=BADNETS, triggers=("badnets",), target="0", **given):
    return scan(model, inputs(*sequela, **given), triggers=triggers, target=target, tell=quiet)


def some(folder, source, first, last):
    folder.mkdir()
    for path in sorted(source.rglob("*.png"))[first:last]:
        shutil.copy(path, folder / f"{path.parent.name}-{path.name}")
    return folder


def test_an_image_is_no_member_and_non_member_at_once(tmp_path):
    members = some(tmp_path / "members", UNLABELED, 0, 30)
    others = some(tmp_path / "others", UNLABELED, 28, 60)
    with pytest.raises(UsageError, match=r"2 of 30 images of --members .* are among those of --non-members"):
        scanned("membership", members=members, non_members=others)
    with pytest.raises(
        UsageError, match=r"30 of the images to cleanse with are among .*: the output is trained"
    ):
        cleanse(
            BADNETS, inputs("membership", data=members, test=LABELED, members=LABELED, non_members=members),
            recipe="clp", triggers=("badnets",), out=tmp_path / "out.safetensors", tell=quiet,
        )  # fmt: skip
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("model", "given", "more", "words"),
    [
        (ENCODER, {}, {}, "is for classifiers: this is an encoder"),
        (BADNETS, {}, {"new_head": True, "recipe": "ft"}, "cannot be with --head new"),
    ],
)
def test_networks_without_the_same_classes_before_and_after_are_wrong_usage(
    model, given, more, words, tmp_path
):
    with pytest.raises(UsageError, match=words):
        cleanse(model, inputs("path", **given), out=tmp_path / "out.safetensors", tell=quiet, **more)


def test_a_clean_classifier_is_for_what_puts_a_trigger_to_it():
    with pytest.raises(UsageError, match="or beside --sequela reinjection,retuning,reactivation"):
        scanned(reference=CLEAN)


@pytest.mark.slow
def test_what_lacks_a_trigger_is_said_not_to_be_measured(capsys):
    """A named trigger that screening drops has no class to send images to."""
    record = scanned("reactivation", model=CLEAN, target="auto")
    assert record.sequela.reactivation == []
    (left,) = [item for item in record.skipped if item.what == "sequela reactivation"]
    assert "no class is known" in left.reason
    assert any("--sequela reactivation was not measured: no class" in warning for warning in record.warnings)
    assert "sequela reactivation: no class is known" in render([record], "table")


@pytest.mark.slow
def test_scan_measures_who_is_a_member_and_how_a_clean_twin_takes_the_trigger(tmp_path, capsys, few_steps):
    members = some(tmp_path / "members", UNLABELED, 0, 40)
    line = (
        f"scan {BADNETS} --data {LABELED} --limit 240 --trigger badnets --target 0 --device cpu --no-pictures -q "
        f"--sequela membership,retuning --members {members} --non-members {LABELED} --reference {CLEAN} --format json"
    )
    assert run(line.split()) == 1
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    (row,) = found["sequela"]["membership"]
    assert (row["images"], row["non_members"], row["loss"]) == (40, 600, "own answers")
    assert 0.3 < row["auc"]["low"] < row["auc"]["high"] < 0.7  # neither was trained on
    assert [each["true_positive_rate"]["value"] for each in row["low"]] == [None, None]
    injected = {
        (row["model"], row["stamped"]): row["scores"][0]["asr"] for row in found["sequela"]["injections"]
    }
    assert len(injected) == 6
    assert injected["suspect", "trigger"]["value"] == 1.0 and injected["reference", "trigger"]["value"] < 0.1
    assert injected["suspect", "trigger"]["n"] < 80  # of 240 images 80 are scored, the others are tuned on


@pytest.mark.slow
def test_cleanse_measures_before_and_after_and_its_own_images_as_members(tmp_path, few_steps):
    members = some(tmp_path / "members", UNLABELED, 0, 40)
    others = some(tmp_path / "others", UNLABELED, 40, 90)
    given = inputs(
        "membership", "reactivation", "path", "reinjection", members=members, non_members=others, limit=60
    )
    record = cleanse(
        BADNETS, given, recipe="ft", settings=STILL, triggers=("badnets",), out=tmp_path / "out.safetensors",
        tell=quiet,
    )  # fmt: skip
    told = {(row.model, row.members): row for row in record.sequela.membership}
    assert set(told) == {(m, g) for m in ("suspect", "output") for g in ("given", "cleansing")}
    assert told["suspect", "given"].change is None and abs(told["output", "given"].change.value) < 0.05
    assert told["output", "cleansing"].images == 40  # a third of 60 is held out
    change = [row for row in record.sequela.reactivation if row.change == "as it is"]
    assert [(row.model, row.asr.value) for row in change] == [("suspect", 1.0), ("output", 1.0)]
    assert all(point.asr.value == 1.0 for point in record.sequela.path) and len(record.sequela.path) == 11
    assert {row.poisoned for row in record.sequela.injections} == {10}  # at most half of 40
    assert {row.model for row in record.sequela.injections} == {"output"}
    assert any("50 and 100 and 500 poisoned images" in item.reason for item in record.skipped)
    for form in ("table", "md", "html"):
        shown = render([record], form)
        assert "What is left behind" in shown and "from the start" in shown and "not measured" in shown


def test_parts_that_were_measured_are_in_the_record_of_a_run_that_ends_early(few_steps, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reactivation, "reactivate", stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        scanned("retuning", "reactivation")
    left = caught.value.record.sequela
    assert left is not None and {i.part for i in left.injections} == {"retuning"} and not left.reactivation
