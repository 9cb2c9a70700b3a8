"""A head on an encoder: its regression written out, and an encoder that comes back as it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.training.linear_head import DECAY, ENCODER, logistic_regression, with_head, without_head
from bdclean.training.run import Precision, Run

CLASSES = 3


def run():
    return Run(torch.device("cpu"), Precision(), 0)


def labeled(n=60):
    """Pictures whose class is their brightest colour."""
    pixels = torch.randint(100, (n, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels = torch.arange(n) % CLASSES
    pixels[torch.arange(n), labels] += 60
    return ImageSet(pixels, labels, tuple("abc"))


def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier(network, parse_preprocess("half")).train()


def test_the_regression_is_at_its_least():
    """Gradients of the mean loss with decay, written out, are nothing there."""
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(50, 4, generator=g), torch.arange(50) % CLASSES
    weight, bias = logistic_regression(x, labels, CLASSES)
    error = (x @ weight.T + bias).softmax(1) - F.one_hot(labels, CLASSES)
    assert (error.T @ x / len(x) + DECAY * weight).abs().max() < 1e-3
    assert error.mean(0).abs().max() < 1e-3


def test_the_head_takes_features_as_they_are():
    plain, images = encoder(), labeled()
    made = with_head(plain, images, run())
    with torch.no_grad():
        features = plain.eval()(images.images)
        scaled = (features - features.mean(0)) / features.std(0)
        weight, bias = logistic_regression(scaled, images.labels, CLASSES)
        expected = scaled @ weight.T + bias
        assert torch.allclose(made(images.images), expected, atol=1e-3 * float(expected.abs().max()))
        assert float((made(images.images).argmax(1) == images.labels).float().mean()) > 0.95
    assert not made.training and made.network.get_submodule(ENCODER)


def test_the_encoder_comes_back_as_it_was_and_is_a_copy():
    plain, images = encoder(), labeled()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    inside = without_head(with_head(plain, images, run()))
    after = inside.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    with torch.no_grad():
        after["network.0.weight"].zero_()
    assert plain.training and torch.equal(plain.state_dict()["network.0.weight"], before["network.0.weight"])


@pytest.mark.parametrize("labels", [None, torch.zeros(60, dtype=torch.int64)])
def test_a_head_needs_labels_of_two_classes(labels):
    with pytest.raises(Refused, match="labeled images of at least two classes"):
        with_head(encoder(), ImageSet(labeled().images, labels), run())
