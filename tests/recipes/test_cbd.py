"""Contrastive backdoor defence: what its adversaries do, and what is kept."""

import torch
from recipes import planted

from bdclean.recipes.cbd import CBD
from bdclean.training.losses import nt_xent

PIXELS = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def features(pixels):
    """The mean of each quarter of each colour."""
    found = torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)
    return found, found


def test_adversaries_lose_their_picture_within_the_budget():
    recipe = CBD(budget=0.05, adversary_steps=4)
    found = recipe.perturbation(features, PIXELS, torch.Generator().manual_seed(1))
    assert float(found.abs().max()) <= 0.05 + 1e-6 and not found.requires_grad
    assert 0 <= float((PIXELS + found).min()) and float((PIXELS + found).max()) <= 1
    noise = torch.empty_like(PIXELS).uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(2))
    lost, by_chance = (nt_xent(features(PIXELS + each)[0], features(PIXELS)[0]) for each in (found, noise))
    assert lost > by_chance


def test_the_network_keeps_its_answers_and_moves():
    before = planted.suspect()
    made = planted.cleansed(CBD(epochs=3, batch_size=16, adversary_steps=2))
    assert planted.accuracy(made) >= 0.9
    assert not torch.equal(made.network[0].weight, before.network[0].weight)
    assert not made.network[0]._forward_pre_hooks and not made.network[5]._forward_pre_hooks
