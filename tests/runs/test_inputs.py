"""How a suspect is understood where its tensors alone do not say."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet18

from bdclean.data.imageset import ImageSet
from bdclean.data.loading import load_images
from bdclean.data.placing import place, take
from bdclean.errors import Refused
from bdclean.networks.ambiguity.choosing import Choice
from bdclean.networks.ambiguity.variant import RATIO, fit
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.progress import quiet
from bdclean.record.run import CheckpointEntry, RunRecord
from bdclean.runs.images import (
    copies,
    describe_images,
    keep_plausible_labels,
    one_answer,
    read_images,
    understand_labeled,
)
from bdclean.runs.options import Inputs
from bdclean.runs.scan import with_second
from bdclean.runs.suspect import claimed_size, describe_suspect, input_size, understand
from bdclean.training.students import set_batch_statistics

LABELED = Path(__file__).resolve().parents[2] / "sample_models/images/labeled"


@pytest.mark.parametrize("shortcut", ["a", pytest.param("a-end", marks=pytest.mark.slow)])
def test_statistics_part_architectures_that_fit_the_same_tensors(tmp_path, shortcut):
    torch.manual_seed(0)
    network = ResidualNetwork((3, 3, 3), (16, 32, 64), 16, 10, shortcut=shortcut)
    images = torch.randint(0, 256, (128, 3, 8, 8), dtype=torch.uint8)
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    set_batch_statistics(Classifier(network, parse_preprocess("cifar10")), lambda: iter([images]))
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    choice = Choice(parse_preprocess("cifar10"), float("nan"), "given")
    scores = {a.name: fit(checkpoint, a, choice, images, None).distance for a in checkpoint.candidates}
    best, second = sorted(scores, key=scores.__getitem__)[:2]
    assert best.endswith(f"-{shortcut}") and scores[second] > RATIO * scores[best]
    suspect = understand(checkpoint, images, "cifar10", None, False, torch.device("cpu"))
    entry = describe_suspect(CheckpointEntry(), suspect, images.shape[2:])
    assert suspect.arch.name == best == entry.architecture
    assert entry.alternatives[0]["name"] == second
    assert entry.architecture_margin == pytest.approx(scores[second] / scores[best], rel=0.01)


class Answers:
    """A predictor that is right on the images it is given in order, or always says the same."""

    def __init__(self, answers: torch.Tensor) -> None:
        self.answers = answers

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.answers[images[:, 0, 0, 0].long()]


@pytest.mark.parametrize("source", ["count", "names", "integers"])
def test_labels_that_the_suspect_contradicts_are_dropped_or_doubted(source):
    images = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    labels = torch.arange(200) % 4
    found = ImageSet(images, labels, ("a", "b", "c", "d"), labels_source=source)
    suspect = SimpleNamespace(arch=SimpleNamespace(classes=4))
    kept, doubts = keep_plausible_labels(found, suspect, Answers(labels))
    assert kept.labels is labels and doubts == []
    generator = torch.Generator().manual_seed(0)
    anything = Answers(torch.randint(4, (200,), generator=generator))
    kept, doubts = keep_plausible_labels(found, suspect, anything)
    assert len(doubts) == 1 and "no better than chance" in doubts[0]
    assert (kept.labels is None) == (source == "count")
    if source != "count":
        with pytest.raises(Refused, match="training on these labels would destroy it"):
            keep_plausible_labels(found, suspect, anything, training=True)


@pytest.mark.parametrize("source", ["count", "names", "integers", "forced"])
def test_labels_that_only_a_matching_without_a_name_fits_are_dropped_or_refused(source):
    images = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    labels = torch.arange(200) % 4
    found = ImageSet(images, labels, ("a", "b", "c", "d"), labels_source=source)
    suspect = SimpleNamespace(arch=SimpleNamespace(classes=4))
    if source == "forced":
        with pytest.raises(Refused, match="right on 0.0% .* 100.0% .* order of no known name"):
            keep_plausible_labels(found, suspect, Answers((labels + 1) % 4))
        return
    kept, doubts = keep_plausible_labels(found, suspect, Answers((labels + 1) % 4))
    assert kept.labels is None and kept.labels_source is None and "used as unlabeled" in doubts[0]


def signs_in_text_order(root):
    """The shipped road signs in folders `0` to `11` that stand for the head's classes as ImageFolder sorts them."""
    signs = sorted(LABELED.iterdir(), key=lambda folder: folder.name)
    for sign, number in zip(signs, sorted(str(k) for k in range(12)), strict=True):
        shutil.copytree(sign, root / number)
    return root


@pytest.mark.parametrize("forced", [False, True])
def test_folders_in_torchvisions_order_are_used_in_it_and_said(tmp_path, forced):
    checkpoint = Checkpoint.read(LABELED.parents[1] / "signs-badnets.safetensors")
    path = signs_in_text_order(tmp_path / "signs")
    inputs = Inputs(preprocess="auto")
    images = read_images(path, checkpoint, inputs, quiet, forced=forced)
    suspect, kept, doubts = understand_labeled(checkpoint, images, inputs, torch.device("cpu"))
    (said,) = doubts
    assert "in text order, as torchvision's ImageFolder sorts, which is used" in said
    assert (
        kept.labels_source == describe_images(path, kept).labels_source and "text order" in kept.labels_source
    )
    assert list(kept.classes) == sorted(str(k) for k in range(12))
    classifier = suspect.classifier(suspect.choices[0])
    right = classifier(kept.images).argmax(1) == kept.labels
    assert float(right.float().mean()) > 0.9


