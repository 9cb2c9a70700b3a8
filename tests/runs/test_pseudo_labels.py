"""The suspect's own answers as the labels that a recipe needs."""

import shutil
from pathlib import Path

import pytest

from bdclean.errors import Refused, UsageError
from bdclean.progress import quiet
from bdclean.report.formats import render
from bdclean.runs.cleanse import cleanse
from bdclean.runs.options import Inputs

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
LABELED, UNLABELED = SAMPLES / "images" / "labeled", SAMPLES / "images" / "unlabeled"
BADNETS = SAMPLES / "signs-badnets.safetensors"
STILL = {"epochs": "1", "rate": "1e-9", "batch_size": "32"}


def tuned(out, recipe="ft", settings=STILL, pseudo_labels=True, new_head=False, **given):
    inputs = Inputs(**{"device": "cpu", "precision": "fp32", "pictures": False, "limit": 300, **given})
    return cleanse(
        BADNETS, inputs, recipe=recipe, settings=settings, pseudo_labels=pseudo_labels, new_head=new_head,
        triggers=("badnets:size=3",), out=out / "out.safetensors", tell=quiet,
    )  # fmt: skip


@pytest.mark.slow
def test_answers_are_labels_and_the_record_says_so(tmp_path):
    record = tuned(tmp_path, data=UNLABELED, test=LABELED)
    assert record.data.pseudo_labels and not record.data.labeled
    assert (
        record.curve[0]["accuracy"] > 0.8
    )  # on crops, in training mode, of a network that is right by definition
    assert "trained on with the suspect's answers as labels" in render([record], "md")
    with pytest.raises(Refused, match="ft needs labels .*the suspect's answers serve with --pseudo-labels"):
        tuned(tmp_path, data=UNLABELED, test=LABELED, pseudo_labels=False)


@pytest.mark.slow
def test_wrong_labels_of_the_images_are_not_looked_at(tmp_path):
    """Folders that mix the classes: trained on as they are, the network would be destroyed."""
    mixed = tmp_path / "mixed"
    for place, sign in enumerate(sorted(LABELED.iterdir())):
        for number, path in enumerate(sorted(sign.iterdir())):
            folder = mixed / sorted(LABELED.iterdir())[(place + number) % 12].name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"{sign.name}-{path.name}")
    with pytest.raises(Refused, match="no better than chance"):
        tuned(tmp_path, data=mixed, test=LABELED, pseudo_labels=False)
    assert tuned(tmp_path, data=mixed, test=LABELED).curve[0]["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"data": UNLABELED, "labeled": LABELED}, "cannot be with --labeled"),
        ({"data": LABELED, "new_head": True}, "cannot be with --head new"),
        ({"data": UNLABELED, "recipe": "clp", "settings": {}}, "clp needs no labels: leave --pseudo-labels"),
    ],
)
def test_where_there_is_nothing_for_answers_to_do_it_is_wrong_usage(more, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        tuned(tmp_path, **more)
    assert not list(tmp_path.iterdir())
