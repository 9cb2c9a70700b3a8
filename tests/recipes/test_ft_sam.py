"""FT-SAM: the step up written out, the whole of a training step, and whose statistics batch norm keeps."""

import copy

import pytest
import torch
from recipes.planted import accuracy, arch, cleansed, labeled, run, suspect
from torch.nn import functional as F

from bdclean.recipes.ft_sam import FTSAM, climb


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in ((3, 4), (5,), (2, 2, 2))]


@pytest.mark.parametrize("rho", [0.0, 0.5, 2.0])
def test_the_step_up_is_as_long_as_it_may_be_and_along_the_slope(rho):
    weights, slopes = drawn(0), drawn(1)
    steps = [up - w for up, w in zip(climb(weights, slopes, rho), weights, strict=True)]
    length = sum(float(((w * g) ** 2).sum()) for w, g in zip(weights, slopes, strict=True)) ** 0.5
    for w, g, e in zip(weights, slopes, steps, strict=True):
        assert torch.allclose(e, rho * w * w * g / length, atol=1e-5)
    relative = torch.cat([(e / w).flatten() for e, w in zip(steps, weights, strict=True)])
    assert float(relative.norm()) == pytest.approx(rho, abs=1e-4)
    gain = sum(float((e * g).sum()) for e, g in zip(steps, slopes, strict=True))
    assert gain == pytest.approx(rho * length, rel=1e-4)  # no step under the bound gains more


def test_a_slope_of_zeros_moves_nothing():
    weights = drawn(0)
    assert all(map(torch.equal, climb(weights, [torch.zeros_like(w) for w in weights], 2.0), weights))


def test_a_training_step_is_the_published_one(monkeypatch):
    """In place, as the authors' optimiser does it: up along the gradient, the gradient there, back, a step down."""
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    monkeypatch.setattr("bdclean.recipes.ft_sam.choose_augmentation", lambda *_: _Plain())
    images, n = labeled(16), 16
    recipe = FTSAM(epochs=1, batch_size=n, rho=0.7, smoothing=0.2)
    recipe(suspect(), arch(), images.unlabeled(), images, run())

    model = copy.deepcopy(suspect()).train()
    target = F.one_hot(images.labels, 2) * 0.8 + (1 - F.one_hot(images.labels, 2)) * 0.2  # two classes
    weights = list(model.parameters())

    def slopes():
        loss = -(target * model(images.images).log_softmax(1)).sum(1).mean()
        return torch.autograd.grad(loss, weights)

    first = slopes()
    length = torch.stack([(w * g).norm() for w, g in zip(weights, first, strict=True)]).norm()
    with torch.no_grad():
        for w, g in zip(weights, first, strict=True):
            w.add_(0.7 * w**2 * g / length)
    for got, expected in zip(seen[0], slopes(), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)
    head = list(dict(model.named_parameters())).index("network.5.weight")
    assert not torch.allclose(seen[0][head], first[head], atol=1e-3)


class _Plain:
    def __call__(self, images, generator):
        return images

    def describe(self):
        return "as they are"


def test_batch_norm_has_the_statistics_of_the_network_that_is_kept():
    still = {"epochs": 4, "batch_size": 16, "rate": 1e-12, "weight_decay": 0.0}
    near, far = (cleansed(FTSAM(rho=rho, **still)).network[1] for rho in (1e-6, 5.0))
    assert torch.allclose(near.running_mean, far.running_mean, atol=1e-6)
    assert torch.equal(near.num_batches_tracked, far.num_batches_tracked)
    assert not torch.allclose(near.running_mean, suspect().network[1].running_mean, atol=1e-6)


def test_accuracy_is_kept():
    assert accuracy(cleansed(FTSAM(epochs=20, batch_size=32))) == 1
