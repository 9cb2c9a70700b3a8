"""A folder that is given is a folder that is written; a resume state of another run is told before anything else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bdclean.cli.main import run
from bdclean.errors import Refused
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.progress import quiet
from bdclean.record.parsing import parse_records
from bdclean.runs import folders, places
from bdclean.runs.cleanse import cleanse
from bdclean.runs.options import Inputs
from bdclean.training.resume import Position, Saved

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
MODEL, UNLABELED = SAMPLES / "signs-badnets.safetensors", SAMPLES / "images" / "unlabeled"


@pytest.fixture
def folder(tmp_path):
    """A network as hubs have them, in the place of `net`."""
    net = tmp_path / "net"
    net.mkdir()
    shutil.copy(MODEL, net / "model.safetensors")
    (net / "config.json").write_text('{"license": "mit"}\n')
    (net / "model.safetensors.index.json.old").write_text("{}")
    (net / "README.md").write_text("# of the suspect")
    (net / "broken.json").write_text("{")
    return net


def test_what_describes_the_weights_is_json_that_lies_in_the_folder(folder, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (folder / "secret.json").symlink_to(tmp_path / "secret.json")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    blobs = tmp_path.parent / "blobs"
    blobs.mkdir()
    (blobs / "0123").write_text("{}")
    (folder / "preprocessor_config.json").symlink_to(blobs / "0123")
    assert [path.name for path in folders.descriptions(folder)] == ["config.json", "preprocessor_config.json"]


def test_places_of_a_folder(folder, tmp_path):
    assert places.default_output(folder, None) == tmp_path / "net.clean"
    assert places.default_output(folder, None, new_head=True) == tmp_path / "net.clean.safetensors"
    assert places.default_output(folder, tmp_path) == tmp_path
    assert places.is_folder(tmp_path / "net.clean", folder, False)
    assert not places.is_folder(tmp_path / "one.safetensors", folder, False)
    assert places.record_beside(Path("a/net.clean"), True) == Path("a/net.clean.json")
    assert places.record_beside(Path("a/m.clean.safetensors"), False) == Path("a/m.clean.json")
    assert folders.weights_in(Path("out"), folder) == Path("out/model.safetensors")
    (folder / "model.safetensors").rename(folder / "open_clip_model.safetensors")
    assert folders.weights_in(Path("out"), folder) == Path("out/open_clip_model.safetensors")


def test_a_folder_is_replaced_only_if_it_was_made_from_this_one(folder, tmp_path):
    checkpoint, out = Checkpoint.read(folder), tmp_path / "net.clean"
    folders.check_folder(out, checkpoint, force=False)
    assert not out.exists(), "checking makes nothing"
    folders.copy_descriptions(folder, out)
    checkpoint.write(checkpoint.build(), out / "model.safetensors", {})
    folders.check_folder(out, checkpoint, force=False)
    (out / ".model.safetensors.0123.part").write_text("of a run that was killed")
    folders.check_folder(out, checkpoint, force=False)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    (out / "mine.txt").write_text("")
    with pytest.raises(Refused, match="was not made from this input"):
        folders.check_folder(out, checkpoint, force=False)
    folders.check_folder(out, checkpoint, force=True)
    (out / "mine.txt").unlink()
    shutil.copy(SAMPLES / "signs-clean.safetensors", out / "model.safetensors")
    with pytest.raises(Refused, match="was not made from this input"):
        folders.check_folder(out, checkpoint, force=False)
    with pytest.raises(Refused, match="is the input"):
        folders.check_folder(folder, checkpoint, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="is no folder"):
        folders.check_folder(tmp_path / "file", checkpoint, force=True)


@pytest.mark.slow
def test_a_folder_given_is_a_folder_written(folder, tmp_path):
    words = ["cleanse", "net", "--data", str(UNLABELED), "--limit", "300", "--trigger", "badnets", "-q"]
    words += ["--recipe", "bcu", "--set", "epochs=0.1", "--device", "cpu"]
    before = sorted(path.name for path in folder.iterdir())
    assert run(words) in (0, 1, 3)
    out = tmp_path / "net.clean"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((out / "config.json").read_text()) == {"license": "mit"}
    with (
        safe_open(out / "model.safetensors", "pt") as one,
        safe_open(folder / "model.safetensors", "pt") as two,
    ):
        assert list(one.keys()) == list(two.keys())
    (record,) = parse_records((tmp_path / "net.clean.json").read_text(), "")
    assert record.output.path == "net.clean" and record.output.sha256
    assert sorted(path.name for path in folder.iterdir()) == before, "the input is as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "net.clean", "net.clean.json"]
    again = Checkpoint.read(out)
    assert again.arch.name == Checkpoint.read(folder).arch.name and again.config["license"] == "mit"
    assert run([*words, "--out", "one.safetensors"]) in (0, 1, 3) and Path("one.safetensors").is_file()


def test_a_state_of_another_run_is_told_before_anything_is_measured(tmp_path):
    out = tmp_path / "out.safetensors"
    state = Saved(places.resume_state(out), {"source_sha256": "ab" * 32, "recipe": "bcu"})
    state.save(Position("x"), {"w": torch.zeros(1)})
    inputs = Inputs(data=UNLABELED, limit=300, precision="fp32", device="cpu")
    with pytest.raises(Refused, match="the resume state .* was made .*--resume") as refused:
        cleanse(MODEL, inputs, recipe="bcu", triggers=("badnets",), out=out, resume=True, tell=quiet)
    record = refused.value.record
    assert record.before is None and not out.exists()
    assert record.data.classes is None and "stop" in record.checkpoint.class_names
    assert record.class_names() == record.checkpoint.class_names, "the file's own, without labels"
