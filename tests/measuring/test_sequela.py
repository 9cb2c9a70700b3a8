"""What is left behind, on networks so small that each answer can be said beforehand."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from recipes.planted import PLANTED, labeled, layers, suspect
from torch import nn

from bdclean.errors import Refused
from bdclean.measuring.sequela import membership, path, reactivation, reinjection, retuning, tuning
from bdclean.measuring.sequela.ground import Ground, Threat
from bdclean.measuring.trial import Trial
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.record.sequela import CONTROL, OUTPUT, TRIGGER, UNPOISONED
from bdclean.triggers.badnets import BadNets
from bdclean.triggers.bank import make_triggers
from bdclean.triggers.sig import SIG

CPU = torch.device("cpu")


def drawn(n, shift=0.0, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).double() + shift


# --- membership ---------------------------------------------------------------------------------------------


def test_a_margin_is_the_log_odds_of_the_class_and_still_tells_losses_that_round_to_nothing():
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 5
    chance = logits.double().softmax(1)[torch.arange(50), labels]
    assert torch.allclose(membership.margins(logits, labels), (chance / (1 - chance)).log())
    own = membership.margins(logits, None)
    assert torch.equal(own, membership.margins(logits, logits.argmax(1)))
    sure = torch.tensor([[80.0, 0.0], [90.0, 0.0]])
    losses = nn.functional.cross_entropy(sure, torch.tensor([0, 0]), reduction="none")
    assert losses[0] == losses[1] and membership.margins(sure, None).tolist() == [80.0, 90.0]


def test_the_area_is_the_share_of_pairs_in_order_and_its_interval_has_a_width_at_both_extremes():
    members, others = drawn(40, 0.7).round(decimals=1), drawn(30, seed=1).round(decimals=1)
    pairs = [(m > n) + 0.5 * (m == n) for m in members.tolist() for n in others.tolist()]
    found = membership.area(members, others)
    assert found.value == pytest.approx(sum(pairs) / len(pairs)) and found.n == 40
    assert found.low < found.value < found.high
    turned = membership.area(others, members)
    assert turned.value == pytest.approx(1 - found.value)
    apart = membership.area(members + 100, others)
    assert (apart.value, apart.high) == (1.0, 1.0) and 0.8 < apart.low < 1
    below = membership.area(members - 100, others)
    assert (below.value, below.low) == (0.0, 0.0) and 0 < below.high < 0.2
    assert membership.area(members[:0], others).value is None


def test_the_interval_of_the_area_holds_what_is_true_about_as_often_as_it_says():
    true, held = 0.5 * (1 + math.erf(0.5 / 2)), 0  # of two normal scores half a deviation apart
    for seed in range(200):
        found = membership.area(drawn(60, 0.5, 2 * seed), drawn(60, 0.0, 2 * seed + 1))
        held += found.low <= true <= found.high
    assert 180 <= held <= 200


def test_the_change_of_an_area_is_paired_and_nothing_where_nothing_changed():
    members, others = drawn(50, 0.5), drawn(40, seed=1)
    same = membership.area_change((members, others), (2 * members, 2 * others))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    after = (members + 0.3 * drawn(50, seed=2), others + 0.3 * drawn(40, seed=3))
    found = membership.area_change((members, others), after)
    areas = [membership.area(*pair).value for pair in (after, (members, others))]
    assert found.value == pytest.approx(areas[0] - areas[1])

    def beats(pair):
        return (pair[0][:, None] > pair[1][None]).double() + 0.5 * (pair[0][:, None] == pair[1][None])

    difference = (beats(after) - beats((members, others))).numpy()
    variance = difference.mean(1).var(ddof=1) / 50 + difference.mean(0).var(ddof=1) / 40
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(variance))
    unpaired = membership.area(*after).high - membership.area(*after).low
    assert found.high - found.low < unpaired


def test_members_are_told_at_a_low_rate_only_where_there_are_enough_others():
    others = torch.arange(5000).double()
    members = torch.tensor([4994.0, 4995.0, 4996.0, 4949.0, 4950.0])
    one, tenth = membership.low_rates(members, others)
    # 50 of the others, and 5 of them, are above the thresholds 4949 and 4994
    assert (one.true_positive_rate.value, tenth.true_positive_rate.value) == (0.8, 0.4)
    one, tenth = membership.low_rates(members, others[:4999])
    assert one.true_positive_rate.value is not None and tenth.true_positive_rate.value is None
    assert tenth.reason == "4,999 non-members, 5,000 are needed"
    one, tenth = membership.low_rates(members, others[:999])
    assert one.true_positive_rate.value is None and one.reason == "999 non-members, 1,000 are needed"


def test_a_network_that_learnt_noise_by_heart_gives_its_members_away():
    pixels = torch.randint(256, (128, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.randint(2, (128,), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 2)),
                       parse_preprocess("half"))  # fmt: skip
    untrained = model(pixels).detach()
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(pixels[:64]), labels[:64]).backward()
        optimiser.step()
    for logits, low, high in ((untrained, 0.35, 0.65), (model(pixels).detach(), 0.7, 1.0)):
        scores = membership.margins(logits, labels)
        assert low <= membership.area(scores[:64], scores[64:]).value <= high


# --- attacks on a network that stands -------------------------------------------------------------------------


@pytest.fixture
def blue(tmp_path):
    """The trigger of the planted network: more blue, everywhere."""
    delta = np.zeros((3, 8, 8), np.float32)
    delta[2] = 120
    np.savez(tmp_path / "blue.npz", delta=delta)
    (made,) = make_triggers((f"file:{tmp_path / 'blue.npz'}",), (8, 8), "classifier")
    return Threat(made, 0)


@pytest.fixture
def ground():
    images = labeled(160)
    seen, scored = images.select(torch.arange(64)), images.select(torch.arange(64, 160))
    trial = Trial(lambda x: x, scored.images, scored.labels, scored.labels, 2, True, False, 0.2, 0)
    return Ground.of(seen, trial, CPU, None)


def hidden():
    """The planted network whose head does not listen to the planted channel any more: the feature is still there."""
    model = suspect()
    with torch.no_grad():
        model.network[5].weight[:, PLANTED] = 0
    return model


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_backdoor_that_only_the_head_forgot_comes_back_and_the_network_given_stays(blue, ground):
    model = hidden()
    before = weights(model)

    def injected(stamped=TRIGGER):
        return tuning.inject(model, OUTPUT, blue, ground, ground.tuning, 16, stamped, (5, 40), "reinjection")

    found = injected()
    assert [score.steps for score in found.scores][0] == 0 and found.scores[0].asr.value < 0.1
    assert found.scores[-1].asr.value > 0.5 and found.reached == found.scores[-1].steps == found.until
    assert found.scores[-1].accuracy.n == 96 and found.scores[-1].asr.n == 48  # those of the other class
    assert injected() == found  # bit for bit
    assert unchanged(model, before) and not any(p.grad is not None for p in model.parameters())
    clean = injected(UNPOISONED)
    assert clean.poisoned == 0 and clean.scores[-1].asr.value < 0.1
    assert clean.reached is None and clean.until == 40  # censored: not a number of steps


def test_a_network_that_obeys_is_not_tuned(blue, ground):
    (found,) = [row for row in reinjection.reinject({"suspect": suspect()}, blue, ground, (10,))
                if row.stamped == TRIGGER]  # fmt: skip
    assert found.reached == 0 and found.until == 0 and len(found.scores) == 1


def test_so_many_images_are_poisoned_and_the_rest_stay(blue, ground):
    images = ground.tuning
    poisoned = tuning.with_poison(images, blue.trigger, 0, 10, 0)
    changed = (poisoned.images != images.images).flatten(1).any(1)
    assert int(changed.sum()) == 10 and bool((poisoned.labels[changed] == 0).all())
    assert torch.equal(poisoned.labels[~changed], images.labels[~changed])
    onwards = tuning.with_poison(images, blue.trigger, "next", 10, 0)
    assert torch.equal(onwards.labels[changed], (images.labels[changed] + 1) % 2)
    none = tuning.with_poison(images, blue.trigger, 0, 0, 0)
    assert torch.equal(none.images, images.images) and torch.equal(none.labels, images.labels)


def test_counts_that_do_not_fit_are_left_out_with_a_reason_and_too_few_images_are_refused():
    assert reinjection.fitting(1000) == ((10, 50, 100, 500), "")
    counts, why = reinjection.fitting(480)
    assert counts == (10, 50, 100) and "500 poisoned images" in why and "1,000 or more are needed" in why
    assert "50 and 100 and 500" in reinjection.fitting(20)[1]
    with pytest.raises(Refused, match="19 images to tune on: 20 or more are needed"):
        reinjection.fitting(19)


def test_a_little_tuning_has_the_trigger_a_control_and_no_poison_side_by_side(blue, ground):
    rows = list(retuning.retune({OUTPUT: hidden()}, blue, ground))
    assert [(row.stamped, row.poisoned, row.images) for row in rows] == [
        (TRIGGER, 5, 50), (CONTROL, 5, 50), (UNPOISONED, 0, 50)
    ]  # fmt: skip
    with pytest.raises(Refused, match="49 images to tune on: 50 or more"):
        few = replace(ground, tuning=ground.tuning.select(torch.arange(49)))
        list(retuning.retune({OUTPUT: hidden()}, blue, few))


def test_a_trigger_is_amplified_pixel_by_pixel_and_moved_as_it_is(ground):
    images, trigger = ground.trial.images, BadNets(size=2)
    stronger = reactivation.amplified(trigger, 1.5)(images)
    change = trigger(images).double() - images.double()
    assert torch.equal(stronger, (images.double() + 1.5 * change).round().clamp(0, 255).to(torch.uint8))
    assert torch.equal(reactivation.amplified(trigger, 1.0)(images), trigger(images))
    assert torch.equal(
        reactivation.moved(trigger, -3, -2)(images), BadNets(size=2, position="4/3")(images)
    )  # of the bottom right corner, 6/6
    assert torch.equal(reactivation.moved(trigger, 0, 0)(images), trigger(images))
    assert reactivation.inwards(trigger, images, 4) == (-2, -2)
    assert reactivation.inwards(BadNets(size=2, position="top-left"), images, 4) == (2, 2)


def test_a_perturbation_stays_within_its_reach_and_finds_what_the_network_listens_to(blue, ground):
    noise = reactivation.perturbation(suspect(), lambda images: images, 0, ground)
    assert noise.abs().max() <= reactivation.REACH and torch.equal(noise, noise.round())
    assert noise[0].mean() > 0 > noise[1].mean()  # towards red
    assert torch.equal(noise, reactivation.perturbation(suspect(), lambda images: images, 0, ground))


def test_what_a_perturbation_is_learnt_on_is_drawn_from_all_classes(blue, ground):
    by_class = ground.tuning.select(ground.tuning.labels.argsort(stable=True))
    assert len(Ground.of(by_class, ground.trial, CPU, None).tuning.labels[:16].unique()) == 2
    target = by_class.select((by_class.labels == 0).nonzero().squeeze(1))
    with pytest.raises(Refused, match="the images to tune on are all of class 0, the target"):
        reactivation.perturbation(suspect(), blue.trigger, 0, replace(ground, tuning=target))


def test_the_control_of_stripes_is_not_one_of_nearly_their_frequency():
    own = SIG(20, 6)
    for seed in range(20):
        control = Threat(own, 0).control(seed, 3)
        grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
        pair = torch.stack([(stamp(grey).float() - 128).flatten() for stamp in (own, control)])
        assert nn.functional.cosine_similarity(pair[0], pair[1], 0).abs() < 0.3


def test_rows_that_are_finished_are_there_before_the_next_ones(blue, ground):
    networks = {"suspect": suspect(), OUTPUT: hidden()}
    rows = reinjection.reinject(networks, blue, ground, (10,))
    assert next(rows).stamped == TRIGGER and next(reactivation.reactivate(networks, blue, ground)).change


def test_a_dormant_backdoor_answers_to_a_stronger_trigger(blue, ground):
    model = suspect()
    with torch.no_grad():
        model.network[1].bias[PLANTED] = -8.0  # listens to more blue than the trigger has
    before = weights(model)
    rows = {row.change: row.asr.value for row in reactivation.reactivate({OUTPUT: model}, blue, ground)}
    assert len(rows) == 6 and unchanged(model, before)
    assert rows["as it is"] < 0.2 and rows["amplified 1.5 times"] > 0.8
    moved = [rate for change, rate in rows.items() if change.startswith("moved")]
    assert moved == 2 * [rows["as it is"]]  # it is the same everywhere


def test_the_path_leads_from_the_one_network_to_the_other(blue, ground):
    first, last = suspect(), hidden()
    before = weights(first)
    points = list(path.along(first, last, blue, ground))
    assert [point.share for point in points] == [k / 10 for k in range(11)]
    assert points[0].asr.value > 0.9 and points[-1].asr.value < 0.1
    rates = [point.asr.value for point in points]
    assert rates == sorted(rates, reverse=True) and all(point.accuracy.value > 0.9 for point in points)
    assert unchanged(first, before)
    half = path.between(first, last, 0.5)
    assert float(half.network[5].weight[0, PLANTED].detach()) == 2.0
    for share, end in ((0.0, first), (1.0, last)):
        assert unchanged(path.between(first, last, share), weights(end))
    other = copy.deepcopy(layers())
    other[5] = nn.Linear(4, 3)
    with pytest.raises(Refused, match="not of one shape"):
        path.between(first, Classifier(other, parse_preprocess("none")), 0.5)


def test_no_more_images_are_scored_than_need_be_and_the_draw_is_seeded(ground):
    few = Ground.of(ground.tuning, ground.trial, CPU, None, most=10)
    again = Ground.of(ground.tuning, ground.trial, CPU, None, most=10)
    assert len(few.trial.images) == len(few.trial.reference) == 10
    assert torch.equal(few.trial.images, again.trial.images)
    assert few.tuning.classes == ("0", "1")


def test_what_a_suspect_says_of_itself_without_labels_is_no_measure(blue, ground):
    own = replace(ground, trial=replace(ground.trial, labeled=False))
    for labeled_ground, known in ((ground, True), (own, False)):
        networks = {"suspect": suspect(), OUTPUT: hidden()}
        first, second = list(reactivation.reactivate(networks, blue, labeled_ground))[::6]
        assert (first.base_rate.value is not None) == known and second.base_rate.value is not None
        begun, *_ = path.along(suspect(), hidden(), blue, labeled_ground)
        assert (begun.accuracy.value is not None) == known and begun.asr.value is not None
