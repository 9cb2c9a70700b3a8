"""Optimal-transport backdoor repair: what is cut, what is fused, and where it stops."""

import numpy as np
import pytest
import torch
from recipes import planted
from torch import nn

from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.stages import describe
from bdclean.recipes.otbr import OTBR, convolutions, fuse, transport


def test_a_plan_of_least_cost_brings_supply_to_demand():
    supply, demand = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    plan = transport(supply, demand, np.array([[0.0, 1.0], [5.0, 1.0]]))
    assert plan == pytest.approx(np.array([[0.25, 0.25], [0.0, 0.5]]))


@pytest.mark.parametrize(("dead", "n"), [(8, 64), (40, 64), (8, 32)])
def test_filters_that_nothing_moves_are_matched_as_well(dead, n):
    drawn = np.random.default_rng(0)
    cut, own = (drawn.normal(size=(n, 3, 3, 3)) for _ in range(2))
    change = drawn.uniform(size=n).astype(np.float32)  # as networks have them
    change[:dead] = 0
    fused, match = fuse(cut, own, change, None, 0.5)
    assert np.isfinite(fused).all() and np.allclose(match.sum(0), 1, atol=1e-4)


def test_the_same_filters_in_another_order_are_fused_with_their_own():
    """Alike in size, each finds itself, and the next layer's inputs are put into the order of the first's filters."""
    rng = np.random.default_rng(0)
    own, order = rng.normal(size=(4, 3, 1, 1)), np.array([2, 0, 3, 1])
    fused, match = fuse(own[order], own, np.ones(4), None, 0.5)
    assert fused == pytest.approx(own)
    later = rng.normal(size=(2, 4, 1, 1))
    again, _ = fuse(later[:, order], later, np.ones(2), match, 0.5)
    assert again == pytest.approx(later)


def test_a_cut_filter_is_filled_by_those_nearest_to_it():
    """The one that moved most is cut; a half of it stays, and a half is of what lies nearest among the others."""
    own = np.array([1.0, 1.1, 5.0]).reshape(3, 1, 1, 1)
    cut = own.copy()
    cut[0] = 0
    fused, match = fuse(cut, own, np.array([1.0, 1.0, 1.0]), None, 0.5)
    assert match.sum(0) == pytest.approx(np.ones(3))
    assert fused.ravel() == pytest.approx([0.5, 1.1, 5.0]), "zeros are the nearest to it that are left over"


def test_a_network_keeps_its_answers_on_what_it_was_given():
    made = OTBR(steps=3, rate=1e-3)(
        planted.suspect(), planted.arch(), planted.labeled().unlabeled(), None, planted.run()
    )
    assert planted.accuracy(made.model) >= 0.9
    assert 0 <= made.settings["ratio"] <= 0.3


def test_a_given_share_is_cut_whatever_it_costs():
    before = planted.suspect()
    made = OTBR(steps=3, ratio=0.5)(
        before, planted.arch(), planted.labeled().unlabeled(), None, planted.run()
    )
    assert made.stages == ["2 of 4 filters cut, then fused with the suspect's"]
    assert not torch.equal(made.model.network[0].weight, before.network[0].weight)
    assert torch.equal(made.model.network[5].weight, before.network[5].weight), "no convolution"


def test_shortcuts_and_convolutions_of_single_channels_are_left_alone():
    model = Classifier(ResidualNetwork((1, 1, 1), (4, 8, 8), 4, 4, shortcut="b"), parse_preprocess("half"))
    names = {module: name for name, module in model.named_modules()}
    found = [names[layer] for layer in convolutions(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))]
    assert len(found) == 7 and not any("shortcut" in name or "downsample" in name for name in found)


def test_a_network_without_convolutions_is_refused():
    def flat():
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))

    suspect = Classifier(flat(), parse_preprocess("none")).eval()
    with pytest.raises(Refused, match="cuts filters of convolutions, and this network has none"):
        OTBR()(suspect, describe("flat", flat, (3, 8, 8)), planted.labeled().unlabeled(), None, planted.run())


def test_steps_that_burst_the_network_are_refused():
    with pytest.raises(Refused, match=r"noise burst the network at a learning rate of 1e\+30"):
        planted.cleansed(OTBR(rate=1e30))
