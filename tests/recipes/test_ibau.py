"""I-BAU: the hypergradient against a problem that is solved on paper, and a perturbation that moves answers."""

from functools import partial

import pytest
import torch
from recipes.planted import accuracy, arch, cleansed, labeled, run, suspect
from torch import nn

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.recipes.ibau import IBAU, with_implicit_gradient

RATE = 0.1


def quadratic():
    """min over p of p'Ap/2 - p'Bw, whose answer is p = A^-1 B w; the outer loss is |p - t|^2 / 2 + c'w."""
    generator = torch.Generator().manual_seed(0)
    root, b, w, t, c = (
        torch.randn(*size, generator=generator) for size in ((4, 4), (4, 3), (3,), (4,), (3,))
    )
    return root @ root.T + torch.eye(4), b, w.requires_grad_(True), t, c


def hypergradient(iterations):
    a, b, w, t, c = quadratic()
    p = torch.linalg.solve(a, b @ w).detach().requires_grad_(True)
    outer = ((p - t) ** 2).sum() / 2 + c @ w
    mapped = p - RATE * (a @ p - b @ w)
    loss = with_implicit_gradient(outer, mapped, p, [w], iterations)
    assert torch.equal(loss, outer)
    return torch.autograd.grad(loss, w)[0]


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_so_many_iterations_are_so_many_terms_of_the_series(iterations):
    a, b, w, t, c = quadratic()
    p = torch.linalg.solve(a, b @ w).detach()
    step = torch.eye(4) - RATE * a
    v = sum((torch.linalg.matrix_power(step, k) @ (p - t) for k in range(iterations)), torch.zeros(4))
    assert torch.allclose(hypergradient(iterations), c + RATE * b.T @ v, atol=1e-5)


def test_the_hypergradient_converges_to_that_of_the_solved_problem():
    a, b, w, t, c = quadratic()
    solution, w = torch.linalg.solve(a, b), w.detach()
    true = c + solution.T @ (solution @ w - t)
    errors = [float((hypergradient(n) - true).norm()) for n in (0, 5, 50, 500)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 < errors[1]


def test_the_perturbation_that_is_found_moves_answers():
    model, images = suspect(), labeled(640)
    recipe = IBAU(batch_size=32, search_rate=100)
    found = recipe.search(
        partial(run().forward, model), images.images, torch.Generator().manual_seed(0), run()
    )
    assert found.shape == (1, 3, 8, 8)
    moved = model(images.images.float() / 255 + found).argmax(1) != images.labels
    assert accuracy(model) == 1 and float(moved.float().mean()) > 0.3
    shorter = IBAU(batch_size=32, search_rate=100, penalty=4e-3)
    less = shorter.search(
        partial(run().forward, model), images.images, torch.Generator().manual_seed(0), run()
    )
    assert less.norm() < found.norm()


def test_the_first_step_is_along_the_hypergradient(monkeypatch):
    """Written out: plain gradients of both losses, the second derivatives by rows of a Jacobian."""
    seen = []

    class Watched(torch.optim.SGD):
        def __init__(self, parameters, rate):
            super().__init__(parameters, 1e-9)

        def step(self, closure=None):
            seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, 4), nn.Tanh(), nn.Linear(4, 2))
    model = Classifier(layers, parse_preprocess("none")).eval()
    few = ImageSet(labeled(8).images[:, :, :2, :2].contiguous(), labeled(8).labels, ("red", "green"))
    recipe = IBAU(rounds=1, batch_size=8, portion=1.0, fixed_points=3, search_rate=5.0)
    recipe(model, arch(), few.unlabeled(), few, run())

    weights = list(model.parameters())
    pixels, labels = few.images.float() / 255, few.labels
    forward = lambda x: model(x)  # noqa: E731
    found = recipe.search(forward, few.images, torch.Generator().manual_seed(0), run())

    def outer(p):
        return nn.functional.cross_entropy(model(pixels + p.view(1, 3, 2, 2)), labels)

    def mapped(p):
        slope = torch.autograd.grad(recipe.penalty * p.square().sum() - outer(p), p, create_graph=True)[0]
        return p - recipe.map_rate * slope

    p = found.flatten().requires_grad_(True)
    rows = [torch.autograd.grad(m, p, retain_graph=True)[0] for m in mapped(p)]
    jacobian = torch.stack(rows)
    slope = torch.autograd.grad(outer(p), p)[0]
    v = slope + slope @ jacobian + slope @ jacobian @ jacobian
    direct = torch.autograd.grad(outer(p), weights)
    through = [torch.autograd.grad(m, weights, retain_graph=True) for m in mapped(p)]
    for k, (got, plain) in enumerate(zip(seen[0], direct, strict=True)):
        expected = plain + sum(v[j] * through[j][k] for j in range(len(v)))
        assert torch.allclose(got, expected, atol=1e-6), k
        assert not torch.allclose(got, plain, atol=1e-6)


def test_batch_norm_keeps_the_suspects_statistics():
    made = cleansed(IBAU(batch_size=32, rounds=2))
    assert torch.equal(made.network[1].running_mean, suspect().network[1].running_mean)
    assert accuracy(made) == 1


class Odd(nn.Module):
    """As it was, with an operation whose derivative PyTorch cannot differentiate."""

    def forward(self, x):
        flat = x.flatten(1)
        return x + nn.functional.multi_margin_loss(flat, torch.zeros(len(x), dtype=torch.int64)) / 1e6


def test_a_network_that_cannot_be_differentiated_twice_is_refused():
    model = suspect()
    model.network[2] = Odd()
    with pytest.raises(Refused, match="ibau differentiates a network twice, and planted has an operation"):
        IBAU()(model, arch(), labeled().unlabeled(), labeled(), run())
