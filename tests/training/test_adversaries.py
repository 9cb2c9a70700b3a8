import pytest
import torch
from torch import nn

from bdclean.training import adversaries
from bdclean.training.adversaries import KINDS, LOW, PATTERN, attack, worst_counterfeit
from bdclean.training.losses import divergence


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    model[1].weight.data *= 4
    return model


def images(n=12):
    small = torch.rand((n, 3, 4, 4), generator=seeded(2)) * 0.6 + 0.2
    return nn.functional.interpolate(small, (16, 16), mode="bilinear")


def harm(model, kind, seed, steps):
    pixels = images()
    answers = model(pixels).softmax(1).detach()
    out = attack(kind, model, pixels, answers, seeded(seed), steps)
    return divergence(model(out), answers).mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_searching_harms_more_than_drawing_at_random(kind):
    model = linear()
    pairs = [(harm(model, kind, seed, 3), harm(model, kind, seed, 0)) for seed in range(8)]
    found, drawn = (sum(values) / len(values) for values in zip(*pairs, strict=True))
    assert found > drawn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_budgets_are_kept(kind, steps):
    model, pixels = linear(), images()
    kept, weights = pixels.clone(), model[1].weight.clone()
    answers = model(pixels).softmax(1).detach()
    out = attack(kind, model, pixels, answers, seeded(), steps)
    assert out.shape == pixels.shape and not out.requires_grad
    assert 0 <= out.min() and out.max() <= 1
    assert torch.equal(pixels, kept) and torch.equal(model[1].weight, weights)
    assert model[1].weight.grad is None  # the student gets no gradient
    assert torch.equal(out, attack(kind, model, pixels, answers, seeded(), steps))
    change = out - pixels
    if kind == "pattern":
        assert change.abs().max() <= PATTERN + 1e-6
    if kind == "low":
        assert change.abs().max() <= LOW + 1e-6
    if kind == "patch":
        rows, columns = (change.abs().amax((0, 1)) > 0).nonzero().unbind(1)
        assert rows.max() - rows.min() < 8 and columns.max() - columns.min() < 8
    if kind == "warp":  # moves pixels by at most about 1.5 of 32, so less than one of 16
        steep = pixels.diff(dim=2).abs().max() + pixels.diff(dim=3).abs().max()
        assert change.abs().max() <= 1.5 * steep


@pytest.mark.parametrize("kind", ["pattern", "low"])
def test_one_perturbation_is_shared_by_the_batch(kind):
    model, pixels = linear(), images() * 0.5 + 0.25  # nothing is clamped
    change = attack(kind, model, pixels, model(pixels).softmax(1).detach(), seeded()) - pixels
    assert torch.allclose(change, change[:1].expand_as(change), atol=1e-6)


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="patch, pattern"):
        adversaries.attack("glue", linear(), images(), torch.ones(12, 5) / 5, seeded())


def stripes(x):
    """Logits that stripes along the columns of about six periods, whatever their phase, turn from class 0 to 1."""
    columns = torch.linspace(0, 1, x.shape[3])
    waves = torch.stack([torch.sin(2 * torch.pi * 6 * columns), torch.cos(2 * torch.pi * 6 * columns)])
    strength = ((x - x.mean()).mean((1, 2)) @ waves.T / x.shape[3]).norm(dim=1)
    return torch.stack([torch.full_like(strength, 1.0), 400 * (strength - 0.012)], 1)


def test_draws_come_by_a_trigger_that_acts_only_as_a_whole():
    pixels = images(32)
    answers = stripes(pixels).softmax(1)
    assert float(answers[:, 0].min()) > 0.9

    def sent(found):
        return float((stripes(found).argmax(1) == 1).float().mean())

    def search(seed, draws=24):
        return worst_counterfeit(stripes, pixels, answers, ["wave", "tone"], seeded(seed), draws=draws)

    drawn = [search(seed) for seed in range(10)]
    assert all(found.shape == pixels.shape and 0 <= found.min() and found.max() <= 1 for found in drawn)
    assert sum(sent(found) > 0.9 for found in drawn) >= 6
    assert sum(sent(search(seed, draws=1)) > 0.9 for seed in range(10)) <= 2
    assert torch.equal(search(0), drawn[0])


def test_the_class_that_a_counterfeit_draws_images_to_is_told():
    gains = adversaries.attraction(stripes, images(16), ["wave"], seeded())
    assert gains.shape == (2,) and gains[1] > 0.5 > gains[0]
    assert float(adversaries.attraction(stripes, images(16), ["tone"], seeded())[1]) < 0.1
    assert torch.equal(gains, adversaries.attraction(stripes, images(16), ["wave"], seeded()))
