"""Networks that are given a head for another task: what their files hold, and that they are read as classifiers."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from networks.layout_files import drawn, large, read, small, under
from networks.test_encoders import files
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from bdclean.data.labels.labelling import claimed_names
from bdclean.errors import Refused
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.checkpoint.new_head import check_recognised, with_new_head, without_head
from bdclean.networks.encoder import headed, headless
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.stages import describe

NAMES = ("cat", "dog", "frog", "horse", "ship")


def written(checkpoint, folder, spec=None):
    """The file with a new head, read without any word about what it is."""
    check_recognised(checkpoint, spec)
    out = folder / "out.safetensors"
    checkpoint.write(checkpoint.build(), out, {"recipe": "ft"}, force=True)
    assert checkpoint.again(out).entries == checkpoint.entries
    return Checkpoint.read(out, spec)


def answers(suspect, new, size):
    """Logits of the network with its head, and what the head makes of the suspect's features."""
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    head = {k.rpartition(".")[2]: t for k, t in new.state().items() if k.startswith(f"{new.arch.head}.")}
    with torch.inference_mode():
        features = without_head(suspect).build()(x)
        return new.build()(x), nn.functional.linear(features, head["weight"], head.get("bias"))


@pytest.mark.parametrize("case", list(files()), ids=lambda c: c[0])
def test_an_encoder_of_each_layout_becomes_a_classifier(case, tmp_path):
    _, which, named, beside = case
    network = {"large": large, "small": small}[which]()
    suspect = read(tmp_path / "m.safetensors", named(network) | beside())
    new = written(with_new_head(suspect, NAMES, 0), tmp_path)
    assert new.arch.kind == "classifier" and new.arch.classes == 5 and new.arch.head == "fc"
    assert new.arch.name == suspect.arch.name and new.arch.input == suspect.arch.input
    assert new.tensors.keys() == network.state_dict().keys() | {"fc.weight", "fc.bias"}
    assert not new.unread and not new.tied and not new.warnings
    assert claimed_names(new.metadata, new.config) == NAMES
    ours, theirs = answers(suspect, new, 64 if which == "large" else 32)
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.shape == (2, 5)


def test_a_stem_that_no_recognised_classifier_has_is_refused(tmp_path):
    suspect = read(
        tmp_path / "m.safetensors", under("backbone.", small()) | {"projector.0.weight": torch.eye(4)}
    )
    padded = next(arch for arch in suspect.candidates if arch.name.endswith("+pad2"))
    with pytest.raises(Refused, match=r"\+pad2 with a new head would be read as resnet"):
        check_recognised(with_new_head(replace(suspect, arch=padded), NAMES, 0), None)


@pytest.mark.parametrize(
    "named, beside", [("", {}), ("teacher.backbone.", {"dino_head.mlp.0.weight": (8, 128)})]
)
def test_a_transformer_becomes_a_classifier(named, beside, tmp_path):
    timm = pytest.importorskip("timm")
    form = {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 64, "num_classes": 0}
    network = drawn(timm.create_model("vit_base_patch16_224", pretrained=False, **form))
    state = under(named, network) | {n: torch.randn(shape) for n, shape in beside.items()}
    suspect = read(tmp_path / "m.safetensors", state)
    new = written(with_new_head(suspect, NAMES, 0), tmp_path)
    assert (new.arch.kind, new.arch.name, new.arch.head) == ("classifier", suspect.arch.name, "head")
    ours, theirs = answers(suspect, new, 64)
    assert torch.allclose(ours, theirs, atol=1e-5)
    twin = timm.create_model("vit_base_patch16_224", pretrained=False, **form | {"num_classes": 5})
    twin.load_state_dict(dict(new.tensors))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(twin.eval()(x), new.build()(x), atol=1e-4)


