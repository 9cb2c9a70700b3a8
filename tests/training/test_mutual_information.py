"""Estimates of mutual information: their equations written out, and Gaussians whose information is known."""

import math

import pytest
import torch

from bdclean.training.mutual_information import (
    ESTIMATORS,
    Gaussian,
    Separable,
    Statistic,
    club,
    donsker_varadhan,
    info_nce,
    mutual_information,
)

IMAGES, WIDTH = 1500, 4


def gaussians(rho, seed=0):
    """Rows whose `WIDTH` dimensions are correlated by `rho` in pairs: -WIDTH / 2 log(1 - rho^2) nats."""
    g = torch.Generator().manual_seed(seed)
    h, other = torch.randn(2, IMAGES, WIDTH, generator=g)
    return h, rho * h + math.sqrt(1 - rho**2) * other


def truth(rho):
    return -WIDTH / 2 * math.log(1 - rho**2)


def estimate(rho, kind, epochs=5, seed=0):
    return mutual_information(*gaussians(rho), kind, epochs, seed)


class Known(torch.nn.Module):
    """A score of pairs that needs no training: rows [n], or all pairs [n n]."""

    def __init__(self, all_pairs):
        super().__init__()
        self.all_pairs = all_pairs

    def forward(self, h, z):
        return h @ z.T if self.all_pairs else (h * z).sum(1)


def few(n=6):
    h, z = gaussians(0.5)
    return h[:n], z[:n]


def score(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def test_donsker_varadhan_is_the_equation():
    h, z = few()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    together = sum(score(h[k], z[k]) for k in range(6)) / 6
    exchanged = sum(math.exp(score(h[k], z[order[k]])) for k in range(6)) / 6
    found = donsker_varadhan(Known(False), h, z, torch.Generator().manual_seed(3))
    assert float(found) == pytest.approx(together - math.log(exchanged), rel=1e-5)


def test_info_nce_is_the_equation_and_at_most_the_logarithm_of_the_batch():
    h, z = few()
    total = 0.0
    for k in range(6):
        total += score(h[k], z[k]) - math.log(sum(math.exp(score(h[k], z[j])) for j in range(6)) / 6)
    found = info_nce(Known(True), h, z, torch.Generator())
    assert float(found) == pytest.approx(total / 6, rel=1e-4)
    certain = 100 * torch.eye(6)
    assert float(info_nce(Known(True), certain, certain, torch.Generator())) == pytest.approx(math.log(6))
    nothing = torch.zeros(6, 6)
    assert float(info_nce(Known(True), nothing, nothing, torch.Generator())) == pytest.approx(0, abs=1e-6)


def test_club_is_the_equation():
    h, z = few()
    partners = sum(score(h[k], z[k]) for k in range(6)) / 6
    everyone = sum(score(a, b) for a in h for b in z) / 36
    assert float(club(Known(True), h, z, torch.Generator())) == pytest.approx(partners - everyone, rel=1e-4)


def test_networks_give_a_score_for_a_pair_or_for_all_pairs():
    h, z = few()
    assert Statistic(WIDTH, WIDTH)(h, z).shape == (6,)
    assert Separable(WIDTH, WIDTH)(h, z).shape == (6, 6)
    net = Gaussian(WIDTH, WIDTH).requires_grad_(False)
    found = net(h, z)
    hidden = net.body(h)
    for k in range(6):
        for j in range(6):
            variance = net.spread(hidden[k]).tanh().exp()
            density = torch.distributions.Normal(net.mean(hidden[k]), variance.sqrt()).log_prob(z[j]).sum()
            expected = float(density) + WIDTH / 2 * math.log(2 * math.pi)
            assert float(found[k, j]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("rho", [0.5, 0.8])
@pytest.mark.parametrize("kind", ["dv", "infonce"])
def test_lower_bounds_come_near_the_truth_and_stay_below(kind, rho):
    assert 0.65 * truth(rho) < estimate(rho, kind) < 1.05 * truth(rho)


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_the_upper_bound_is_the_one_of_a_density_that_is_right(rho):
    # rho^2 / (1 - rho^2) a dimension, worked out by hand; at 0.8 the variance 0.36 just touches its limit, 1 / e.
    assert truth(rho) < estimate(rho, "club")
    assert estimate(rho, "club", 15) == pytest.approx(WIDTH * rho**2 / (1 - rho**2), rel=0.15)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_nothing_is_known_of_independent_rows_and_more_with_correlation(kind):
    found = [estimate(rho, kind) for rho in (0.0, 0.5, 0.8, 0.95)]
    assert 0 <= found[0] < 0.1
    assert all(less + 0.2 < more for less, more in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator(kind):
    before = torch.get_rng_state()
    h, z = gaussians(0.8)
    first = mutual_information(h[:400], z[:400], kind, 2, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert mutual_information(h[:400], z[:400], kind, 2, 0) == first
    assert mutual_information(h[:400], z[:400], kind, 2, 1) != first
    assert torch.equal(h, gaussians(0.8)[0]) and torch.equal(z, gaussians(0.8)[1])


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_scale_and_shift_do_not_count_and_dead_features_do_no_harm(kind):
    h, z = gaussians(0.8)
    h, z = h[:400], z[:400]
    found = mutual_information(h, z, kind, 3, 0)
    assert mutual_information(50 * h + 7, 0.01 * z - 3, kind, 3, 0) == pytest.approx(found, abs=0.02)
    dead = torch.cat([h, torch.full((400, 2), 3.0)], 1)
    assert math.isfinite(mutual_information(dead, z, kind, 3, 0))
    assert mutual_information(torch.zeros(400, 3), z, kind, 3, 0) < 0.05


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_few_images_are_enough_to_say_something(kind):
    h, z = gaussians(0.8)
    for n in (3, 4, 129 * 5 // 4 + 1):  # whose last batch has one or two images
        assert math.isfinite(mutual_information(h[:n], z[:n], kind, 2, 0))
