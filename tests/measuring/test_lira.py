"""LiRA on margins whose truth is known, against a slow transcription, and where a threshold cannot follow."""

import math

import pytest
import torch

from bdclean.errors import Refused
from bdclean.measuring.sequela import lira, membership

IMAGES = 600


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def people(shadows, gain, spread, hardness, seed=0):
    """(margins of the network in question, whether it had the image, those of the shadow networks, who had what).

    An image's margins lie about a number of its own, `hardness` wide, `gain` higher in networks that had it.
    """
    trained_on = lira.halves(shadows, IMAGES, seed)
    member = torch.arange(IMAGES) % 2 == 0
    own = hardness * drawn(IMAGES, seed=seed + 1)
    asked = own + gain * member + spread * drawn(IMAGES, seed=seed + 2)
    return asked, member, own + gain * trained_on + spread * drawn(shadows, IMAGES, seed=seed + 3), trained_on


def areas(asked, member, shadows, trained_on):
    """The AUC of LiRA, and that of a threshold on the margin."""
    scores = lira.likelihood_ratios(asked, shadows, trained_on)
    return [membership.area(of[member], of[~member]).value for of in (scores, asked)]


@pytest.mark.parametrize("shadows", [2, 16, 64])
def test_every_image_is_in_for_half_of_the_networks_and_a_network_has_half_of_the_images(shadows):
    found = lira.halves(shadows, 2000, 0)
    assert found.shape == (shadows, 2000) and (found.sum(0) == shadows // 2).all()
    assert ((found.sum(1) - 1000).abs() < 150).all()
    assert torch.equal(found, lira.halves(shadows, 2000, 0))
    assert not torch.equal(found, lira.halves(shadows, 2000, 1))
    # each pair of networks shares as many images as chance has it, none is another's mirror image but of two
    both = (found[0] & found[1]).sum()
    assert both == 0 if shadows == 2 else abs(both - 2000 * (shadows / 2 - 1) / (2 * (shadows - 1))) < 150


def test_networks_that_cannot_be_halved_or_leave_an_image_without_two_of_a_kind_are_refused():
    with pytest.raises(Refused, match="15 cannot be halved"):
        lira.halves(15, 10, 0)
    asked, _, shadows, trained_on = people(4, 1.0, 1.0, 0.0)
    assert lira.likelihood_ratios(asked, shadows, trained_on).isfinite().all()
    trained_on[:, 7] = torch.tensor([True, False, False, False])
    with pytest.raises(Refused, match="two without: there are 1"):
        lira.likelihood_ratios(asked, shadows, trained_on)


@pytest.mark.parametrize("shadows", [16, 64])
def test_it_is_the_ratio_of_two_gaussians(shadows):
    asked, _, margins, trained_on = people(shadows, 1.0, 0.7, 2.0)
    found = lira.likelihood_ratios(asked, margins, trained_on)
    kinds = []
    for kind in (trained_on, ~trained_on):
        own = [margins[kind[:, k], k] for k in range(IMAGES)]
        variances = [float(some.var()) for some in own]
        pooled = sum(v * (len(some) - 1) for v, some in zip(variances, own, strict=True)) / sum(
            len(some) - 1 for some in own
        )
        kinds.append([
            torch.distributions.Normal(some.mean(), math.sqrt(pooled if shadows < lira.FEW else v)).log_prob(asked[k])
            for k, (some, v) in enumerate(zip(own, variances, strict=True))
        ])  # fmt: skip
    expected = torch.tensor(kinds[0]).double() - torch.tensor(kinds[1]).double()
    assert torch.allclose(found, expected, atol=1e-9)
    assert torch.equal(found, lira.likelihood_ratios(asked, margins, trained_on))


def test_what_all_networks_share_about_an_image_changes_nothing():
    asked, _, shadows, trained_on = people(16, 1.0, 0.7, 2.0)
    found = lira.likelihood_ratios(asked, shadows, trained_on)
    easier = 10 * drawn(IMAGES, seed=9)
    assert torch.allclose(lira.likelihood_ratios(asked + easier, shadows + easier, trained_on), found)
    assert torch.allclose(lira.likelihood_ratios(3 * asked, 3 * shadows, trained_on), found)
    assert torch.allclose(lira.likelihood_ratios(asked, shadows, ~trained_on), -found)


@pytest.mark.parametrize("shadows", [16, 64])
def test_who_was_learnt_by_heart_is_told_and_who_left_no_trace_is_not(shadows):
    assert areas(*people(shadows, 8.0, 0.5, 1.0))[0] > 0.999
    nobody = areas(*people(shadows, 0.0, 1.0, 1.0))[0]
    assert abs(nobody - 0.5) < 0.06  # two and a half deviations of the AUC of 300 against 300


@pytest.mark.parametrize("shadows", [16, 64])
def test_it_beats_a_threshold_where_some_images_are_harder_than_others_and_only_there(shadows):
    told, threshold = areas(*people(shadows, 2.0, 1.0, 4.0))
    best = 0.5 * (1 + math.erf(2 / 2))  # of two known Gaussians two deviations apart
    assert threshold < 0.68 and best - 0.06 < told < best + 0.03
    told, threshold = areas(*people(shadows, 2.0, 1.0, 0.0))
    assert threshold == pytest.approx(best, abs=0.03) and told <= threshold + 0.01
    asked, member, margins, trained_on = people(shadows, 2.0, 1.0, 4.0)
    scores = lira.likelihood_ratios(asked, margins, trained_on)
    high = scores[~member].sort(descending=True).values[3]
    assert (scores[member] > high).double().mean() > 3 * (
        asked[member] > asked[~member].sort(descending=True).values[3]
    ).double().mean()


def test_of_many_networks_an_image_has_a_variance_of_its_own():
    """Half of the images are answered by all networks nearly alike: a small step up says much of these alone."""
    trained_on, member = lira.halves(64, IMAGES, 0), torch.arange(IMAGES) % 2 == 0
    wide = torch.where(torch.arange(IMAGES) < 300, 0.1, 3.0)
    shadows = wide * drawn(64, IMAGES, seed=1) + 0.3 * trained_on
    asked = wide * drawn(IMAGES, seed=2) + 0.3 * member
    own = areas(asked, member, shadows, trained_on)[0]
    pooled = areas(asked, member, shadows[:62], trained_on[:62])[0]
    assert own > pooled + 0.05


def test_networks_that_all_answer_alike_tell_nothing_of_nobody():
    trained_on = lira.halves(16, 10, 0)
    alike = torch.full((16, 10), 3.0)
    found = lira.likelihood_ratios(alike[0], alike, trained_on)
    assert torch.equal(found, torch.zeros(10).double())
