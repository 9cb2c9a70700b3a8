"""Encoders end to end: the trunk of a shipped network is one whose backdoor is known."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bdclean.cli.main import run
from bdclean.errors import Refused, UsageError
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.progress import quiet
from bdclean.record.rule import fails
from bdclean.record.run import RunRecord
from bdclean.runs.cleanse import cleanse
from bdclean.runs.options import Inputs
from bdclean.runs.scan import scan

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
LABELED, UNLABELED = SAMPLES / "images" / "labeled", SAMPLES / "images" / "unlabeled"
TRIGGER = ("blend:source=noise,alpha=0.2",)
ENCODER = "signs-encoder-clean.safetensors"
CLASSES = sorted(folder.name for folder in LABELED.iterdir())


def inputs(data, **more):
    return Inputs(data=data, kind="encoder", device="cpu", precision="fp32", pictures=False, **more)


def scanned(name, data, triggers=TRIGGER, **more):
    return scan(SAMPLES / name, inputs(data, **more), triggers=triggers, tell=quiet)


@pytest.mark.slow
def test_with_labels_probes_show_the_backdoor():
    record = scanned("signs-blend.safetensors", LABELED, reference=SAMPLES / "signs-clean.safetensors")
    assert record.verdict == "backdoored" and record.checkpoint.kind == "encoder"
    assert record.checkpoint.classes is None and record.checkpoint.feature_size == 64
    assert record.checkpoint.matched and len(record.checkpoint.unread) == 2
    values = {m.name: m.value for m in record.measures}
    assert min(values[k] for k in ("clean_accuracy", "probe_accuracy", "knn_accuracy")) > 0.9
    row = record.triggers[0]
    assert row.target == 8 and row.asr.value > 0.8
    assert set(row.probes) == {"mlp/0", "mlp/1", "mlp/2", "knn"} and row.asr_all_images.n == row.images
    assert row.reference_rate.n == row.asr.n and row.reference_rate.value < row.asr.value - 0.3
    again = RunRecord.from_json(record.to_json())
    assert again == record


@pytest.mark.slow
def test_waves_that_their_kin_set_off_too_are_held_against_the_clean_twin():
    record = scanned(
        "signs-encoder-ctrl.safetensors",
        UNLABELED,
        ("ctrl:magnitude=1000",),
        labeled=LABELED,
        reference=SAMPLES / ENCODER,
    )
    (row,) = record.triggers
    assert not any(fails(bound, 0.2) for bound in row.bounds)  # by controls alone
    assert record.verdict == "backdoored" and "0.0 % go there in the clean twin" in row.reason


@pytest.mark.slow
def test_probes_with_labels_judge_images_without():
    record = scanned("signs-blend.safetensors", UNLABELED, labeled=LABELED, limit=600)
    assert record.verdict == "backdoored" and not record.findings
    assert record.triggers[0].probes and record.triggers[0].base_rate is None


@pytest.mark.slow
def test_without_labels_the_test_against_controls_is_at_most_suspicious():
    record = scanned("signs-blend.safetensors", UNLABELED)
    assert record.verdict == "suspicious" and not record.data.labeled
    (finding,) = (finding for finding in record.findings if finding.detector == "pull")
    assert finding.verdict == "suspicious" and finding.p_value <= 0.001
    assert {finding.detector for finding in record.findings} == {"pull", "whitened-distance", "crowding"}
    assert record.triggers[0].outcome != "fails"


@pytest.mark.slow
@pytest.mark.parametrize("data", [LABELED, UNLABELED])
def test_an_encoder_without_a_backdoor_is_not_accused(data):
    record = scanned(
        "signs-clean.safetensors", data, ("badnets:size=3", "badnets:size=4,pattern=white", "ctrl")
    )
    assert record.verdict == "no-evidence"


@pytest.mark.slow
def test_what_is_written_is_a_drop_in_replacement(tmp_path):
    source, out = SAMPLES / "signs-blend.safetensors", tmp_path / "out.safetensors"
    record = cleanse(
        source, inputs(UNLABELED), recipe="inoculate", triggers=TRIGGER, out=out, tell=quiet,
        settings={"epochs": "1", "least_steps": "20", "inversion_steps": "4", "search_rounds": "1"},
    )  # fmt: skip
    assert record.before.verdict == "suspicious" and record.before.findings[0].detector == "pull"
    assert record.after.verdict == record.verdict and record.recipe.name == "inoculate"
    before, after = load_file(source), load_file(out)
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {
        k: (v.shape, v.dtype) for k, v in after.items()
    }
    assert all(torch.equal(before[name], after[name]) for name in record.checkpoint.unread)
    with safe_open(out, "pt") as file:
        assert file.metadata()["bdclean.recipe"] == "inoculate"


def test_a_recipe_of_classifiers_is_refused_before_images_are_read(tmp_path):
    with pytest.raises(UsageError, match="ft does not work on encoders"):
        cleanse(
            SAMPLES / "signs-clean.safetensors",
            inputs(UNLABELED),
            recipe="ft",
            out=tmp_path / "o",
            tell=quiet,
        )


def test_features_that_are_all_the_same_are_refused(tmp_path):
    tensors = load_file(SAMPLES / "signs-clean.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("bn1.weight", "bn2.weight")) or "bias" in name:
            tensor.zero_()
        if "shortcut" in name or "downsample" in name:
            tensor.zero_()
    file = tmp_path / "flat.safetensors"
    save_file(tensors, file, {"bdclean.preprocess": "half"})
    with pytest.raises(Refused, match="same features"):
        scan(file, inputs(LABELED, preprocess="half"), triggers=TRIGGER, tell=quiet)


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.fixture
def put(tmp_path):
    """Copies `count` shipped images of each of some classes, from the `first` on, one folder a class."""

    def made(name, classes, count, first=0):
        for each in classes:
            (tmp_path / name / each).mkdir(parents=True)
            for file in sorted((LABELED / each).iterdir())[first : first + count]:
                shutil.copy(file, tmp_path / name / each)
        return tmp_path / name

    return made


@pytest.fixture(scope="module")
def encoder():
    return load_file(SAMPLES / ENCODER)


def saved(tensors, path):
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"bdclean.preprocess": "half"}
    )
    return path


def flat(tensors):
    """An encoder without a feature that depends on the image: the last block adds nothing, and its input is gone."""
    silent = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in silent.items():
        if name.startswith("f.f.6.") and name.endswith(("bn2.weight", "bn2.bias", "downsample.1.weight")):
            tensor.zero_()
    return silent


def refused(match, model, data, problem=Refused, **more):
    triggers = more.pop("triggers", ("badencoder",))
    with pytest.raises(problem, match=match) as found:
        scan(model, replace(inputs(data, **more), kind="auto"), triggers=triggers, tell=quiet)
    assert str(found.value).count("\n") == 0
    return found.value


def test_files_that_hold_no_whole_encoder_are_named(tmp_path, encoder):
    head = {name: tensor for name, tensor in encoder.items() if name.startswith("g.")}
    model = saved(head, tmp_path / "projector.safetensors")
    refused("tensors .* are a projector alone: give the file with its backbone", model, LABELED)
    with pytest.raises(Refused, match="projector alone"):
        cleanse(model, replace(inputs(UNLABELED), kind="auto"), out=tmp_path / "out.safetensors", tell=quiet)
    assert not (tmp_path / "out.safetensors").exists()


def test_features_that_are_no_numbers_or_all_the_same_are_refused(tmp_path, encoder):
    broken = {name: tensor.clone() for name, tensor in encoder.items()}
    broken["f.f.0.weight"][0, 0, 0, 0] = float("nan")
    refused("f.f.0.weight holds 1 NaN", saved(broken, tmp_path / "nan.safetensors"), LABELED)
    for name in ("f.f.1.weight", "f.f.3.0.conv1.weight"):
        broken[name] = encoder[name] * 1e38
    broken["f.f.0.weight"] = encoder["f.f.0.weight"]
    refused("not all finite numbers", saved(broken, tmp_path / "huge.safetensors"), LABELED)
    refused("every image the same features", saved(flat(encoder), tmp_path / "flat.safetensors"), LABELED)


def test_labels_that_no_probe_can_be_trained_on_are_refused(put):
    model = SAMPLES / ENCODER
    refused("all images are in one folder, 'stop'", model, UNLABELED, labeled=put("one", ["stop"], 30))
    refused("24 images are too few .* better than chance", model, put("few", CLASSES, 2))
    for k, file in enumerate(sorted(put("many", CLASSES, 2).rglob("*.png"))):
        (file.parents[2] / "each" / f"class {k}").mkdir(parents=True)
        shutil.copy(file, file.parents[2] / "each" / f"class {k}")
    fewer = "12 labeled images for a probe are fewer than their 24 classes"
    refused(fewer, model, file.parents[2] / "each")


def test_a_reference_that_cannot_be_one_is_refused_by_name(tmp_path, encoder):
    torch.manual_seed(0)
    other = ResidualNetwork((1, 1, 1), (8, 16, 32), 8, 12).state_dict()
    bare = {name: tensor for name, tensor in other.items() if not name.startswith("fc.")}
    saved(bare, tmp_path / "other.safetensors")
    saved({"g.0.weight": torch.ones(4, 4)}, tmp_path / "projector.safetensors")
    for name, why in {
        tmp_path / "other.safetensors": "it is a resnet8-cifar-b-w8, the model a .*: give a clean encoder",
        SAMPLES / "signs-clean.safetensors": "it is a classifier: give a clean encoder",
        tmp_path / "projector.safetensors": "tensors .* are a projector alone",
        tmp_path / "nowhere.safetensors": "does not exist",
    }.items():
        refused(
            f"--reference .*{name.name} cannot be used: .*{why}", SAMPLES / ENCODER, LABELED, reference=name
        )


@pytest.mark.slow
def test_a_reference_with_constant_features_is_refused_by_name(tmp_path, encoder):
    file = saved(flat(encoder), tmp_path / "flat.safetensors")
    refused("--reference .*flat.* every image the same features", SAMPLES / ENCODER, LABELED, reference=file)


def test_a_reference_needs_labels():
    match = "--reference is for encoders that are scanned with labeled"
    refused(match, SAMPLES / ENCODER, UNLABELED, UsageError, reference=SAMPLES / ENCODER)


@pytest.mark.slow
def test_images_of_classes_that_the_probes_do_not_know_are_used_as_unlabeled(put):
    known = put("known", CLASSES[:10], 25)
    given = replace(inputs(put("given", CLASSES, 50, 25), labeled=known), kind="auto")
    record = scan(SAMPLES / ENCODER, given, triggers=("badnets:size=3",), tell=quiet)
    assert any("of other classes than those that the probes" in warning for warning in record.warnings)
    assert not record.data.labeled and record.triggers[0].probes is not None


@pytest.mark.slow
def test_folders_that_say_nothing_of_the_classes_train_no_probes(put, tmp_path):
    """Of the images that are measured none has a label to tell by: the folders have to vouch for themselves."""
    parts = tmp_path / "parts"
    for k, file in enumerate(sorted(UNLABELED.iterdir())[:600]):
        (parts / f"part{k % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, parts / f"part{k % 3}")
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in sorted(UNLABELED.iterdir())[600:900]:
        shutil.copy(file, flat)
    record = cleanse(
        SAMPLES / ENCODER, replace(inputs(parts, test=flat), kind="auto"), recipe="inoculate",
        settings={"epochs": "1", "least_steps": "2", "answers": "2"}, triggers=("badnets:size=3",),
        out=tmp_path / "out.safetensors", tell=quiet,
    )  # fmt: skip
    assert any("on the labels of the images for probes" in warning for warning in record.warnings)
    assert not record.data.labeled and not record.before.triggers[0].probes


@pytest.mark.slow
def test_images_for_probes_that_are_measured_on_are_left_out_of_the_probes(put):
    known = put("known", CLASSES, 20)
    given = replace(inputs(LABELED, labeled=known), kind="auto")
    match = "is also among those to measure on: give others for the probes"
    with pytest.raises(Refused, match=match):
        scan(SAMPLES / ENCODER, given, triggers=("badnets:size=3",), tell=quiet)
    given = replace(inputs(known, labeled=LABELED), kind="auto")
    record = scan(SAMPLES / ENCODER, given, triggers=("badnets:size=3",), tell=quiet)
    assert record.data.duplicates >= 20 * len(CLASSES)


@pytest.mark.slow
def test_other_models_of_a_scan_go_on(tmp_path, encoder, capfd):
    head = {name: tensor for name, tensor in encoder.items() if name.startswith("g.")}
    saved(head, tmp_path / "projector.safetensors")
    words = ["scan", str(tmp_path / "projector.safetensors"), str(SAMPLES / ENCODER), "--data", str(LABELED)]
    code = run(
        [*words, "--trigger", "badencoder", "--limit", "200", "--device", "cpu", "--format", "jsonl", "-q"]
    )
    printed = capfd.readouterr()
    outcomes = [json.loads(line)["outcome"] for line in printed.out.splitlines()]
    assert code == 3 and outcomes == ["refused", "ran"]
    assert printed.err.count("projector alone") == 1


def test_a_target_needs_labels():
    with pytest.raises(UsageError, match="--target needs labeled images"):
        scan(SAMPLES / "signs-clean.safetensors", inputs(UNLABELED), triggers=TRIGGER, target="1", tell=quiet)


def test_too_few_images_to_cluster(tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for number, file in enumerate(sorted(UNLABELED.iterdir())[:60]):
        (few / f"{number}{file.suffix}").write_bytes(file.read_bytes())
    with pytest.raises(Refused, match="too few to cluster"):
        scan(SAMPLES / "signs-clean.safetensors", inputs(few), triggers=TRIGGER, tell=quiet)
