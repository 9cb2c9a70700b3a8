"""A network with a planted backdoor so small that every method's effect on it can be said beforehand."""

import torch
from torch import nn

from bdclean.data.imageset import ImageSet
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.stages import describe
from bdclean.training.run import Precision, Run

PLANTED = 3
"""The channel that looks at blue."""


def run(seed=0):
    return Run(torch.device("cpu"), Precision(), seed)


def labeled(n=64):
    """Red and green pictures without much blue."""
    pixels = torch.randint(60, (n, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels = torch.arange(n) % 2
    pixels[torch.arange(n), labels] += 120
    return ImageSet(pixels, labels, ("red", "green"))


def stamped(n=64, blue=120):
    """Green pictures with more blue, which the backdoor calls red."""
    pixels = labeled(n).images[1::2].clone()
    pixels[:, 2] += blue
    return pixels


def layers():
    return nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip


def suspect():
    """Channels 0 and 1 tell the classes; the planted one is silent on `labeled` and sends blue pictures to red."""
    network = layers()
    conv, norm, head = network[0], network[1], network[5]
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0.1], [0, 0, 1]]).view(4, 3, 1, 1))
        norm.weight.fill_(1.0)
        norm.bias[PLANTED] = -2.0
        head.weight.zero_(), head.bias.zero_()
        head.weight[0, 0] = head.weight[1, 1] = 2.0
        head.weight[0, PLANTED] = 4.0
    made = Classifier(network, parse_preprocess("none"))
    norm.momentum = None
    made.train()(labeled().images)
    norm.momentum = 0.1
    return made.eval()


def arch():
    return describe("planted", layers, (3, 8, 8))


def cleansed(recipe, seed=0):
    """What `recipe` makes of the suspect."""
    return recipe(suspect(), arch(), labeled().unlabeled(), labeled(), run(seed)).model


def accuracy(model):
    return float((model(labeled().images).argmax(1) == labeled().labels).float().mean())


def fooled(model):
    """The share of stamped pictures that are called red."""
    return float((model(stamped()).argmax(1) == 0).float().mean())
