"""A linear head on an encoder's features: what methods for classifiers need of an encoder."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.training.pretraining.knn import features
from bdclean.training.run import Run

DECAY, ITERATIONS = 1e-3, 100
"""Weight decay of a mean loss on standardised features, and steps of L-BFGS."""

ENCODER = "0"
"""Where the encoder is in the network that `with_head` makes: names of its modules begin so."""


def logistic_regression(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weight [classes d] and bias [classes] for standardised `features` [n d], fitted to the end: nothing is drawn."""
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + DECAY / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weight.detach(), bias.detach()


def with_head(encoder: Classifier, labeled: ImageSet, run: Run) -> Classifier:
    """A classifier, on the run's device and in evaluation mode: a copy of `encoder` and a head fitted to its features.

    Raises Refused where `labeled` has no labels or one class.
    """
    labels = labeled.labels
    if labels is None or len(labels.unique()) < 2:
        raise Refused("a head needs labeled images of at least two classes: give --labeled.")
    inside = copy.deepcopy(encoder).to(run.device).eval().requires_grad_(True)
    found = features(inside, labeled.images, run.device)
    mean, spread = found.mean(0), found.std(0).clamp_min(1e-6)
    weight, bias = logistic_regression((found - mean) / spread, labels, int(labels.max()) + 1)
    head = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight / spread)  # takes features as they are
        head.bias.copy_(bias - head.weight @ mean)
    return Classifier(nn.Sequential(inside.network, head), encoder.preprocess).to(run.device).eval()


def without_head(model: Classifier) -> Classifier:
    """The encoder inside of what `with_head` made, not copied."""
    return Classifier(model.network.get_submodule(ENCODER), model.preprocess).eval()
