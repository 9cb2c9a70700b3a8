"""Whitened features: the covariance and its shrinking written out, areas, and planted images that crowd."""

import pytest
import torch
from torch import nn

from bdclean.measuring.predictor import Predictor
from bdclean.measuring.probe import Features
from bdclean.measuring.whitening import MANY, area, crowded, stamped_distances
from bdclean.training.whitening import NEIGHBOURS, Whitening, crowding, shrunk_covariance
from bdclean.triggers.badnets import BadNets

WIDTH = 6


def drawn(n, seed=0, scale=None):
    """Gaussian features whose directions are mixed and have unlike spreads."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))
    spreads = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.05]) if scale is None else scale
    return (torch.randn(n, WIDTH, generator=generator) * spreads) @ mixing + 4


def test_the_shrunk_covariance_is_the_written_out_one():
    """Ledoit and Wolf 2004, section 3.3, image by image."""
    features = drawn(40).double()
    n, d = features.shape
    mean = features.mean(0)
    parts = [torch.outer(x - mean, x - mean) for x in features]
    sample = sum(parts) / n
    level = sum(float(sample[k, k]) for k in range(d)) / d
    away = sum(float((sample[i, j] - (level if i == j else 0)) ** 2) for i in range(d) for j in range(d)) / d
    noise = min(sum(float((part - sample).square().sum()) for part in parts) / n**2 / d, away)
    expected = noise / away * level * torch.eye(d, dtype=torch.float64) + (1 - noise / away) * sample
    assert torch.allclose(shrunk_covariance(features), expected, rtol=1e-9)


def test_many_images_are_hardly_shrunk_and_few_are():
    few, many = drawn(4), drawn(20_000)
    truth = torch.cov(many.double().T)
    assert torch.allclose(shrunk_covariance(many), truth, rtol=0.02, atol=0.05)
    assert torch.linalg.eigvalsh(shrunk_covariance(few)).min() > 0  # of rank 3 without


def test_features_that_never_change_can_be_whitened():
    for features in (torch.ones(20, WIDTH), torch.cat([drawn(50)[:, :3], torch.zeros(50, 3)], dim=1)):
        assert Whitening.of(features)(features).isfinite().all()


def test_whitened_features_have_unit_covariance_and_distances_are_mahalanobis():
    features, others = drawn(20_000), drawn(2_000, seed=1)
    whiten = Whitening.of(features)
    assert torch.allclose(torch.cov(whiten(others).T), torch.eye(WIDTH).double(), atol=0.15)
    inverse = torch.linalg.inv(shrunk_covariance(features))
    row = others[3].double() - features.double().mean(0)
    assert float(whiten.distances(others)[3]) == pytest.approx(float((row @ inverse @ row).sqrt()))


def test_an_area_is_the_share_of_pairs():
    positive, negative = torch.tensor([1.0, 3.0, 3.0]), torch.tensor([0.0, 3.0])
    pairs = [1.0 if p > q else 0.5 if p == q else 0.0 for p in positive for q in negative]
    assert area(positive, negative) == pytest.approx(sum(pairs) / 6)
    assert area(torch.ones(2), torch.zeros(3)) == 1 and area(torch.zeros(2), torch.ones(3)) == 0


class Projecting(nn.Module):
    """A random linear encoder; where the corner is white it also gives `kick` along its last feature."""

    def __init__(self, kick):
        super().__init__()
        self.register_buffer("matrix", torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(1)))
        self.kick = kick

    def forward(self, x):
        found = (x.flatten(1).float() / 255 - 0.5) @ self.matrix + 20
        here = (x[:, :, -3:, -3:] == 255).flatten(1).all(1).float()
        return found + self.kick * here[:, None] * nn.functional.one_hot(torch.tensor(WIDTH - 1), WIDTH)


@pytest.mark.parametrize(("kick", "low", "high"), [(0.0, 0.3, 0.7), (200.0, 0.99, 1.0)])
def test_stamped_images_lie_far_where_the_trigger_moves_them(kick, low, high):
    photos = torch.randint(
        256, (300, 3, 10, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    features = Features(Predictor(Projecting(kick), torch.device("cpu")))
    trigger = BadNets(pattern="white")
    (finding,) = stamped_distances(features, photos[:150], photos[150:], [trigger])
    assert low <= finding.score <= high and trigger.spec() in finding.reason
    assert finding.verdict == "reported" and "does not decide the verdict" in finding.reason


def test_crowding_is_the_double_loop():
    first, second = drawn(30), drawn(20, seed=1)
    whiten = Whitening.of(second)
    a, b = whiten(first), whiten(second)
    expected = torch.tensor([sorted(float((x - y).norm()) for y in b)[NEIGHBOURS - 1] for x in a])
    assert torch.allclose(crowding(first, second)[0].float(), expected / expected.median(), atol=1e-4)
    assert torch.equal(crowding(first, second)[1], crowding(second, first)[0])


def test_images_at_one_place_crowd_and_others_do_not():
    """40 features as wide as an encoder's: with few dimensions some of any images are near."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1000, 40, generator=generator)
    calm = crowded(features[:500], features[500:])
    assert calm.verdict == "no-outlier" and calm.score < MANY
    planted = torch.zeros(1000, dtype=torch.bool)
    planted[::50] = True
    features[planted] = torch.randn(1, 40, generator=generator) + 0.1 * features[planted]
    found = crowded(features[:500], features[500:])
    assert found.verdict == "outlier" and found.score == pytest.approx(0.02, abs=0.002)
    near = torch.cat(crowding(features[:500], features[500:]))
    assert near[planted].max() < near[~planted].min()
    assert "does not decide the verdict" in found.reason
