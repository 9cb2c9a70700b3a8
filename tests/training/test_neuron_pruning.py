"""Adversarial neuron pruning: perturbed norms written out, and a planted neuron whose mask falls first."""

import copy

import pytest
import torch
from torch import nn

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.training.neuron_pruning import NeuronPruning, scaled_norms, scaling
from bdclean.training.pruning import pruned_channels
from bdclean.training.run import Precision, Run

PLANTED = 3


def run(seed=0):
    return Run(torch.device("cpu"), Precision(), seed)


def labeled(n=48):
    """Pictures of two classes, red and green."""
    pixels = torch.randint(80, (n, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels = torch.arange(n) % 2
    pixels[torch.arange(n), labels] += 120
    return ImageSet(pixels, labels, ("red", "green"))


def model(out=20.0):
    """Channels 0 and 1 tell the classes; the planted one is silent on these images and would send all to class 0."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip
    conv, norm, head = network[0], network[1], network[5]
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 1], [0, 0, 1]]).view(4, 3, 1, 1))
        norm.weight.fill_(1.0)
        norm.weight[PLANTED], norm.bias[PLANTED] = 1.0, -2.5
        head.weight.zero_(), head.bias.zero_()
        head.weight[0, 0] = head.weight[1, 1] = 2.0
        head.weight[0, PLANTED] = out
    made = Classifier(network, parse_preprocess("none"))
    norm.momentum = None
    made.train()(labeled().images)
    norm.momentum = 0.1
    return made.eval()


def masks_of(method, made, seed=0):
    """Of the one norm."""
    ((masks,), curve) = method.masks(made, labeled(), run(seed), "masks")
    assert curve[-1]["step"] == method.steps
    return masks


def state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("training", [False, True])
def test_scales_and_shifts_are_multiplied(training):
    made, pixels = model().train(training), labeled().images
    scale, shift = torch.tensor([0.5, 1.2, 0.0, 2.0]), torch.tensor([1.0, 0.7, 2.0, 0.3])
    other = copy.deepcopy(made)
    with torch.no_grad():
        other.network[1].weight *= scale
        other.network[1].bias *= shift
    with scaling(scaled_norms(made), [(scale, shift)]):
        inside = made(pixels)
    assert torch.allclose(inside, other(pixels), atol=1e-4)
    assert torch.equal(made.eval()(pixels), model()(pixels)) or training


def test_the_mask_of_a_planted_neuron_falls_first():
    made = model()
    before = state(made)
    masks = masks_of(NeuronPruning(steps=40, batch_size=16), made)
    assert masks.argmin() == PLANTED and masks[PLANTED] < 0.3 < masks[:2].min()
    assert bool((masks >= 0).all() and (masks <= 1).all())
    after = state(made)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_masks_are_repeatable():
    short = NeuronPruning(steps=10, batch_size=16, rate=0.02)
    one, again, other = (masks_of(short, model(), seed) for seed in (1, 1, 0))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_without_a_perturbation_nothing_falls():
    masks = masks_of(NeuronPruning(steps=20, batch_size=16, budget=0.0), model())
    assert masks.min() > 0.9


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 1), (0.5, 2)])
def test_a_share_is_pruned_smallest_masks_first(share, count):
    made, was = model(), model()
    NeuronPruning(share, steps=40, batch_size=16)(made, labeled(), run())
    dead = (made.network[1].weight == 0).nonzero()[:, 0].tolist()
    assert len(dead) == count == pruned_channels(was, made) and (not count or PLANTED in dead)
    assert torch.equal(made.network[1].bias, was.network[1].bias) and not made.training


def test_the_largest_threshold_that_accuracy_allows():
    made = model()
    NeuronPruning(steps=40, batch_size=16)(made, labeled(), run())
    assert made.network[1].weight[PLANTED] == 0
    assert float((made(labeled().images).argmax(1) == labeled().labels).float().mean()) > 0.9


def test_a_network_without_batch_norm_is_refused():
    plain = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), parse_preprocess("none"))
    with pytest.raises(Refused, match="needs batch norm"):
        NeuronPruning(steps=2)(plain, labeled(), run())
