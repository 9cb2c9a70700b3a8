"""Names as training code writes them: every tensor is read into one place, carried over, or the file refused."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdclean.errors import Refused
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.recognition.dialects import views


def weights(seed=0, classes=10):
    torch.manual_seed(seed)
    network = ResidualNetwork((1, 1, 1), (4, 8, 16), 4, classes)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1)
    return network.state_dict()


def wrapped(state, *rules):
    out = {}
    for name, tensor in state.items():
        for pattern, to in rules:
            name = re.sub(pattern, to, name)
        out[name] = tensor.clone()
    return out


DIALECTS = {
    "lightning": [("^", "model.")],
    "lightning net": [("^", "net.")],
    "written flat": [("^", "state_dict.")],
    "written flat, deep": [("^", "state_dict.module.net.")],
    "data parallel": [("^", "module.")],
    "compiled": [("^", "_orig_mod.")],
    "compiled inside": [("^", "model._orig_mod.module.")],
    "fsdp": [(r"^", "_fsdp_wrapped_module."), (r"(layer\d)\.(\d)\.", r"\1._fsdp_wrapped_module.\2.module.")],
    "checkpointed blocks": [(r"(layer\d\.\d)\.", r"\1._checkpoint_wrapped_module.")],
    "compiled blocks": [(r"(layer\d\.\d)\.", r"\1._orig_mod."), ("^", "module.")],
    "average alone": [("^", "ema_model.module.")],
    "average alone, written flat": [("^", "state_dict_ema.")],
    "mmpretrain": [("^(?!fc)", "backbone."), ("^fc", "head.fc")],
    "mmpretrain in lightning": [("^(?!fc)", "model.backbone."), ("^fc", "model.head.fc")],
    "encoder and head": [("^(?!fc)", "encoder."), ("^fc", "classifier")],
    "timm wrapper": [("^", "timm_model.")],
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_is_read_whole_and_written_back(dialect, tmp_path):
    state = weights()
    save_file(wrapped(state, *DIALECTS[dialect]), tmp_path / "m.safetensors", {"a": "b"})
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    assert checkpoint.unread == () and checkpoint.warnings == ()
    network = checkpoint.build()
    assert all(torch.equal(t, state[n]) for n, t in network.state_dict().items())
    checkpoint.write(network, tmp_path / "out.safetensors", {})
    written = load_file(tmp_path / "out.safetensors")
    assert {n: t.tolist() for n, t in written.items()} == {
        n: t.tolist() for n, t in wrapped(state, *DIALECTS[dialect]).items()
    }


BESIDE = {
    "epoch": torch.tensor(90),
    "global_step": torch.tensor([7], dtype=torch.int32),
    "n_averaged": torch.tensor(3),
    "optimizer.state.0.exp_avg": torch.randn(4, 3, 3, 3),
    "optimizer.param_groups.0.betas": torch.tensor([0.9, 0.999], dtype=torch.float64),
    "projector.0.weight": torch.randn(8, 16).half(),
    "criterion.weight": torch.ones(10, dtype=torch.bfloat16),
    "train_acc.correct": torch.tensor([True, False]),
    "queue": torch.empty(0, 128),
    "queue_ptr": torch.zeros(1, dtype=torch.uint8),
}


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_what_lies_beside_a_network_is_carried_over(prefix, tmp_path):
    save_file(wrapped(weights(), ("^", prefix)) | BESIDE, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    assert set(checkpoint.unread) == BESIDE.keys()
    network = checkpoint.build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    checkpoint.write(network, tmp_path / "out.safetensors", {})
    written = load_file(tmp_path / "out.safetensors")
    assert all(written[n].dtype == t.dtype and torch.equal(written[n], t) for n, t in BESIDE.items())


@pytest.mark.parametrize(
    "name",
    ["attention.weight", "layer1.0.se.weight", "layer4.0.conv1.weight", "alpha", "backbone.adapter.weight"],
)
def test_what_may_be_a_part_of_the_network_refuses(name, tmp_path):
    save_file(weights() | {name: torch.ones(4, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(Refused, match="no known architecture has these 57 tensors"):
        Checkpoint.read(tmp_path / "m.safetensors")


def written_twice(live, other, folder):
    """A network and other values of it in one file, each under its prefix: the tensors, and what was read."""
    state = wrapped(weights(0), ("^", live)) | wrapped(weights(1), ("^", other))
    save_file(state, folder / "m.safetensors")
    return state, Checkpoint.read(folder / "m.safetensors")


@pytest.mark.parametrize(
    "live, average", [("", "ema."), ("model.", "model_ema."), ("model.", "ema_model.module.")]
)
def test_the_average_of_a_network_is_carried_over_and_said(live, average, tmp_path):
    state, checkpoint = written_twice(live, average, tmp_path)
    assert set(checkpoint.unread) == {n for n in state if n.startswith(average)}
    (warning,) = checkpoint.warnings
    assert (
        f"{average} holds an average of the weights" in warning and "neither measured nor cleansed" in warning
    )
    checkpoint.write(checkpoint.build(), tmp_path / "out.safetensors", {})
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[n], t) for n, t in state.items())


@pytest.mark.parametrize(
    "live, other",
    [
        ("online_model.", "ema_model."),
        ("model.", "teacher_model."),
        ("net.", "momentum_encoder."),
        ("model.", "wrapped.by.somebody."),
    ],
)
def test_a_second_copy_under_any_prefix_is_said(live, other, tmp_path):
    state, checkpoint = written_twice(live, other, tmp_path)
    assert set(checkpoint.names) == {n for n in state if n.startswith(live)}
    (warning,) = checkpoint.warnings
    assert f"{other} holds " in warning and "neither measured nor cleansed" in warning


def test_a_copy_that_is_equal_stays_equal(tmp_path):
    state = wrapped(weights(), ("^", "model.")) | wrapped(weights(), ("^", "net."))
    save_file(state, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    assert checkpoint.unread == () and "are copies of others" in checkpoint.warnings[0]
    network = checkpoint.build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    checkpoint.write(network, tmp_path / "out.safetensors", {})
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[n], written["net" + n[5:]]) for n in written if n.startswith("model."))
    assert torch.equal(written["net.fc.weight"], 2 * state["net.fc.weight"])


def test_half_a_copy_is_not_cleansed_by_halves(tmp_path):
    """An average whose frozen layers equal the network's: writing those alone would break it."""
    other = wrapped(weights(1), ("^", "ema."))
    other["ema.conv1.weight"] = weights()["conv1.weight"]
    state = wrapped(weights(), ("^", "model.")) | other
    save_file(state, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    assert set(checkpoint.unread) == other.keys() and not checkpoint.tied
    assert "holds an average" in checkpoint.warnings[0]


def test_every_view_keeps_every_name():
    names = ["module.model.conv1.weight", "model.fc.weight", "ema.fc.weight", "optimizer.step", "epoch", "x"]
    for view, unread in views(names):
        assert sorted([*view, *unread]) == sorted(names)
        assert len(set(view.values())) == len(view)


def test_many_wrappers_and_long_names_take_no_time():
    names = [f"{'model.net.' * k}w" for k in range(200)] + ["optim" * 100_000, "ema." * 100_000 + "w"]
    names += [f"optimizer.state.{k}.exp_avg" for k in range(4_000)]
    assert len(list(views(names))) < 60
