"""Encoders with residual backbones: each author's file is read, gives the same features, goes back as it was."""

import pytest
import torch
from networks.layout_files import held, large, numbered, read, small, under
from torch import nn

from bdclean.errors import Refused, UsageError
from bdclean.networks.checkpoint.checkpoint import Checkpoint


def head(prefix, *rows):
    """Matrices of a projector or another head under a prefix, with a batch counter, which stays a whole number."""
    made = {f"{prefix}{k}.weight": torch.randn(rows[k + 1], rows[k]) for k in range(len(rows) - 1)}
    return made | {f"{prefix}9.num_batches_tracked": torch.tensor(7)}


def shortcut(name):
    return name.replace("downsample.", "shortcut.")


def files():
    """(layout's name, which network, its tensors under the file's names, what lies beside)."""
    moco = {"queue": torch.randn(16, 32), "queue_ptr": torch.tensor([5])}
    yield (
        "MoCo v1 or v2, the query encoder", "large", lambda n: under("module.encoder_q.", n),
        lambda: under("module.encoder_k.", large_other()) | head("module.encoder_q.fc.", 512, 512, 16)
        | {f"module.{k}": v for k, v in moco.items()},
    )  # fmt: skip
    yield (
        "MoCo v1 or v2, the query encoder", "large", lambda n: under("encoder_q.", n),
        lambda: {"encoder_q.fc.weight": torch.randn(128, 512), "encoder_q.fc.bias": torch.randn(128)} | moco,
    )  # fmt: skip
    yield (
        "MoCo v3, the base encoder", "large", lambda n: under("module.base_encoder.", n),
        lambda: head("module.base_encoder.fc.", 512, 64, 16) | head("module.predictor.", 16, 16)
        | under("module.momentum_encoder.", large_other()),
    )  # fmt: skip
    yield (
        "SimCLR (sthalles)", "large", lambda n: under("backbone.", n),
        lambda: {"backbone.fc.0.weight": torch.randn(512, 512), "backbone.fc.0.bias": torch.zeros(512)}
        | {"backbone.fc.2.weight": torch.randn(128, 512), "backbone.fc.2.bias": torch.zeros(128)},
    )  # fmt: skip
    yield (
        "SimCLR (Spijkervet)", "large", lambda n: under("encoder.", n),
        lambda: {"projector.0.weight": torch.randn(512, 512), "projector.2.weight": torch.randn(64, 512)},
    )  # fmt: skip
    yield (
        "BadEncoder, DRUPE or MIMIC", "small", lambda n: under("f.f.", n, lambda s: numbered(s, 0, 3)),
        lambda: {"g.0.weight": torch.randn(32, 32), "g.1.weight": torch.ones(32), "g.3.weight": torch.randn(8, 32)},
    )  # fmt: skip
    yield "DECREE", "small", lambda n: under("f.", n, lambda s: numbered(s, 0, 3)), dict
    yield (
        "CTRL", "small", lambda n: under("backbone.", n, shortcut), lambda: head("proj_head.", 32, 32, 16)
    )  # fmt: skip
    yield (
        "CTRL", "small", lambda n: under("backbone.", n, shortcut),
        lambda: under("backbone_k.", small(5), shortcut) | head("projector_q.", 32, 16)
        | head("predictor.", 16, 16) | under("encoder_q.0.", small(5), shortcut),
    )  # fmt: skip
    yield (
        "SSL-Backdoor or SSL-Cleanse, BYOL", "small", lambda n: under("model.module.", n),
        lambda: under("model_t.module.", small(5)) | head("head.module.", 32, 16) | head("pred.module.", 16, 16),
    )  # fmt: skip
    yield (
        "SimSiam", "large", lambda n: under("module.encoder.", n),
        lambda: head("module.encoder.fc.", 512, 32, 16) | head("module.predictor.", 16, 8, 16),
    )  # fmt: skip
    yield (
        "Barlow Twins", "large", lambda n: under("module.backbone.", n),
        lambda: head("module.projector.", 512, 16) | {"module.bn.running_mean": torch.randn(16)},
    )  # fmt: skip
    yield "a network without its head", "large", lambda n: under("", n), dict
    yield "a network without its head", "small", lambda n: under("module.", n), dict
    yield (
        "SwAV", "large", lambda n: under("module.", n),
        lambda: head("module.projection_head.", 512, 16, 8) | {"module.prototypes.weight": torch.randn(30, 8)},
    )  # fmt: skip
    yield (
        "lightly", "large", lambda n: under("backbone.", n, lambda s: numbered(s, 0, 4)),
        lambda: head("projection_head.layers.", 512, 16) | head("backbone_momentum.", 4, 4),
    )  # fmt: skip
    yield (
        "lightly, the teacher", "large", lambda n: under("teacher_backbone.", n, lambda s: numbered(s, 0, 4)),
        lambda: under("student_backbone.", large_other(), lambda s: numbered(s, 0, 4)) | head("student_head.", 9, 9),
    )  # fmt: skip
    yield (
        "solo-learn", "small", lambda n: under("backbone.", n),
        lambda: {"classifier.weight": torch.randn(10, 32), "classifier.bias": torch.zeros(10)}
        | head("projector.", 32, 16) | under("momentum_backbone.", small(5)) | {"queue": torch.randn(2, 16, 64)},
    )  # fmt: skip
    yield (
        "VISSL", "large",
        lambda n: under("classy_state_dict.base_model.model.trunk._feature_blocks.", n),
        lambda: {"classy_state_dict.base_model.model.heads.0.clf.0.weight": torch.randn(16, 512)},
    )  # fmt: skip
    yield (
        "BYOL (lucidrains)", "large", lambda n: under("net.", n) | under("online_encoder.net.", n),
        lambda: head("online_encoder.projector.", 512, 16) | under("target_encoder.net.", large_other()),
    )  # fmt: skip


