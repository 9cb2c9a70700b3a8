"""LMR: which class is taken for the target, its losses written out, and a head whose pruned inputs stay cut off."""

import pytest
import torch
from recipes.planted import accuracy, arch, cleansed, fooled, labeled, run, suspect
from torch.nn import functional as F

from bdclean.recipes.lmr import LMR, cut, forgotten, most_moved

QUICK = {"batch_size": 32, "unlearning_steps": 20, "repulsion_steps": 40, "recovery_steps": 20}


def test_the_loss_is_that_of_the_paper_image_by_image():
    recipe, target = LMR(margin=2.0, repulsion_weight=0.7, own_margin=0.4, own_weight=0.3), 1
    logits = 3 * torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 4
    total = 0.0
    for z, y in zip(logits, labels.tolist(), strict=True):
        rest = [float(z[k]) for k in range(4) if k != target]
        wrong = [float(z[k]) for k in range(4) if k != y]
        if y != target:
            total += float(F.cross_entropy(z, torch.tensor(y)))
            total += 0.7 * max(0.0, float(z[target]) - max(rest) + 2.0)
        total += 0.3 * max(0.0, max(wrong) - float(z[y]) + 0.4)
    assert float(recipe.repulsion_loss(logits, labels, target)) == pytest.approx(total / 30, rel=1e-5)


def test_a_class_that_stays_below_and_images_that_are_right_cost_no_margin():
    recipe = LMR(margin=3.0, own_margin=0.5)
    logits = torch.tensor([[50.0, 0.0, 0.0], [0.0, 0.0, 50.0]])
    assert float(recipe.repulsion_loss(logits, torch.tensor([0, 2]), 1)) == pytest.approx(0, abs=1e-6)


def test_the_inputs_that_moved_most_for_the_target_are_cut():
    before = torch.zeros(3, 10)
    after = before.clone()
    after[1, [2, 7]] = torch.tensor([-5.0, 4.0])
    after[0] = 9.0  # of another class
    assert sorted(most_moved(before, after, 1, 0.2).tolist()) == [2, 7]
    assert len(most_moved(before, after, 1, 0.09)) == 0
    cut(after, torch.tensor([2, 7]))
    assert not after[:, [2, 7]].any() and after[0, 0] == 9


def test_the_class_of_the_backdoor_is_found():
    for target in (0, 1):
        inclined = suspect()
        with torch.no_grad():
            inclined.network[5].bias[target] += 1
        assert accuracy(inclined) == 1
        class_, lead = LMR(**QUICK).target_class(inclined, labeled(), run())
        assert class_ == target and lead > 0.1


def test_which_class_has_more_images_does_not_decide():
    few = labeled()
    many = few.select(torch.cat([(few.labels == 1).nonzero()[:, 0], (few.labels == 0).nonzero()[:8, 0]]))
    assert forgotten(2) == 0.75 and forgotten(10) == pytest.approx(0.2)
    assert LMR(**QUICK).target_class(suspect(), many, run())[1] < 0.6


def test_what_is_cut_off_stays_so_and_accuracy_comes_back():
    recipe = LMR(**QUICK, pruned=0.25)
    made = recipe(suspect(), arch(), labeled().unlabeled(), labeled(), run())
    weight = made.model.network[5].weight.detach()
    assert int((weight == 0).all(0).sum()) == 1 and accuracy(made.model) == 1
    assert "taken for the target" in made.stages[0] and "cut off 1 of the head's 4" in made.stages[2]


def test_the_margin_holds_the_planted_trigger_down():
    assert fooled(suspect()) == 1
    logits = cleansed(LMR(**QUICK, margin=6.0))(labeled().images[1::2]).detach()
    assert float((logits[:, 1] - logits[:, 0]).min()) > 3
