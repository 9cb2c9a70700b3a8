"""Probes: small heads on an encoder's frozen features, and the features themselves, computed once for each image.

The features are the encoder's output, scaled to length one (BadEncoder's protocol, arXiv 2108.00352). Heads are trained
on clean images alone, anew for each encoder.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.errors import Unusable
from bdclean.measuring.predictor import Predictor
from bdclean.training.linear_head import logistic_regression
from bdclean.training.pretraining.knn import NEIGHBOURS
from bdclean.training.pretraining.knn import knn as vote

Head = Callable[[Tensor], Tensor]
"""Features [n d] of length one -> classes int64 [n]."""

REMEMBERED = 256 << 20
"""Bytes of features that are kept: enough for all probes to see a trigger's images after the first one has."""
SEEDS = 3
"""Of the probe whose training is drawn."""

MLP_STEPS, MLP_BATCH, MLP_RATE = 3_000, 64, 1e-3
"""BadEncoder trains 500 epochs at 1e-4, which is 39,000 steps with 5,000 images; a one-cycle rate needs fewer."""

KNN_TEMPERATURE = 0.5
"""BadEncoder's. Of NEIGHBOURS there are at most as many as half a class has, or those of others would outvote it."""


@dataclass
class Features:
    """Features of length one, float32 [n d] on the CPU, of an encoder; of images seen lately they are remembered."""

    encode: Predictor
    remembered: OrderedDict[bytes, Tensor] = field(default_factory=OrderedDict)
    held: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Raises Unusable where features are no numbers."""
        key = hashlib.blake2b(images.contiguous().numpy().data, digest_size=16).digest()
        if key in self.remembered:
            self.remembered.move_to_end(key)
            return self.remembered[key]
        found = self.fresh(images)
        self.remembered[key] = found
        self.held += found.numel() * 4
        while self.held > REMEMBERED and len(self.remembered) > 1:
            _, oldest = self.remembered.popitem(last=False)
            self.held -= oldest.numel() * 4
        return found

    def fresh(self, images: Tensor) -> Tensor:
        """The same, not remembered: for images that are seen once."""
        return F.normalize(self.encode.outputs(images).flatten(1), dim=1)


@dataclass(frozen=True)
class Probing:
    """What probes are trained on: clean images uint8 [n c h w] with their classes, or the suspect's own clusters."""

    images: Tensor
    targets: Tensor
    classes: int
    labeled: bool


@dataclass(frozen=True)
class Encoded:
    """An encoder's features and the heads on them: `first` decides rows, the rates of `others` are shown beside."""

    features: Features
    probing: Probing
    first: Head
    others: Mapping[str, Head]

    @staticmethod
    def of(features: Features, probing: Probing) -> Encoded:
        """With labels a linear probe, BadEncoder's from SEEDS seeds, and nearest neighbours; else cluster means."""
        known, targets, classes = features(probing.images), probing.targets, probing.classes
        check_features(known)
        if not probing.labeled:
            return Encoded(features, probing, nearest_mean(known, targets, classes), {})
        others = {f"mlp/{seed}": mlp(known, targets, classes, seed) for seed in range(SEEDS)}
        others["knn"] = knn(known, targets, classes)
        return Encoded(features, probing, linear(known, targets, classes), others)

    @property
    def predict(self) -> Probe:
        return Probe(self.features, self.first)


@dataclass(frozen=True)
class Probe:
    """Class predictions, int64 [n], of `head` on an encoder's features of images uint8 [n c h w]."""

    features: Features
    head: Head

    def __call__(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def check_features(features: Tensor) -> None:
    """Raises Unusable where all images have the same features [n d]: there is nothing to tell them apart by."""
    if float((features - features[:1]).abs().max()) < 1e-6:
        raise Unusable(
            "the encoder gives every image the same features: it is no encoder, is broken, or is normalised wrongly; "
            "if --preprocess was given, try another."
        )


@dataclass(frozen=True)
class Standardised:
    """A linear or small network on features whose mean and spread are taken out."""

    mean: Tensor
    spread: Tensor
    network: Callable[[Tensor], Tensor]

    def __call__(self, features: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network((features - self.mean) / self.spread).argmax(1)


def linear(features: Tensor, labels: Tensor, classes: int) -> Head:
    """Multinomial logistic regression on standardised `features` [n d], fitted to the end: nothing of it is drawn."""
    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - mean) / spread
    weight, bias = logistic_regression(x, labels, classes)
    return Standardised(mean, spread, lambda z: F.linear(z, weight, bias))


def mlp(features: Tensor, labels: Tensor, classes: int, seed: int) -> Head:
    """BadEncoder's head: 512 and 256 hidden units, dropout of half between them, on features of length one.

    Departures: shuffled batches, and MLP_STEPS steps of Adam with a one-cycle rate.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second, third = nn.Linear(features.shape[1], 512), nn.Linear(512, 256), nn.Linear(256, classes)
    network = nn.Sequential(first, nn.ReLU(), nn.Identity(), second, nn.ReLU(), third)
    optimiser = torch.optim.Adam(network.parameters(), MLP_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, MLP_RATE, MLP_STEPS)
    for _ in range(MLP_STEPS):
        drawn = torch.randint(len(features), (MLP_BATCH,), generator=generator)
        hidden = first(features[drawn]).relu()
        # Dropout from a generator of its own: a run draws the same with or without it.
        hidden = hidden * (torch.rand(hidden.shape, generator=generator) < 0.5) * 2
        loss = F.cross_entropy(third(second(hidden).relu()), labels[drawn])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.requires_grad_(False)
    return lambda z: network(z).argmax(1)


def knn(features: Tensor, labels: Tensor, classes: int) -> Head:
    """The nearest images' classes, each weighed by exp(cosine / KNN_TEMPERATURE) (Wu et al. 2018, arXiv 1805.01978)."""
    k = max(1, min(NEIGHBOURS, len(features) // (2 * classes)))
    return lambda z: vote(features, labels, z, classes, k, KNN_TEMPERATURE)


def nearest_mean(features: Tensor, groups: Tensor, count: int) -> Head:
    """The group [n] whose mean is nearest by cosine, once the mean of all `features` [n d] is taken out."""
    centre = features.mean(0)
    centred = F.normalize(features - centre, dim=1)
    means = torch.zeros(count, features.shape[1]).index_add(0, groups, centred)
    means = F.normalize(means, dim=1)
    return lambda z: (F.normalize(z - centre, dim=1) @ means.T).argmax(1)