def large_other():
    network = large()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    return network


@pytest.mark.parametrize("case", list(files()), ids=lambda c: c[0])
def test_each_layout(case, tmp_path):
    layout, which, named, beside = case
    network = {"large": large, "small": small}[which]()
    state = named(network) | beside()
    checkpoint = read(tmp_path / "m.safetensors", state)
    assert checkpoint.arch.layout == layout and checkpoint.arch.feature == "pooled"
    assert checkpoint.arch.input[1] == (224 if which == "large" else 32)
    held(checkpoint, network, tmp_path, 64 if which == "large" else 32)
    assert len(checkpoint.names) + len(checkpoint.tied) == len(named(network))


def test_a_projector_alone_and_half_of_a_backbone(tmp_path):
    with pytest.raises(Refused, match="a projector alone"):
        read(
            tmp_path / "m.safetensors",
            {"projector.0.weight": torch.randn(4, 8), "projector.2.weight": torch.eye(4)},
        )
    state = under("module.encoder_q.", large()) | {"queue": torch.randn(4, 4)}
    del state["module.encoder_q.layer2.0.bn2.bias"]
    state["module.encoder_q.layer3.0.bn2.bias"] = torch.zeros(7)
    said = r"58 of 60 tensors of resnet1-1-1-1 are there behind encoder_q\. \(MoCo v1.*layer3.0.bn2.bias is \[7\]"
    with pytest.raises(Refused, match=said):
        read(tmp_path / "m.safetensors", state)


def test_prefixes_are_whole(tmp_path):
    """`momentum_backbone.` is no `backbone.`; a name that merely contains one is another thing."""
    for prefix in ("momentum_backbone.", "xencoder_q.", "my_f.f."):
        with pytest.raises(Refused):
            read(tmp_path / "m.safetensors", under(prefix, large()))


def test_a_classifier_never_becomes_an_encoder_by_itself(tmp_path):
    trunk, fc = large(), {"fc.weight": torch.randn(5, 512), "fc.bias": torch.zeros(5)}
    path = tmp_path / "m.safetensors"
    whole = read(path, under("", trunk) | fc)
    assert whole.arch.kind == "classifier"
    assert Checkpoint.read(path, kind="classifier").arch == whole.arch
    encoder = Checkpoint.read(path, kind="encoder")
    assert set(encoder.unread) == set(fc)
    held(encoder, trunk, tmp_path, 64)
    read(path, under("", trunk))
    with pytest.raises(Refused):
        Checkpoint.read(path, kind="classifier")
    # A layer more, or a head of a kind that is not known: as before, refused.
    for odd in ({"fc.0.weight": torch.randn(9, 512)}, {"layer1.0.se.weight": torch.randn(64, 64)}):
        with pytest.raises(Refused, match="no known architecture"):
            read(path, under("", trunk) | odd)