def test_a_warning_stands_once_in_a_record():
    """Held-out images and others are both looked at: one warning is enough."""
    assert RunRecord("scan").warned(["a", "b"]).warned(["b", "c"]).warnings == ["a", "b", "c"]


def test_many_copies_and_one_answer_are_said():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8, generator=generator)
    assert copies(ImageSet(images)) == one_answer(torch.arange(100) % 4) == []
    (said,) = copies(ImageSet(torch.cat([images[:80], images[:20]])))
    assert "20 % of the images show the same picture" in said
    assert "answers class 3 on 100 % of the images" in one_answer(torch.full((100,), 3))[0]


def test_a_checkpoints_own_class_names_order_the_folders(tmp_path):
    torch.manual_seed(0)
    network = ResidualNetwork((3, 3, 3), (16, 32, 64), 16, 10, shortcut="a")
    names = [f"kind {k}" for k in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    save_file(network.state_dict(), tmp_path / "m.safetensors", {"bdclean.classes": json.dumps(names)})
    for k in range(3):
        (tmp_path / "images" / f"Kind_{k}").mkdir(parents=True)
        for i in range(8):
            pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "images" / f"Kind_{k}" / f"{i}.png")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    found = read_images(tmp_path / "images", checkpoint, Inputs(preprocess="cifar10"), quiet)
    assert found.labels_source == "names"
    assert found.labels.tolist() == [3] * 8 + [1] * 8 + [6] * 8


def test_images_taken_to_a_device_are_those_chosen():
    images = torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2)
    device = torch.device("cpu")
    assert torch.equal(take(place(images, device), torch.tensor([3, 0]), device), images[[3, 0]])


@pytest.mark.gpu
def test_images_stay_on_the_host_where_the_device_is_small(monkeypatch):
    device = torch.device("cuda")
    images = torch.arange(4000, dtype=torch.int64).to(torch.uint8).view(1000, 1, 2, 2)
    assert place(images, device).device.type == "cuda"
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (10_000, 20_000))
    kept = place(images, device)
    assert kept.device.type == "cpu"
    chosen = torch.tensor([7, 999], device=device)
    assert torch.equal(take(kept, chosen, device).cpu(), images[[7, 999]])


def test_a_head_of_one_output_is_refused(tmp_path):
    network = ResidualNetwork((1, 1, 1), (8, 16, 32), 8, 1)
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    with pytest.raises(Refused, match="one output"):
        understand(
            checkpoint,
            torch.zeros(20, 3, 32, 32, dtype=torch.uint8),
            "auto",
            None,
            False,
            torch.device("cpu"),
        )


def test_a_normalisation_that_the_network_contradicts_does_not_doubt_its_architecture():
    """Under it the statistics part no activations: it is obeyed with a warning, and no --arch is asked for."""
    checkpoint = Checkpoint.read(LABELED.parents[1] / "signs-badnets.safetensors")
    images = load_images(LABELED, (32, 32), tell=quiet).images
    suspect = understand(checkpoint, images, "raw255", None, False, torch.device("cpu"))
    assert suspect.doubt == "" and suspect.arch.name == "resnet8-cifar-b"
    assert suspect.choices[0].preprocess.title == "raw255"
    assert any("raw255 is obeyed, but contradicted" in warning for warning in suspect.warnings)


def test_first_layers_that_give_no_numbers_are_refused(tmp_path):
    network = ResidualNetwork((1, 1, 1), (8, 16, 32), 8, 4)
    state = network.state_dict()
    first = next(name for name in state if name.endswith("conv1.weight"))
    state[first] = torch.full_like(state[first], 3e38)
    save_file(state, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    with pytest.raises(Refused, match="finite numbers"):
        understand(checkpoint, images, "auto", None, False, torch.device("cpu"))


def test_a_normalisation_without_a_size_leaves_the_claimed_one(tmp_path):
    save_file(resnet18(num_classes=5).state_dict(), tmp_path / "model.safetensors")
    claim = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]}
    (tmp_path / "config.json").write_text(json.dumps(claim))
    checkpoint = Checkpoint.read(tmp_path)
    for given, size in (("auto", (64, 64)), ("half", (64, 64)), ("half,size=96/96", (96, 96))):
        assert input_size(checkpoint, Inputs(preprocess=given)) == size
    (tmp_path / "config.json").write_text(json.dumps(claim | {"input_size": [3, 9, 9]}))
    assert claimed_size(Checkpoint.read(tmp_path)) in ((9, 9), None)


def test_a_pass_is_none_where_the_input_holds_other_weights():
    record = RunRecord("scan", verdict="no-evidence", outcome="ran")
    assert with_second(record, {}) == record
    found = with_second(record, {"b.bin": "b.bin was not measured."})
    assert (found.verdict, found.advice, found.exit_code) == ("not-assessed", "b.bin was not measured", 3)
    assert [entry.what for entry in found.skipped] == ["b.bin"]
    assert with_second(RunRecord("scan", verdict="backdoored"), {"b.bin": "x."}).verdict == "backdoored"
