"""Networks in files as attacks' authors and training scripts write them: under other keys, prefixes and layers."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import resnet18

from bdclean.errors import Refused
from bdclean.networks.ambiguity.choosing import choose
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.checkpoint.claims import claim, layer_claim
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.recognition.dialects import views


def weights(seed=0):
    torch.manual_seed(seed)
    return ResidualNetwork((1, 1, 1), (4, 8, 16), 4, 10).state_dict()


def under(prefix, state):
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


def read_and_written(path, folder):
    """The checkpoint, and what is written of it unchanged."""
    checkpoint = Checkpoint.read(path, allow_pickle=True)
    network = checkpoint.build()
    assert all(torch.equal(t, weights()[n]) for n, t in network.state_dict().items())
    checkpoint.write(network, folder / "out.safetensors", {})
    return checkpoint, load_file(folder / "out.safetensors")


# As WaNet's and Input-Aware's train.py save their networks, schedulers and grids.
WANET = {
    "netG": {"conv.weight": torch.randn(3, 3, 3, 3)},
    "schedulerC": {"last_epoch": 3},
    "identity_grid": torch.randn(1, 8, 8, 2),
    "noise_grid": torch.randn(1, 8, 8, 2),
    "best_clean_acc": 94.0,
}


@pytest.mark.parametrize("key", ["netC", "net_state_dict", "model_raw"])
def test_tables_of_attacks_are_read_and_the_rest_is_carried_over(key, tmp_path):
    torch.save({key: weights()} | WANET, tmp_path / "m.pth.tar")
    checkpoint, written = read_and_written(tmp_path / "m.pth.tar", tmp_path)
    assert set(checkpoint.unread) == {"netG.conv.weight", "identity_grid", "noise_grid"}
    assert written.keys() == weights().keys() | set(checkpoint.unread)
    assert torch.equal(written["noise_grid"], WANET["noise_grid"])
    assert torch.equal(written["netG.conv.weight"], WANET["netG"]["conv.weight"])


@pytest.mark.parametrize("prefix", ["netC.", "classifier.", "clf.", "module.victim.", "1."])
def test_a_network_under_any_prefix_that_most_tensors_have(prefix, tmp_path):
    rest = {"netG.conv.weight": torch.randn(3, 3, 3, 3).half(), "optimizer.state.0.step": torch.tensor(3.0)}
    state = under(prefix, weights()) | rest
    save_file(state, tmp_path / "m.safetensors")
    checkpoint, written = read_and_written(tmp_path / "m.safetensors", tmp_path)
    assert set(checkpoint.unread) == rest.keys() and written.keys() == state.keys()
    assert all(torch.equal(written[n], t) for n, t in state.items())
    said = f"the network is what lies under {prefix}; taken for no part of it: netG.conv.weight."
    assert (said in checkpoint.warnings) == (prefix != "netC.")


def test_one_prefix_for_all_says_nothing(tmp_path):
    save_file(under("victim.", weights()), tmp_path / "m.safetensors")
    checkpoint, _ = read_and_written(tmp_path / "m.safetensors", tmp_path)
    assert checkpoint.unread == () and checkpoint.warnings == ()


@pytest.mark.parametrize("last", [{"head2.weight": (5, 10), "head2.bias": (5,)}, {"clf.weight": (5, 16)}])
def test_a_network_whose_head_may_lie_outside_the_prefix_is_refused(last, tmp_path):
    """Of a network with a layer behind its 1st head, and of a trunk whose head has another name."""
    headless = "clf.weight" in last
    state = {n: t for n, t in weights().items() if not (headless and n.startswith("fc"))}
    save_file(
        under("victim.", state) | {n: torch.ones(s) for n, s in last.items()}, tmp_path / "m.safetensors"
    )
    with pytest.raises(Refused, match="no known architecture has these"):
        Checkpoint.read(tmp_path / "m.safetensors")


def test_the_users_code_is_found_under_any_prefix(tmp_path):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))\n"
    )
    state = {"0.weight": torch.ones(4, 3, 3, 3), "0.bias": torch.ones(4)}
    state |= {"3.weight": torch.ones(5, 4), "3.bias": torch.ones(5)}
    save_file(under("victim.", state), tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors", f"{tmp_path / 'own.py'}:net")
    assert checkpoint.names == {f"victim.{n}": n for n in state}


CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# How a layer that normalises and the network behind it are called: what nn.Sequential, RobustBench and MadryLab write.
LAYERS = {
    "sequential": ("0.mean", "0.std", "1."),
    "sequential in a wrapper": ("module.0._mean", "module.0._std", "module.1."),
    "sequential in lightning": ("model.0.mu", "model.0.sigma", "model.1."),
    "robustbench": ("normalize.mean", "normalize.std", "model."),
    "madrylab": ("module.normalizer.new_mean", "module.normalizer.new_std", "module.model."),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_that_normalises_is_carried_over_and_a_claim(kind, tmp_path):
    mean, std, prefix = LAYERS[kind]
    layer = {n: torch.tensor(v).reshape(1, 3, 1, 1) for n, v in zip((mean, std), CIFAR10, strict=True)}
    state = under(prefix, weights()) | layer
    save_file(state, tmp_path / "m.safetensors")
    checkpoint, written = read_and_written(tmp_path / "m.safetensors", tmp_path)
    assert set(checkpoint.unread) == layer.keys() and checkpoint.warnings == ()
    assert written.keys() == state.keys() and all(torch.equal(written[n], t) for n, t in state.items())
    said, source = claim(
        checkpoint.metadata, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, None, checkpoint.layer
    )
    assert (said.mean, said.std, said.raw255) == (*CIFAR10, False) and source == "the file's mean and std"
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    assert said in [choice.preprocess for choice in choose(checkpoint, images)]


@pytest.mark.parametrize(
    "mean, std, found",
    [
        (torch.tensor(0.5), torch.tensor(0.25), ((0.5,) * 3, (0.25,) * 3, False)),
        (
            torch.tensor([120.0, 110, 100]),
            torch.tensor([60.0, 61, 62]),
            ((120, 110, 100), (60, 61, 62), True),
        ),
        (torch.zeros(3), torch.tensor([0.0, 1, 1]), None),
        (torch.zeros(3), torch.tensor([1.0, float("nan"), 1]), None),
        (torch.zeros(4), torch.ones(4), None),
        (torch.zeros(3, dtype=torch.int64), torch.ones(3), None),
        (torch.zeros(3), None, None),
    ],
)
def test_what_mean_and_std_claim(mean, std, found):
    tensors = {"0.mean": mean} | ({"0.std": std} if std is not None else {})
    said = layer_claim(tensors, list(tensors))
    assert (said and (said.mean, said.std, said.raw255)) == found


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "0.mean.x"])
def test_a_first_layer_that_does_more_is_not_set_aside(name):
    names = ["0.mean", "0.std", "1.conv1.weight", "1.fc.weight", name]
    assert all("conv1.weight" not in view.values() for view, _ in views(names))


@pytest.mark.parametrize("table", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("rest", [(), ({"state": {0: {"step": torch.tensor(3.0)}}}, 7)])
def test_a_list_whose_first_item_is_the_table(table, rest, tmp_path):
    torch.save([table(weights()), *rest], tmp_path / "m.pth")
    checkpoint, written = read_and_written(tmp_path / "m.pth", tmp_path)
    assert checkpoint.unread == (("1.state.0.step",) if rest else ())
    assert written.keys() == weights().keys() | set(checkpoint.unread)


@pytest.mark.parametrize("content", [[], [{}], [{"epoch": 3}], [3, {"a": 4}], [torch.ones(2)]])
def test_a_list_without_a_table_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(Refused, match="no table of tensors"):
        Checkpoint.read(tmp_path / "m.pth", allow_pickle=True)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("name", "timm"),
    [
        ("stages.0.blocks.0.conv_dw.weight", True),
        ("conv_stem.weight", True),
        ("patch_embed.proj.weight", True),
        ("head.fc.weight", True),
        ("features.0.weight", False),
        ("layer1.0.conv1.weight", False),
        ("wide_stem.weight", False),
    ],
)
def test_a_refusal_of_timms_names_says_how_to_name_the_network(prefix, name, timm, tmp_path):
    save_file({prefix + name: torch.ones(2, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(Refused) as caught:
        Checkpoint.read(tmp_path / "m.safetensors")
    assert ("--arch FILE.py:NAME, or --arch timm:NAME if timm made it." in str(caught.value)) == timm


def test_a_network_with_more_in_it_is_said_to_have_all_of_the_nearest(tmp_path):
    """SENet's blocks are ResNet's with two layers more."""
    state = resnet18(num_classes=5).state_dict()
    more = {f"layer{k}.0.fc{n}.weight": torch.ones(4, 4, 1, 1) for k in (1, 2) for n in (1, 2)}
    save_file(state | more, tmp_path / "m.safetensors")
    some = "layer1.0.fc1.weight, layer1.0.fc2.weight, layer2.0.fc1.weight, ..."
    said = f"these 126 tensors; the file has all 102 of resnet18, and 4 more ({some}): give the network's own code"
    with pytest.raises(Refused, match=re.escape(said)):
        Checkpoint.read(tmp_path / "m.safetensors")