@pytest.mark.parametrize("prefix, first", [("f.", 3), ("f.f.", 3), ("backbone.", 4)])
def test_numbered_children_beside_a_linear_layer_are_a_classifiers(prefix, first, tmp_path):
    """leftthomas/SimCLR's and lightly's linear evaluation: nothing says that the layer is a mere probe."""
    state = under(prefix, small(), lambda s: numbered(s, 0, first))
    state |= {"fc.weight": torch.randn(10, 32), "fc.bias": torch.zeros(10)}
    with pytest.raises(Refused):
        read(tmp_path / "m.safetensors", state)
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors", kind="encoder")
    assert set(checkpoint.unread) == {"fc.weight", "fc.bias"}
    assert read(tmp_path / "m.safetensors", state | head("projection_head.", 4, 4)).arch.kind == "encoder"


def test_a_probe_without_company_is_a_classifier(tmp_path):
    state = under("backbone.", small())
    state |= {"classifier.weight": torch.randn(10, 32), "classifier.bias": torch.zeros(10)}
    assert read(tmp_path / "m.safetensors", state).arch.kind == "classifier"


def test_the_padded_stem_of_solo_learn_is_a_candidate(tmp_path):
    network = small()
    state = under("backbone.", network) | head("projector.", 32, 16)
    checkpoint = read(tmp_path / "m.safetensors", state)
    padded = next(a for a in checkpoint.candidates if a.name.endswith("+pad2"))
    assert not padded.unusual and padded.kind == "encoder"
    network.conv1.padding = (2, 2)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(checkpoint.build(arch=padded)(x), network(x), atol=1e-5)


@pytest.mark.parametrize(
    "one, other, said",
    [
        ("module.encoder_q.", "module.encoder_k.", "module.encoder_k. holds an average of the weights"),
        ("teacher.backbone.", "student.module.backbone.", "student.module.backbone. holds a second copy"),
        ("base_encoder.", "momentum_encoder.", "momentum_encoder. holds an average of the weights"),
    ],
)
def test_the_other_copy_is_named(one, other, said, tmp_path):
    state = under(one, large()) | under(other, large_other())
    checkpoint = read(tmp_path / "m.safetensors", state)
    assert all(name.startswith(one) for name in checkpoint.names)
    (warning,) = checkpoint.warnings
    assert warning.startswith(said)
    # Equal copies stay equal.
    same = read(tmp_path / "m.safetensors", under(one, large()) | under(other, large()))
    assert len(same.tied) > 40
    held(same, large(), tmp_path, 64)


def test_arch_names_an_encoder_or_the_users_code(tmp_path):
    path = tmp_path / "m.safetensors"
    checkpoint = read(path, under("f.f.", small(), lambda s: numbered(s, 0, 3)))
    name = checkpoint.arch.name + "+pad2"
    assert [a.name for a in Checkpoint.read(path, arch=name).candidates] == [name]
    with pytest.raises(Refused, match="resnet50 does not have these"):
        Checkpoint.read(path, arch="resnet50")
    with pytest.raises(UsageError, match="not a known architecture"):
        Checkpoint.read(path, arch="resnet-of-nobody")
    code = "import torch\nfrom torch import nn\n\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(),"
    (tmp_path / "own.py").write_text(code + " nn.AdaptiveAvgPool2d(1), nn.Flatten())\n")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    read(path, under("", net), arch=f"{tmp_path / 'own.py'}:make", kind="encoder")
    own = Checkpoint.read(path, arch=f"{tmp_path / 'own.py'}:make", kind="encoder")
    assert own.arch.width == 4 and own.arch.layout == "the user's code"
    held(own, net, tmp_path, 32)