def test_timms_own_encoder_becomes_timms_classifier(tmp_path):
    timm = pytest.importorskip("timm")
    network = drawn(timm.create_model("resnet10t", pretrained=False, num_classes=0))
    suspect = read(tmp_path / "m.safetensors", under("", network), arch="timm:resnet10t", kind="encoder")
    new = written(with_new_head(suspect, NAMES, 0), tmp_path, "timm:resnet10t")
    assert (new.arch.name, new.arch.head, new.arch.classes) == ("timm:resnet10t", "fc", 5)
    ours, theirs = answers(suspect, new, 64)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_classifier_keeps_its_names_and_all_but_its_head(tmp_path):
    network = drawn(ResidualNetwork((1, 1, 1), (8, 12, 16), 8, 10)).half()
    state = {f"module.{n}": t.clone() for n, t in reversed(network.state_dict().items())}
    ema = {f"ema.{n}": t + 1 for n, t in network.state_dict().items()}
    path = tmp_path / "m.safetensors"
    said = {"classes": "a, b", "author": "somebody", "bdclean.preprocess": "half", "bdclean.recipe": "bcu"}
    save_file({n: t.contiguous() for n, t in (state | ema).items()}, path, said)
    suspect = Checkpoint.read(path)
    new = written(with_new_head(suspect, NAMES, 0), tmp_path)
    assert list(new.names) == [e.name for e in suspect.entries if e.name in suspect.names]
    for name, tensor in new.tensors.items():
        before = suspect.tensors[name]
        assert tensor.dtype == before.dtype
        if name.startswith("module.fc."):
            assert tensor.shape == (5, *before.shape[1:])
        else:
            assert torch.equal(tensor, before)
    assert not any(name.startswith("ema.") for name in new.tensors)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("bdclean.source_sha256") == suspect.sha256
    assert metadata == {
        "author": "somebody", "bdclean.preprocess": "half", "bdclean.recipe": "ft",
        "bdclean.classes": json.dumps(list(NAMES)),
    }  # fmt: skip
    ours, theirs = answers(suspect, with_new_head(suspect, NAMES, 0), 32)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_head_is_drawn_by_the_seed_as_pytorch_draws(tmp_path):
    suspect = read(tmp_path / "m.safetensors", under("", small()))
    before = torch.random.get_rng_state()
    one, again, other = (with_new_head(suspect, NAMES, seed).tensors["fc.weight"] for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one, again) and not torch.equal(one, other)
    torch.manual_seed(1)
    assert torch.equal(one, nn.Linear(32, 5).weight)


def test_class_names_stay_when_the_output_is_cleansed_again(tmp_path):
    suspect = read(tmp_path / "m.safetensors", under("", small()))
    new = written(with_new_head(suspect, NAMES, 0), tmp_path)
    new.write(new.build(), tmp_path / "again.safetensors", {"recipe": "bcu"})
    again = Checkpoint.read(tmp_path / "again.safetensors")
    assert claimed_names(again.metadata, again.config) == NAMES


def test_what_comes_off_goes_on():
    arch = describe("tiny", lambda: ResidualNetwork((1, 1, 1), (8, 12, 16), 8, 10), (3, 32, 32))
    back = headed(headless(arch), 10)
    assert back == arch and back.build().fc.out_features == 10
    bare = describe("bare", lambda: ResidualNetwork((1, 1, 1), (8, 12, 16), 8, 10, bias=False), (3, 32, 32))
    assert headed(bare, 3).build().fc.bias is None and headed(bare, 3).classes == 3
    # Batch norms and all else are as they were.
    assert headed(arch, 3).build().state_dict().keys() == arch.build().state_dict().keys()


def test_a_head_on_maps_is_refused(tmp_path):
    network = drawn(models.squeezenet1_1(num_classes=7))
    suspect = read(tmp_path / "m.safetensors", under("", network))
    with pytest.raises(Refused, match="squeezenet1_1 cannot be given a new head: .* is a Conv2d"):
        with_new_head(suspect, NAMES, 0)


CODE = """
from torch import nn

def body():
    return [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]

def open_ended(num_classes=10):
    return nn.Sequential(*body(), nn.Linear(4, num_classes))

def fixed():
    return nn.Sequential(*body(), nn.Linear(4, 10))

def scaled(num_classes=10):
    return nn.Sequential(*body(), nn.Linear(4, num_classes), nn.Linear(num_classes, num_classes))

def features():
    return nn.Sequential(*body())
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "own.py").write_text(CODE)
    yield f"{tmp_path / 'own.py'}:"
    sys.modules.pop("bdclean_user_own", None)


def own(code, name, folder, **options):
    namespace = {}
    exec(CODE, namespace)
    return read(folder / "m.safetensors", under("", drawn(namespace[name]())), arch=code + name, **options)


def test_user_code_that_takes_a_number_of_classes_is_given_a_head(code, tmp_path):
    suspect = own(code, "open_ended", tmp_path)
    new = written(with_new_head(suspect, NAMES, 0), tmp_path, code + "open_ended")
    assert new.arch.classes == 5 and set(new.tensors) == set(suspect.tensors)


@pytest.mark.parametrize(
    "name, kind, said",
    [
        ("fixed", "auto", "user:fixed with a new head would not be recognised: .* does not have these"),
        ("scaled", "auto", "user:scaled with a new head would not be recognised"),
        ("features", "encoder", "not known where such a network has a head"),
    ],
)
def test_user_code_whose_head_is_not_known_is_refused(name, kind, said, code, tmp_path):
    suspect = own(code, name, tmp_path, kind=kind)
    with pytest.raises(Refused, match=said):
        check_recognised(with_new_head(suspect, NAMES, 0), code + name)
