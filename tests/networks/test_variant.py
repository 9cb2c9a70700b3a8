"""Which of several architectures that fit the same tensors a network is: chosen with a margin, or refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from bdclean.networks.ambiguity.choosing import Choice
from bdclean.networks.ambiguity.size import own_size
from bdclean.networks.ambiguity.variant import (
    Fit,
    better,
    fit,
    likelier,
    more_accurate,
    most_fitting,
    read_off,
    told_by,
)
from bdclean.networks.arch import Arch
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.recognition import variants
from bdclean.record.run import CheckpointEntry
from bdclean.runs.images import at_own_size
from bdclean.runs.options import Inputs
from bdclean.runs.suspect import describe_suspect, input_size, understand
from bdclean.training.students import set_batch_statistics

SAMPLES = Path(__file__).parents[2] / "sample_models"
HALF = Choice(parse_preprocess("half"), float("nan"), "given")


def pictures(count=128, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randint(0, 256, (count, 3, side // 4, side // 4), dtype=torch.uint8, generator=generator)
    return rough.repeat_interleave(4, 2).repeat_interleave(4, 3)


def settled(network, images, path):
    """A file whose batch norm has the statistics of `images`, as training would leave them."""
    set_batch_statistics(Classifier(network, HALF.preprocess), lambda: iter([images]))
    save_file(network.state_dict(), path, {"bdclean.preprocess": "half"})
    return Checkpoint.read(path)


def residual(shortcut="b", seed=0):
    torch.manual_seed(seed)
    return ResidualNetwork((1, 1, 1), (8, 16, 32), 8, 10, shortcut=shortcut)


@pytest.mark.parametrize("name", ["silu", "elu"])
def test_another_activation_is_found_or_refused_never_taken_for_the_usual_one(tmp_path, name):
    network = variants.exchange("relu", name, residual())
    images = pictures()
    reading = read_off(settled(network, images, tmp_path / "m.safetensors"), HALF, images, None, False)
    assert reading.doubt or reading.arch.name == f"resnet8-cifar-b-w8+{name}"
    assert f"resnet8-cifar-b-w8+{name}" in [reading.arch.name, *(o["name"] for o in reading.others)]


def test_the_usual_activation_is_no_doubt(tmp_path):
    images = pictures()
    reading = read_off(settled(residual(), images, tmp_path / "m.safetensors"), HALF, images, None, False)
    assert (reading.arch.name, reading.doubt) == ("resnet8-cifar-b-w8", None)


def test_a_doubt_refuses_and_is_in_the_record(tmp_path):
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    save_file(VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5).state_dict(), tmp_path / "v.safetensors")
    cpu, checkpoint = torch.device("cpu"), Checkpoint.read(tmp_path / "v.safetensors")
    suspect = understand(checkpoint, pictures(), "half", None, False, cpu)
    assert re.search("vit-2x32-h2-p8-mlp64 .*fit these tensors alike.*--arch", suspect.doubt)
    entry = describe_suspect(CheckpointEntry(), suspect, (32, 32))
    assert len(entry.alternatives) >= 1 and entry.architecture is None
    named = Checkpoint.read(tmp_path / "v.safetensors", "vit-2x32-h4-p8-mlp64")
    known = understand(named, pictures(), "half", None, True, cpu)
    assert known.arch.build().encoder.layers[0].num_heads == 4


def test_images_of_another_kind_are_not_believed_against_the_usual_reading():
    def of(name, distance, unusual):
        arch = Arch(name, nn.Identity, (3, 32, 32), 2, "fc", (), (), unusual=unusual)
        return Fit(arch, distance, None)

    kin, foreign = (
        [of("u", 0.06, False), of("u+x", 0.02, True)],
        [of("u", 0.16, False), of("u+x", 0.08, True)],
    )
    assert (most_fitting(kin, True).arch.name, most_fitting(kin, True).doubt) == ("u+x", None)
    assert "u+x and u fit" in most_fitting(foreign, True).doubt
    assert most_fitting([of("u", 0.03, False), of("u+x", 0.025, True)], True).arch.name == "u"
    assert "do not look like" in most_fitting([of("u", 0.9, False), of("v", 2.0, False)], True).warning
    assert most_fitting([of("u", 0.9, False), of("v", 1.2, False)], True).doubt


def test_labels_part_what_statistics_cannot():
    arch = Arch("a", nn.Identity, (3, 32, 32), 2, "fc", (), ())
    right = torch.arange(100) < 90
    worse = torch.arange(100) < 60
    assert more_accurate(Fit(arch, None, right), Fit(arch, None, worse))
    assert not more_accurate(Fit(arch, None, worse), Fit(arch, None, right))
    assert not more_accurate(Fit(arch, None, right), Fit(arch, None, right))
    # better statistics do not outweigh wrong answers
    assert not better(Fit(arch, 0.1, worse), Fit(arch, 1.0, right))


@pytest.mark.parametrize("unusual", [(), ("right", "near")])
def test_what_few_images_do_not_part_more_labels_may(tmp_path, monkeypatch, unusual):
    """Two readings right on 80 and 75 % of the images: 256 are too few to tell, a third is clearly wrong."""
    images, looked_at = pictures(3000), []
    shares = {"wrong": 0.1, "right": 0.8, "near": 0.75}

    def right(checkpoint, arch, choice, chosen, labels):
        looked_at.append((arch.name, len(chosen)))
        chance = torch.rand(len(chosen), generator=torch.Generator().manual_seed(7 + len(looked_at)))
        return chance < shares[arch.name]

    def fitted(*given):
        return Fit(given[1], None, None if given[-1] is None else right(*given))

    def again(checkpoint, one, *given):
        return replace(one, right=right(checkpoint, one.arch, *given), surprise=0.5)

    checkpoint = settled(residual(), images[:64], tmp_path / "m.safetensors")
    candidates = tuple(replace(checkpoint.arch, name=name, unusual=name in unusual) for name in shares)
    checkpoint = replace(checkpoint, candidates=candidates)
    monkeypatch.setattr("bdclean.networks.ambiguity.variant.fit", fitted)
    monkeypatch.setattr("bdclean.networks.ambiguity.variant.again", again)
    reading = read_off(checkpoint, HALF, images, torch.zeros(3000), False)
    assert (reading.arch.name, reading.doubt) == ("right", None)
    assert looked_at[:3] == [(name, 256) for name in shares]
    assert sorted(looked_at[3:]) == [("near", 2048), ("right", 2048)]
    assert [other["name"] for other in reading.others] == ["near", "wrong"]
    looked_at.clear()
    assert unusual or "labeled images might" in read_off(checkpoint, HALF, images, None, False).doubt
    assert looked_at == []


def test_labels_of_other_classes_tell_of_no_reading():
    arch = Arch("a", nn.Identity, (3, 32, 32), 3, "fc", (), ())
    logits = F.one_hot(torch.arange(300) % 3, 3).float()
    for labels, known in ((torch.arange(300) % 3, True), (torch.arange(300) % 12, False)):
        found = told_by(Fit(arch, 0.01, None), logits, labels)
        assert found.right is not None and (found.surprise is not None) is known
        rival = replace(found, arch=replace(arch, name="b"))
        doubtful = most_fitting([found, rival], True)
        assert doubtful.doubt and (likelier([found, rival], doubtful).doubt is None) is known


@pytest.mark.parametrize(("surprise", "taken"), [(1.4, "u+x"), (1.7, "u")])
def test_statistics_do_not_outweigh_labels_that_the_usual_reading_finds_likelier(surprise, taken):
    """What a repair wrote was read with another activation: its statistics were off by 0.09, the other's by 0.05."""

    def of(name, distance, surprise):
        arch = Arch(name, nn.Identity, (3, 32, 32), 10, "fc", (), (), unusual=name != "u")
        return Fit(arch, distance, torch.arange(300) % 10 < 4, surprise)

    tried = [of("u", 0.09, 1.6), of("u+x", 0.049, surprise)]
    found = most_fitting(tried, True)
    assert (found.doubt is None) is (taken == "u+x")
    decided = likelier(tried, found)
    assert (decided.arch.name, decided.doubt) == (taken, None)
    assert (decided.warning is None) is (taken == "u+x")
    right = replace(
        tried[1], right=torch.arange(300) % 10 < 6
    )  # and one that is right more often is believed
    assert most_fitting([tried[0], right], True).arch.name == "u+x"


