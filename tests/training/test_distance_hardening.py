"""Class distance hardening: a weakness that was planted between two classes is trained away, and labels are kept."""

import pytest
import torch
from torch import nn

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.training.distance_hardening import DistanceHardening
from bdclean.training.run import Precision, Run

SIDE, CLASSES = 8, 3
CORNER = (slice(None), slice(None), slice(0, 2), slice(0, 2))


def run(seed=0):
    return Run(torch.device("cpu"), Precision(), seed)


def labeled(n=48):
    """Pictures whose class is their brightest colour, each with a black corner."""
    pixels = torch.randint(
        80, (n, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    labels = torch.arange(n) % CLASSES
    pixels[torch.arange(n), labels] += 120
    pixels[CORNER] = 0
    return ImageSet(pixels, labels, tuple("rgb"))


def model():
    """A linear classifier of colours, which a white corner sends to class 1."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, CLASSES))
    weight = torch.zeros(CLASSES, 3, SIDE, SIDE)
    weight[torch.arange(CLASSES), torch.arange(CLASSES)] = 20 / SIDE**2
    weight[:, :, :2, :2] = 0
    weight[1, :, :2, :2] = 2.0
    with torch.no_grad():
        network[1].weight.copy_(weight.flatten(1))
        network[1].bias.zero_()
    return Classifier(network, parse_preprocess("none")).eval()


def rates(made):
    """Accuracy, and the share of images of other classes that a white corner sends to class 1."""
    images = labeled()
    stamped = images.images.clone()
    stamped[CORNER] = 255
    others = images.labels != 1
    with torch.no_grad():
        right = (made(images.images).argmax(1) == images.labels).float().mean()
        return float(right), float((made(stamped)[others].argmax(1) == 1).float().mean())


QUICK = DistanceHardening(epochs=20, batch_size=16, rate=0.05, fit_steps=24)


@pytest.mark.slow
def test_a_planted_weakness_is_trained_away():
    made = model()
    assert rates(made) == (1.0, 1.0)
    curve = QUICK(made, labeled(), run())
    accuracy, success = rates(made)
    assert accuracy == 1.0 and success < 0.2 and not made.training
    assert curve[-1]["step"] == CLASSES + 60


@pytest.mark.slow
def test_training_alone_does_not_do_that():
    made = model()
    DistanceHardening(epochs=20, batch_size=16, rate=0.05, fit_steps=1)(made, labeled(), run())
    assert rates(made)[1] > 0.8


def test_hardening_again_gives_the_same_bits():
    few = DistanceHardening(epochs=2, batch_size=16, rate=0.05, fit_steps=6)
    one, again, other = model(), model(), model()
    for made, seed in ((one, 0), (again, 0), (other, 1)):
        few(made, labeled(), run(seed))
    weights = [made.network[1].weight for made in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("labels", [None, torch.zeros(48, dtype=torch.int64)])
def test_distances_need_two_classes(labels):
    with pytest.raises(Refused, match="at least two classes"):
        QUICK(model(), ImageSet(labeled().images, labels), run())
