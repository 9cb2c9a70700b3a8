"""Encoders end to end: the trunk of a shipped network is one whose backdoor is known."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bdclean.errors import Refused, UsageError
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.progress import quiet
from bdclean.record.run import RunRecord
from bdclean.runs.cleanse import cleanse
from bdclean.runs.options import Inputs
from bdclean.runs.scan import scan

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
LABELED, UNLABELED = SAMPLES / "images" / "labeled", SAMPLES / "images" / "unlabeled"
TRIGGER = ("blend:source=noise,alpha=0.2",)


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
def test_probes_with_labels_judge_images_without():
    record = scanned("signs-blend.safetensors", UNLABELED, labeled=LABELED, limit=600)
    assert record.verdict == "backdoored" and not record.findings
    assert record.triggers[0].probes and record.triggers[0].base_rate is None


@pytest.mark.slow
def test_without_labels_the_test_against_controls_is_at_most_suspicious():
    record = scanned("signs-blend.safetensors", UNLABELED)
    assert record.verdict == "suspicious" and not record.data.labeled
    (finding,) = record.findings
    assert finding.detector == "pull" and finding.verdict == "suspicious" and finding.p_value <= 0.001
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
        source, inputs(UNLABELED), recipe="inoculate", settings={"epochs": "1", "least_steps": "20"},
        triggers=TRIGGER, out=out, tell=quiet,
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


@pytest.mark.slow
def test_a_reference_must_be_like_the_model_and_have_labels(tmp_path):
    torch.manual_seed(0)
    other = ResidualNetwork((1, 1, 1), (8, 16, 32), 8, 12).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in other.items()}, tmp_path / "other.safetensors")
    with pytest.raises(Refused, match="of the same architecture"):
        scanned("signs-clean.safetensors", LABELED, reference=tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="--reference is for encoders that are scanned with labeled"):
        scanned("signs-clean.safetensors", UNLABELED, reference=SAMPLES / "signs-clean.safetensors")


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
