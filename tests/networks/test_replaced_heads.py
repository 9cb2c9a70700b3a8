import pytest
import torch
import torchvision
from networks.on_meta import on_meta, shapes_of
from torch import nn

from bdclean.errors import Refused
from bdclean.networks.recognition.recognition import recognise
from bdclean.networks.recognition.replaced_heads import replaced_heads


def replaced(network, place, head):
    parent, _, leaf = place.rpartition(".")
    setattr(network.get_submodule(parent), leaf, head)
    return network


def linear_of(network, place):
    return [m for m in network.get_submodule(place).modules() if isinstance(m, nn.Linear)][-1].in_features


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("resnet18", "fc"),
        ("vit_b_16", "heads"),
        ("vit_b_16", "heads.head"),
        ("efficientnet_b0", "classifier"),
        ("efficientnet_b0", "classifier.1"),
        ("mobilenet_v3_small", "classifier.3"),
        ("densenet121", "classifier"),
        ("vgg16_bn", "classifier.6"),
    ],
)
def test_a_head_that_was_replaced_is_read_where_it_stands(name, place, prefix):
    def build():
        network = getattr(torchvision.models, name)()
        width = linear_of(network, place)
        return replaced(network, place, nn.Sequential(nn.Dropout(), nn.Linear(width, 7)))

    shapes = {prefix + n: s for n, s in shapes_of(on_meta(build)).items()}
    match = recognise(shapes)[0]
    assert (match.arch.name, match.arch.classes, match.unread) == (name, 7, ())
    assert set(match.names) == set(shapes)
    expected = shapes_of(on_meta(match.arch.build))
    assert all(shapes[own] == expected[to] for own, to in match.names.items())


def test_what_is_computed_is_the_same():
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    network.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 7))
    match = recognise(shapes_of(network))[0]
    other = match.arch.build()
    other.load_state_dict({match.names[name]: tensor for name, tensor in network.state_dict().items()})
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(network.eval()(images), other.eval()(images))


def test_a_head_of_several_layers_is_refused():
    def build():
        network = torchvision.models.resnet18()
        network.fc = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 7))
        return network

    with pytest.raises(Refused, match="nearest is resnet18"):
        recognise(shapes_of(on_meta(build)))


def test_layers_inside_the_network_are_no_heads():
    shapes = {"layer1.0.se.fc.1.weight": (4, 8), "layer1.0.se.fc.1.bias": (4,)}
    assert list(replaced_heads(shapes)) == []
    assert list(replaced_heads({"fc" + ".x" * 200 + ".weight": (1, 1)})) == []
