"""Shared adversarial unlearning: its losses written out, what its perturbations do, a planted backdoor."""

import math

import pytest
import torch
from recipes.planted import accuracy, cleansed, fooled, labeled, suspect
from scipy.spatial.distance import jensenshannon

from bdclean.recipes.sau import SAU, jensen_shannon, unlearning_loss

N, CLASSES = 40, 5


def logits(seed, scale=3.0):
    return scale * torch.randn(N, CLASSES, generator=torch.Generator().manual_seed(seed))


def test_the_divergence_is_scipys_distance_squared_and_within_its_bounds():
    first, second = logits(0), logits(1)
    found = jensen_shannon(first, second)
    p, q = first.softmax(1).numpy(), second.softmax(1).numpy()
    assert found.numpy() == pytest.approx(jensenshannon(p, q, axis=1) ** 2, abs=1e-5)
    assert torch.allclose(found, jensen_shannon(second, first), atol=1e-6)
    assert bool((found >= 0).all()) and float(jensen_shannon(first, first).abs().max()) < 1e-6
    opposite = 50 * torch.eye(2)
    assert jensen_shannon(opposite, opposite.flip(0)).numpy() == pytest.approx(math.log(2), abs=1e-4)


def test_the_unlearning_loss_is_that_of_the_class_that_is_taken_away():
    given, led = logits(2, 0.5), torch.arange(N) % CLASSES
    counted = torch.arange(N) % 3 > 0
    probabilities = given.softmax(1)
    slow = -sum(math.log(1 - float(probabilities[k, led[k]])) for k in range(N) if counted[k]) / N
    assert float(unlearning_loss(given, led, counted)) == pytest.approx(slow, rel=1e-4)
    assert float(unlearning_loss(given, led, torch.zeros(N, dtype=torch.bool))) == 0


def test_an_image_whose_class_is_gone_gives_no_gradient():
    led = torch.zeros(2, dtype=torch.int64)
    given = torch.tensor([[-9.0, 9.0], [1.0, 0.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(unlearning_loss(given, led, torch.ones(2, dtype=torch.bool)), given)
    assert not slope[0].any() and slope[1, 0] > 0
    certain = unlearning_loss(torch.tensor([[99.0, 0.0]]), led[:1], torch.ones(1, dtype=torch.bool))
    assert math.isfinite(float(certain)) and float(certain) > 5


def test_perturbations_lead_both_networks_to_a_shared_wrong_class_within_the_budget():
    teacher, student = suspect(), suspect()
    with torch.no_grad():
        student.network[5].weight.add_(0.1)
    images = labeled()
    pixels = images.images.float() / 255
    for budget in (0.05, 0.4):
        recipe = SAU(budget=budget, adversary_rate=budget, adversary_steps=10)
        found = recipe.perturbation(student, teacher, pixels, images.labels)
        assert not found.requires_grad and float(found.abs().max()) <= budget + 1e-6
        answers = [model(pixels + found).argmax(1) for model in (student, teacher)]
        shared = (answers[0] == answers[1]) & (answers[0] != images.labels)
        share = float(shared.float().mean())
        assert share > 0.4 if budget == 0.4 else share == 0


def test_a_planted_backdoor_is_unlearnt_and_by_clean_images_alone_is_not():
    recipe = {"epochs": 20, "batch_size": 32, "rate": 0.01}
    assert (accuracy(suspect()), fooled(suspect())) == (1, 1)
    unlearnt, tuned = cleansed(SAU(**recipe)), cleansed(SAU(**recipe, unlearning_weight=0))
    assert accuracy(unlearnt) == accuracy(tuned) == 1
    assert fooled(unlearnt) < 0.1 and fooled(tuned) > 0.9
    norm = unlearnt.network[1]
    assert torch.equal(norm.running_mean, suspect().network[1].running_mean)