@pytest.mark.parametrize(
    ("labels", "surprise", "taken"),
    [(400, 0.4, True), (400, 0.7, True), (100, 0.4, False), (400, 2.0, False)],
)
def test_readings_that_many_labels_find_alike_are_taken_by_what_they_find_likelier(labels, surprise, taken):
    """A last pool of a VGG: the file does not show it, and a network without it gives much the same answers."""
    right = torch.arange(labels) % 10 < 6

    def of(name, surprise):
        return Fit(Arch(name, nn.Identity, (3, 32, 32), 3, "fc", (), ()), 0.01, right, surprise)

    left = [of("plain", 0.6 if taken else 3.0), of("pooled", surprise)]
    doubtful = most_fitting(left, True)
    assert "plain and pooled fit these tensors alike" in doubtful.doubt
    decided = likelier(left, doubtful)
    if not taken:  # few labels, or such as the network does not know
        assert decided == doubtful
        return
    first, other = ("pooled", "plain") if surprise < 0.6 else ("plain", "pooled")
    assert (decided.arch.name, decided.doubt, decided.rivals) == (first, None, ())
    assert f"{first} is taken, which finds 400 labels likeliest and is right on 60.0 %" in decided.warning
    assert f"{other} (--arch) would be on 60.0 %" in decided.warning
    assert [one["name"] for one in decided.others] == [other]


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 96])
def test_the_size_that_a_network_was_trained_at(tmp_path, side):
    """torchvision's ResNet trained on small pictures: at 224 its batch norm sees something else."""
    from PIL import Image
    from torchvision.models import resnet

    torch.manual_seed(0)
    network = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    images = pictures(64, side)
    (tmp_path / "i").mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "i" / f"{k}.png")
    checkpoint = settled(network, images, tmp_path / "m.safetensors")
    assert checkpoint.arch.input == (3, 224, 224)
    found = at_own_size(checkpoint, tmp_path / "i", Inputs())
    assert (found.arch.name, found.arch.input) == (f"resnet1-1-1-1+{side}px", (3, side, side))
    given = at_own_size(checkpoint, tmp_path / "i", Inputs(preprocess="half"))
    assert given.arch.input == found.arch.input  # that says nothing of the size
    said = Inputs(preprocess="half,size=224/224")
    assert at_own_size(checkpoint, tmp_path / "i", said) is checkpoint
    named = Checkpoint.read(tmp_path / "m.safetensors", f"resnet1-1-1-1+{side}px")
    assert named.arch.input == (3, side, side)


