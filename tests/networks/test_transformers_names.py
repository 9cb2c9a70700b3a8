"""Hugging Face transformers' files: the same logits as transformers gives, and files written back in their own form.

`transformers_outputs.json` holds, for a small network of each kind with weights by a formula, the names and shapes of
its file and the logits that transformers 5.23 computed.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdclean.errors import Refused
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.recognition.transformers_names import TABLES, translate

# Large for their kind: a fast run takes one of them.
SLOW = ("resnet-bottleneck", "resnet-basic", "regnet-x")
CASES = json.loads((Path(__file__).parents[1] / "transformers_outputs.json").read_text())


MARKED = [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES]


def value(name, shape, k):
    """The formula that the recorded networks were filled with."""
    t = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + k).reshape(shape)
    if name.endswith("running_var"):
        return (1.5 + t / 2).float()
    if name.endswith("running_mean"):
        return (t / 5).float()
    if len(shape) > 1 and "table" not in name:
        return (t / math.sqrt(math.prod(shape[1:])) * 1.5).float()
    return (1 + t / 4 if name.endswith("weight") else t / 4).float()


def make(folder, case, prefix="", config=True):
    shapes = CASES[case]["shapes"]
    state = {prefix + n: value(n, s, k) for k, (n, s) in enumerate(shapes.items())}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if config:
        (folder / "config.json").write_text(json.dumps(CASES[case]["config"]))
    return state


def same_logits(network, case, rtol=1e-4):
    side, expected = CASES[case]["side"], torch.tensor(CASES[case]["logits"])
    x = torch.sin(torch.arange(2 * 3 * side * side, dtype=torch.float64) * 0.37).reshape(2, 3, side, side)
    with torch.no_grad():
        got = network(x.float())
    return torch.allclose(got, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("case", MARKED)
def test_logits_are_transformers_and_the_file_keeps_its_form(case, tmp_path):
    if CASES[case]["config"]["model_type"] == "convnextv2":
        pytest.importorskip("timm", reason="ConvNeXt V2 is built by timm, an extra")
    state = make(tmp_path, case)
    checkpoint = Checkpoint.read(tmp_path)
    assert (
        checkpoint.unread == () and checkpoint.names.keys() == state.keys() and checkpoint.arch.classes == 7
    )
    network = checkpoint.build()
    assert same_logits(network, case)
    checkpoint.write(network, tmp_path / "out.safetensors", {})
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[n], state[n]) for n in state) and len(written) == len(state)
    # Changed weights reach their own places: what is read back computes what was written.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.01)
    checkpoint.write(network, tmp_path / "out.safetensors", {})
    again = checkpoint.again(tmp_path / "out.safetensors").build()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_under_wrappers_and_in_halves(tmp_path):
    state = make(tmp_path, "vit", prefix="model._orig_mod.")
    save_file({n: t.half() for n, t in state.items()}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.read(tmp_path)
    assert same_logits(checkpoint.build(), "vit", rtol=2e-2)
    query = "model._orig_mod.vit.encoder.layer.0.attention.attention.query.weight"
    assert checkpoint.names[query].endswith("encoder_layer_0.self_attention.in_proj_weight")
    assert (checkpoint.parts[query].begin, checkpoint.parts[query].shape) == (0, (48, 48))


def test_the_config_settles_what_shapes_do_not_show(tmp_path):
    make(tmp_path, "vit")
    config = CASES["vit"]["config"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    checkpoint = Checkpoint.read(tmp_path)
    assert len(checkpoint.candidates) == 1 and not same_logits(checkpoint.build(), "vit")
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 7}))
    with pytest.raises(Refused, match="says 7 attention heads, which these tensors do not allow"):
        Checkpoint.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "quick_gelu\x1b[1m"}))
    with pytest.raises(Refused, match=r"hidden_act quick_gelu\\x1b\[1m; only gelu is known for vit"):
        Checkpoint.read(tmp_path)
    (tmp_path / "config.json").unlink()
    assert len(Checkpoint.read(tmp_path).candidates) > 1


def test_an_output_stands_without_its_config(tmp_path):
    make(tmp_path, "vit")
    checkpoint = Checkpoint.read(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    checkpoint.write(checkpoint.build(), tmp_path / "elsewhere" / "out.safetensors", {})
    again = Checkpoint.read(tmp_path / "elsewhere" / "out.safetensors")
    assert again.arch.name == checkpoint.arch.name and len(again.candidates) == 1
    assert same_logits(again.build(), "vit")


def test_a_kind_that_is_not_known_is_said(tmp_path):
    save_file({"beit.embeddings.cls_token": torch.zeros(1, 1, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "beit"}')
    with pytest.raises(Refused, match=f"says model_type beit; .* {', '.join(TABLES)} are known"):
        Checkpoint.read(tmp_path)


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("resnet")])
def test_a_missing_or_foreign_tensor_refuses(case, tmp_path):
    if CASES[case]["config"]["model_type"] == "convnextv2":
        pytest.importorskip("timm", reason="ConvNeXt V2 is built by timm, an extra")
    shapes = {n: tuple(s) for n, s in CASES[case]["shapes"].items()}
    state = make(tmp_path, case)
    for change in (list(shapes)[len(shapes) // 2], None):
        changed = {n: t for n, t in state.items() if n != change}
        if change is None:
            kind = CASES[case]["config"]["model_type"]
            changed[f"{kind}.encoder.adapter.weight"] = torch.zeros(3)
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(Refused):
            Checkpoint.read(tmp_path)


def test_every_tensor_goes_to_one_place():
    for case in CASES.values():
        found = translate({n: tuple(s) for n, s in case["shapes"].items()})
        rows = {}
        for name, to in found.names.items():
            part = found.parts.get(name)
            key = (to, part.begin if part else 0)
            assert key not in rows, name
            rows[key] = name
        total = sum(math.prod(s) for n, s in found.shapes.items() if not n.endswith("position_index"))
        assert total == sum(math.prod(s) for s in case["shapes"].values())
