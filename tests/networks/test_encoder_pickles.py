"""Torch files of self-supervision: what scripts pickle beside the weights is passed over, and never run or imported."""

import argparse
import collections
import logging
import pathlib
import sys
import types

import pytest
import torch
from networks.layout_files import held, large, small, under

from bdclean.errors import Refused
from bdclean.networks.checkpoint.checkpoint import Checkpoint


def projector(prefix):
    return {f"{prefix}mlp.0.weight": torch.randn(4, 512), f"{prefix}last_layer.weight_g": torch.ones(9, 1)}


@pytest.fixture
def foreign(monkeypatch):
    """Classes of a module that is not there when the file is read: objects, tables, lists and a function's result."""
    module = types.ModuleType("lightning_like")
    for name, bases in (("Config", ()), ("AttributeDict", (dict,)), ("Steps", (list,))):
        setattr(module, name, type(name, bases, {"__module__": "lightning_like"}))
    monkeypatch.setitem(sys.modules, "lightning_like", module)
    return module


def dino(path, legacy=False, **more):
    net = large()
    table = {
        "student": under("module.backbone.", large()) | projector("module.head."),
        "teacher": under("backbone.", net) | projector("head."),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", data=pathlib.PurePosixPath("/x")),
        "dino_loss": {"center": torch.zeros(1, 9)},
    }
    torch.save(table | more, path, _use_new_zipfile_serialization=not legacy)
    return net


@pytest.mark.parametrize("legacy", [False, True])
def test_dinos_tables_and_arguments(legacy, tmp_path):
    net = dino(tmp_path / "checkpoint.pth", legacy)
    with pytest.raises(Refused, match="--allow-pickle"):
        Checkpoint.read(tmp_path / "checkpoint.pth")
    checkpoint = Checkpoint.read(tmp_path / "checkpoint.pth", allow_pickle=True)
    assert checkpoint.arch.layout == "DINO, the teacher"
    assert any("not tensors" in w and "args" in w for w in checkpoint.warnings)
    assert all(name.startswith("teacher.backbone.") for name in checkpoint.names)
    assert "dino_loss.center" in checkpoint.unread
    held(checkpoint, net, tmp_path, 64)


def test_foreign_objects_tables_and_lists(foreign, tmp_path, monkeypatch):
    net = small()
    config = foreign.Config()
    config.lr, config.inner = 0.1, foreign.Config()
    table = foreign.AttributeDict(lr=0.1)
    table.extra = 3
    state = under("backbone.", net) | {"projector.0.weight": torch.randn(4, 32)}
    whole = {
        "epoch": 1, "state_dict": state, "hyper_parameters": table, "config": config,
        "callbacks": {"best": foreign.Steps([1, 2]), "kind": foreign.Config},
        "counts": collections.defaultdict(int, a=1),
    }  # fmt: skip
    torch.save(whole, tmp_path / "last.ckpt")
    monkeypatch.delitem(sys.modules, "lightning_like")
    checkpoint = Checkpoint.read(tmp_path / "last.ckpt", allow_pickle=True)
    assert checkpoint.arch.layout == "solo-learn" and "lightning_like" not in sys.modules
    held(checkpoint, net, tmp_path, 32)


class Runs:
    """Runs code when unpickled by anything that runs it."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_nothing_is_run(tmp_path, capsys):
    marker = tmp_path / "ran"
    dino(tmp_path / "m.pth", args=Runs(pathlib.Path.touch, marker))
    with pytest.raises(Refused):  # getattr, by which a method is found, is no name that weights need
        Checkpoint.read(tmp_path / "m.pth", allow_pickle=True)
    dino(tmp_path / "m.pth", args=Runs(logging.FileHandler, str(marker)))
    Checkpoint.read(tmp_path / "m.pth", allow_pickle=True)
    dino(tmp_path / "m.pth", args=Runs(print, "ran"))
    with pytest.raises(Refused, match="more than plain tensors"):
        Checkpoint.read(tmp_path / "m.pth", allow_pickle=True)
    assert not marker.exists() and capsys.readouterr().out == ""


def test_a_table_of_vissl(tmp_path):
    net = large()
    trunk, heads = under("_feature_blocks.", net), {"0.clf.0.weight": torch.randn(9, 512)}
    model = {"trunk": trunk, "heads": heads}
    torch.save({"classy_state_dict": {"base_model": {"model": model}}, "phase": 1}, tmp_path / "m.torch")
    checkpoint = Checkpoint.read(tmp_path / "m.torch", allow_pickle=True)
    assert checkpoint.arch.layout == "VISSL"
    held(checkpoint, net, tmp_path, 64)


def test_a_torchscript_archive_says_what_to_save(tmp_path):
    module = torch.nn.Linear(2, 2)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), tmp_path / "ViT-B-32.pt")
    with pytest.raises(
        Refused, match=r"TorchScript archive, which is a program: .*torch\.jit\.load.*state_dict"
    ):
        Checkpoint.read(tmp_path / "ViT-B-32.pt", allow_pickle=True)