@pytest.mark.slow
@pytest.mark.parametrize("claimed", [224, 64, 32])
def test_statistics_overrule_a_size_that_a_config_claims(tmp_path, claimed):
    """A small network beside a config.json of 224 pixels took 420 s for 20 images, at a size that it never saw."""
    save_file(load_file(SAMPLES / "signs-badnets.safetensors"), tmp_path / "model.safetensors")
    config = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, claimed, claimed]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    inputs = Inputs(limit=20)
    checkpoint = Checkpoint.read(tmp_path)
    assert input_size(checkpoint, inputs) == (claimed, claimed)
    found = at_own_size(checkpoint, SAMPLES / "images" / "unlabeled", inputs)
    assert input_size(found, inputs) == (32, 32) and found.arch.input == (3, 32, 32)
    if claimed == 32:
        assert found is checkpoint
    else:
        said = (
            f"says that images are {claimed}x{claimed}, and batch norm's statistics on these speak for 32x32"
        )
        assert any(said in warning for warning in found.warnings)
    given = Inputs(preprocess=f"half,size={claimed}/{claimed}")
    assert at_own_size(checkpoint, SAMPLES / "images" / "unlabeled", given) is checkpoint


@pytest.mark.slow
def test_a_size_that_no_statistics_fit_is_doubted_and_kept(tmp_path):
    """Noise is like nothing that the network was trained on: what fits least ill is no reason to leave a claim."""
    from PIL import Image

    save_file(load_file(SAMPLES / "signs-badnets.safetensors"), tmp_path / "model.safetensors")
    config = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "i").mkdir()
    drawn = torch.randint(
        0, 256, (24, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for k, image in enumerate(drawn):
        Image.fromarray(image.numpy()).save(tmp_path / "i" / f"{k}.png")
    checkpoint = Checkpoint.read(tmp_path)
    found = at_own_size(checkpoint, tmp_path / "i", Inputs())
    assert input_size(found, Inputs()) == (64, 64) and found.arch == checkpoint.arch
    assert all("it is read at 64x64" in warning for warning in found.warnings)


def test_an_encoders_claim_of_its_size_stays(tmp_path):
    """Attacks train encoders on other views: no size fits, and 48 fits BadEncoder's at 32 least ill."""
    save_file(load_file(SAMPLES / "signs-encoder-badencoder.safetensors"), tmp_path / "model.safetensors")
    config = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.read(tmp_path)
    assert at_own_size(checkpoint, SAMPLES / "images" / "unlabeled", Inputs()) is checkpoint


def test_answers_tell_the_size_of_a_network_without_batch_norm(tmp_path, monkeypatch):
    """A ConvNeXt whose answers are made to tell something at one size alone."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    torch.manual_seed(0)
    network = ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5)
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    assert checkpoint.arch.input == (3, 224, 224)
    for telling, side in (
        ({64: 1.5, 48: 1.0}, 64),
        ({224: 0.9, 64: 1.6}, 224),
        ({64: 0.7, 224: 0.1}, 224),
        ({}, 224),
    ):
        monkeypatch.setattr(
            "bdclean.networks.ambiguity.size.spread",
            lambda _, images, __, t=telling: (1.6, t.get(images.shape[2], 0.0)),
        )
        found = own_size(checkpoint, lambda arch: pictures(32, arch.input[1]))
        assert found.arch.input == (3, side, side), telling
        assert (found is checkpoint) == (side == 224)
        assert bool(found.warnings) == (side != 224)


def test_a_fit_repeats_bit_for_bit(tmp_path):
    images = pictures()
    checkpoint = settled(residual(), images, tmp_path / "m.safetensors")
    one, two = (fit(checkpoint, checkpoint.arch, HALF, images, None).distance for _ in range(2))
    assert one == two < 0.01


def test_what_nothing_can_tell_is_said(tmp_path):
    """A VGG without batch norm, read without labels: its activation leaves no trace."""
    from bdclean.networks.families.vgg import SmallVGG

    torch.manual_seed(0)
    network = SmallVGG((8, "M", 8, "M", 8, "M"), False, 4, ((None, 128, 5),))
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    reading = read_off(checkpoint, HALF, pictures(), None, False)
    assert reading.doubt is None and "nothing tells whether vgg-3x8-8-cifar is the right" in reading.warning
    named = Checkpoint.read(tmp_path / "m.safetensors", "vgg-3x8-8-cifar")
    assert read_off(named, HALF, pictures(), None, True).warning is None


def test_a_reading_that_cannot_be_run_is_none(tmp_path):
    """MaxViT with a stem of stride 1: its windows do not fit, so nobody has trained that."""
    from torchvision.models import MaxVit

    torch.manual_seed(0)
    network = MaxVit((224, 224), 8, 7, [8, 8, 8, 8], [1, 1, 1, 1], 4, 0.0, num_classes=5)
    images = pictures(20, 224)
    reading = read_off(settled(network, images, tmp_path / "m.safetensors"), HALF, images, None, False)
    assert not any("stride1" in name for name in (reading.arch.name, *(o["name"] for o in reading.others)))
