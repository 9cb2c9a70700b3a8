"""Estimates of the mutual information between a stage's maps and the features, from below or above, in nats.

Each is a small network trained on some images and read off on others: read off on its own, the bound over-fits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN, RATE, DECAY, BATCH = 512, 1e-3, 1e-5, 128
HELD_OUT, AVERAGED = 0.2, 10
"""The share of images that estimates are read off on; a mean over the last so many epochs, as in MIMIC's code."""


class Statistic(nn.Module):
    """T(h, z) of the Donsker-Varadhan bound, of pairs [n]: the sizes of MIMIC's code (arXiv 2406.03508)."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(first + second, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
        )  # fmt: skip

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        return self.layers(torch.cat([h, z], 1)).squeeze(1)


class Separable(nn.Module):
    """The score of all pairs, [n n], for InfoNCE (van den Oord et al. 2018, arXiv 1807.03748)."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(first, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 64))
        self.right = nn.Sequential(nn.Linear(second, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 64))

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        return self.left(h) @ self.right(z).T / 8


class Gaussian(nn.Module):
    """The mean and log variance of z given h, each [n d], for CLUB (Cheng et al. 2020, arXiv 2006.12013)."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(first, HIDDEN), nn.ReLU())
        self.mean, self.spread = nn.Linear(HIDDEN, second), nn.Linear(HIDDEN, second)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        """The log density of every z [n] under every h [n], a row for each h, [n n], but for a constant."""
        hidden = self.body(h)
        mean, spread = self.mean(hidden)[:, None], self.spread(hidden).tanh()[:, None]
        return -((z[None] - mean).square() / spread.exp() + spread).sum(2) / 2


def donsker_varadhan(net: nn.Module, h: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
    """E[T] - log E[exp T'], T' of pairs that were exchanged: a lower bound of the mutual information."""
    exchanged = z[torch.randperm(len(z), generator=generator).to(z.device)]
    return net(h, z).mean() - (torch.logsumexp(net(h, exchanged), 0) - math.log(len(z)))


def info_nce(net: nn.Module, h: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
    """log n less the cross-entropy of finding the partner among n: a lower bound, at most log n."""
    scores = net(h, z)
    return math.log(len(h)) - F.cross_entropy(scores, torch.arange(len(h), device=h.device))


def club(net: nn.Module, h: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
    """The mean log density of partners less that of all pairs: an upper bound where the density is right."""
    density = net(h, z)
    return density.diagonal().mean() - density.mean()


ESTIMATORS = {"dv": (Statistic, donsker_varadhan), "infonce": (Separable, info_nce), "club": (Gaussian, club)}


def mutual_information(
    h: Tensor, z: Tensor, kind: str, epochs: int, seed: int
) -> float:  # fmt: skip
    """The mutual information of rows of `h` [n a] and `z` [n b] in nats, at least 0; `kind` is dv, infonce or club.

    NaN and negative estimates of an epoch count as 0, as in MIMIC's code.
    """
    make, estimate = ESTIMATORS[kind]
    generator = torch.Generator().manual_seed(seed)
    h, z = ((x - x.mean(0)) / x.std(0).clamp_min(1e-6) for x in (h.float(), z.float()))
    order = torch.randperm(len(h), generator=generator)
    held = max(2, round(HELD_OUT * len(h)))
    test, train = order[:held], order[held:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make(h.shape[1], z.shape[1]).to(h.device)
    optimiser = torch.optim.Adam(net.parameters(), RATE, weight_decay=DECAY)
    found = []
    for epoch in range(epochs):
        for part in train[torch.randperm(len(train), generator=generator)].split(BATCH):
            if len(part) < 2:
                continue
            # CLUB's density is fitted to partners; the others are bounds that are raised.
            loss = -(
                net(h[part], z[part]).diagonal().mean()
                if kind == "club"
                else estimate(net, h[part], z[part], generator)
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if epoch >= epochs - AVERAGED:
            with torch.no_grad():
                found.append(float(estimate(net, h[test], z[test], generator)))
    finite = [value if math.isfinite(value) and value > 0 else 0.0 for value in found]
    return sum(finite) / max(1, len(finite))
