"""torchvision's constructors with other widths and class counts than they have by themselves: read, built, loaded."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models
from torchvision.models import resnet

from bdclean.networks.building import load
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.families import regnet
from bdclean.networks.recognition.recognition import recognise

LARGE, SMALL = models.mobilenet_v3_large, models.mobilenet_v3_small
# What their constructors take beside classes; widths with which no two of a network's layers round alike.
WIDER = {
    "mnasnet-x0.35": partial(models.MNASNet, 0.35),
    "mnasnet-x1.4": partial(models.MNASNet, 1.4),
    "mobilenet_v2-x0.35": partial(models.mobilenet_v2, width_mult=0.35),
    "mobilenet_v2-x1.4": partial(models.mobilenet_v2, width_mult=1.4),
    "mobilenet_v3_large-x0.75": partial(LARGE, width_mult=0.75),
    "mobilenet_v3_large-reduced-tail-x1": partial(LARGE, reduced_tail=True),
    "mobilenet_v3_small-x1.25": partial(SMALL, width_mult=1.25),
    "mobilenet_v3_small-reduced-tail-x0.5": partial(SMALL, reduced_tail=True, width_mult=0.5),
    "shufflenet_v2-2-3-1-w12-32-64-96-128": partial(models.ShuffleNetV2, [2, 3, 1], [12, 32, 64, 96, 128]),
    "resnet1-2-1-1_4x16d": partial(resnet.ResNet, resnet.Bottleneck, [1, 2, 1, 1], groups=4, width_per_group=16),
}  # fmt: skip
# Other hundredths round to the same widths: then the network is the same.
SAME_WIDTHS = ("mnasnet", "mobilenet")


def shapes_of(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDER)
@pytest.mark.parametrize("classes", [1, 7])
def test_any_width_and_class_count_is_read(name, classes):
    with torch.device("meta"):
        network = WIDER[name](num_classes=classes)
    found = recognise(shapes_of(network))
    usual = [m.arch for m in found if not m.arch.unusual]
    assert [arch.classes for arch in usual] == [classes] * len(usual)
    first = usual[0].name
    assert first.split("-x")[0] == name.split("-x")[0] if name.startswith(SAME_WIDTHS) else first == name
    with torch.device("meta"):
        assert shapes_of(usual[0].build()) == shapes_of(network)


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDER)
def test_a_network_of_another_width_answers_as_torchvisions(name, tmp_path):
    torch.manual_seed(0)
    network = WIDER[name](num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(Checkpoint.read(tmp_path / "m.safetensors").build()(x), network(x))


def test_a_loader_that_asks_for_a_version_number_gets_the_codes_own(tmp_path):
    """torchvision's MNASNet raises where tensors come without one, as out of every safetensors file."""
    torch.manual_seed(0)
    network = models.mnasnet0_5(num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    assert (checkpoint.arch.name, checkpoint.arch.classes) == ("mnasnet0_5", 7)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(checkpoint.build()(x), network(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", models.list_models(module=models))
def test_every_constructor_of_torchvision_loads_a_files_tensors(name):
    """With three classes, and with one weight tensor of another shape not at all."""
    own = {proposal.name: proposal.build for proposal in regnet.named_proposals(3)}
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # torchvision computes widths of RegNets with tensors, which the meta device cannot: ours have the same.
    build = own.get(name) or partial(models.get_model_builder(name), num_classes=3, **options)
    with torch.device("meta"):
        network = build()
    state = {tensor_name: torch.empty_like(tensor) for tensor_name, tensor in network.state_dict().items()}
    load(network, state)
    assert recognise(shapes_of(network))[0].arch.classes == 3
    state[next(iter(state))] = torch.zeros(1, 1, device="meta")
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(network, state)
