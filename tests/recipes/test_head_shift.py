"""FST and D3: the new head keeps the old one's length and is held off it, as far as the settings say."""

from dataclasses import replace

import pytest
import torch
from recipes.planted import accuracy, arch, cleansed, fooled, labeled, run, suspect
from torch import nn
from torch.nn import functional as F

from bdclean.errors import Refused
from bdclean.recipes.d3 import D3
from bdclean.recipes.fst import FST
from bdclean.training.head_shift import keep_norm

OLD = suspect().network[5].weight.detach()


def head(model):
    return model.network[5].weight.detach()


def cosine(model):
    return float(F.cosine_similarity(head(model).flatten(), OLD.flatten(), dim=0))


QUICK = {"epochs": 40, "batch_size": 32, "rate": 0.05}
FAR = QUICK | {"rate": 0.2}


@pytest.mark.parametrize("recipe", [FST(**QUICK), D3(**QUICK)], ids=["fst", "d3"])
def test_a_new_head_of_the_old_length_takes_the_planted_backdoor_out(recipe):
    model = cleansed(recipe)
    assert float(head(model).norm()) == pytest.approx(float(OLD.norm()), rel=1e-5)
    assert accuracy(model) == 1 and fooled(model) < 0.1 and cosine(model) < 0
    assert torch.equal(head(model), head(cleansed(recipe))) and not torch.equal(
        head(model), head(cleansed(recipe, seed=1))
    )


def test_fst_is_held_off_as_much_as_alpha_says():
    found = [cosine(cleansed(FST(**QUICK, alpha=alpha))) for alpha in (0.0, 0.02, 1.0)]
    assert found == sorted(found, reverse=True) and found[0] > found[2] + 0.1


def test_d3_goes_as_far_as_can_be_where_clean_images_count_little():
    free, bound = (cleansed(D3(**FAR, clean_weight=weight)) for weight in (1e-6, 1.0))
    assert cosine(free) < -0.95 < cosine(bound)


def test_an_image_within_the_bound_does_not_count():
    """Its loss is at most log 2 for a network that knows nothing: with a higher bound nothing but distance is left."""
    assert cosine(cleansed(D3(**FAR, bound=20.0))) < -0.95


def test_a_weight_keeps_its_norm_through_steps():
    layer = nn.Linear(4, 3)
    optimiser = torch.optim.SGD(layer.parameters(), 1.0)
    keep_norm(layer.weight, torch.tensor(2.0), optimiser)
    for k in range(3):
        optimiser.zero_grad()
        layer(torch.full((1, 4), float(k + 1))).sum().backward()
        optimiser.step()
        assert float(layer.weight.detach().norm()) == pytest.approx(2.0)


@pytest.mark.parametrize("recipe", [FST(), D3()], ids=["fst", "d3"])
def test_a_head_without_a_weight_is_refused(recipe):
    odd = replace(arch(), head="2")  # the ReLU
    with pytest.raises(
        Refused, match=f"{recipe.name} draws a head's weight anew, and planted's head, 2, has no"
    ):
        recipe(suspect(), odd, labeled().unlabeled(), labeled(), run())
