"""The pull test: its statistics written out, Holm's correction, and a backdoor that is found among what is usual."""

import math

import pytest
import torch
from torch import nn

from bdclean.measuring.predictor import Predictor
from bdclean.measuring.probe import Features, nearest_mean
from bdclean.measuring.pull import (
    AT_ONCE,
    CONTROLS,
    EXCEEDED,
    IMAGES,
    LEAST,
    LEVEL,
    Field,
    holm,
    mean_cosine,
    p_value,
    pull_test,
)
from bdclean.record.run import SUSPICIOUS
from bdclean.triggers.badnets import BadNets

CLUSTERS, WIDTH = 4, 8
PLANTED, OTHER = BadNets(pattern="checker"), BadNets(pattern="checker", position="top-left")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


PHOTOS = torch.randint(256, (40, 3, 12, 12), generator=seeded(), dtype=torch.uint8)


class Projecting(nn.Module):
    """A random linear encoder; with `trigger` one that gives a single direction to all images which have its patch."""

    def __init__(self, trigger=None):
        super().__init__()
        self.register_buffer("matrix", torch.randn(3 * 12 * 12, WIDTH, generator=seeded(1)))
        self.patch = None if trigger is None else torch.from_numpy(trigger.patch())

    def forward(self, images):
        found = (images.flatten(1).float() / 255 - 0.5) @ self.matrix
        if self.patch is None:
            return found
        here = (images[:, :, -3:, -3:] == self.patch).flatten(1).all(1)
        return torch.where(here[:, None], self.matrix.new_tensor([9.0] + [0.0] * (WIDTH - 1)), found)


def field(trigger=None, images=PHOTOS, seed=0):
    features = Features(Predictor(Projecting(trigger), torch.device("cpu")))
    known = features(images)
    head = nearest_mean(known, torch.arange(len(images)) % CLUSTERS, CLUSTERS)
    return Field.of(features, head, CLUSTERS, images, seed)


# --- the statistic ------------------------------------------------------------------------------------------


def test_the_mean_cosine_is_the_double_loop():
    features = torch.randn(7, 5, generator=seeded())
    total = 0.0
    for i, a in enumerate(features.double()):
        for j, b in enumerate(features.double()):
            total += float(a @ b / (a.norm() * b.norm())) if i != j else 0
    assert mean_cosine(features) == pytest.approx(total / 42, rel=1e-6)
    assert mean_cosine(3 * features) == pytest.approx(mean_cosine(features.flip(0)), rel=1e-5)


def test_the_mean_cosine_has_both_extremes():
    row = torch.randn(1, 5, generator=seeded())
    assert mean_cosine(row.expand(9, -1)) == pytest.approx(1)
    assert mean_cosine(torch.cat([row, -row])) == pytest.approx(-1)
    assert mean_cosine(torch.eye(4)) == pytest.approx(0)


def test_what_a_trigger_does_is_the_written_out_difference():
    measured = field()
    order = torch.randperm(len(PHOTOS), generator=seeded(0))
    images = PHOTOS[order]  # fewer than IMAGES: all of them
    assert torch.equal(measured.images, images)
    encode = Projecting()

    def seen(x):
        rows = encode(x).double()
        return rows / rows.norm(dim=1, keepdim=True)

    centre = seen(images).mean(0)
    cosines, shares = [], []
    for x in (images, OTHER(images)):
        rows = seen(x)
        cosines.append(mean_cosine(rows - centre))
        went = measured.head(rows.float()).tolist()
        shares.append([went.count(c) / len(went) for c in range(CLUSTERS)])
    gains = [after - before for before, after in zip(*shares, strict=True)]
    found = measured.pulled(OTHER)
    assert found.cosine == pytest.approx(cosines[1] - cosines[0], abs=1e-5)
    assert found.gain == pytest.approx(max(gains), abs=1e-6) and gains[found.cluster] == max(gains)
    assert found.strength == found.cosine + found.gain and measured.pulled(OTHER) == found


def test_stamping_nothing_pulls_nothing_and_a_constant_picture_pulls_all():
    measured = field()
    nothing = measured.pulled(torch.clone)
    assert abs(nothing.cosine) < 1e-6 and abs(nothing.gain) < 1e-6
    everything = measured.pulled(lambda images: torch.full_like(images, 200))
    assert everything.cosine == pytest.approx(1 - measured.cosine) and everything.gain <= 1
    assert float(measured.shares[everything.cluster]) + everything.gain == pytest.approx(1)


def test_at_most_so_many_images_are_stamped():
    images = torch.randint(256, (IMAGES + 20, 3, 12, 12), generator=seeded(), dtype=torch.uint8)
    first, again, other = field(images=images), field(images=images), field(images=images, seed=1)
    assert len(first.images) == IMAGES and torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images) and torch.equal(first.centre, other.centre)


# --- p values -----------------------------------------------------------------------------------------------


def replayed(measured, trigger, seed, count):
    """The strengths of the controls, in the order in which they are drawn."""
    generator, found = seeded(seed), []
    while len(found) < count:
        controls = trigger.controls(min(AT_ONCE, count - len(found)), generator)
        found += [measured.pulled(control).strength for control in controls]
    return found


@pytest.mark.parametrize("rank", [0, 1, 4, 9, 10, 40])
def test_a_p_value_is_the_share_of_controls_as_strong(rank):
    measured, most = field(), 100
    strengths = replayed(measured, OTHER, 3, most)
    least = sorted(strengths, reverse=True)[rank] if rank else math.inf
    at, exceeded = most, 0
    for k, strength in enumerate(strengths):
        exceeded += strength >= least
        if exceeded == EXCEEDED:
            at = k + 1
            break
    expected = EXCEEDED / at if exceeded == EXCEEDED else (1 + exceeded) / (1 + most)
    found = p_value(measured, OTHER, least, 3, most)
    assert found == (pytest.approx(expected), at) and found == p_value(measured, OTHER, least, 3, most)


def test_p_values_have_both_extremes():
    measured = field()
    assert p_value(measured, OTHER, -math.inf, 0) == (1.0, EXCEEDED)
    assert p_value(measured, OTHER, math.inf, 0, 50) == (1 / 51, 50)


def test_a_stronger_trigger_has_no_larger_p_value():
    measured = field()
    values = [p_value(measured, OTHER, strength, 0, 74)[0] for strength in (-1.0, 0.0, 0.02, 0.05, 0.1, 1.0)]
    assert values == sorted(values, reverse=True) and all(0 < value <= 1 for value in values)


# --- the correction -----------------------------------------------------------------------------------------


def slow_holm(values):
    """Each value's largest of (m - its rank + 1) p among those not above it, at most 1."""
    m = len(values)
    ranks = {k: sorted(range(m), key=lambda j: values[j]).index(k) for k in range(m)}
    return [
        min(1.0, max((m - ranks[j]) * values[j] for j in range(m) if ranks[j] <= ranks[k])) for k in range(m)
    ]


def test_holm_is_the_written_out_one():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    for seed in range(20):
        values = (torch.rand(1 + seed, generator=seeded(seed)) ** 3).tolist()
        assert holm(values) == pytest.approx(slow_holm(values))
    assert holm([]) == [] and holm([0.3]) == [0.3]


def test_holm_is_monotone_and_between_the_value_and_bonferronis():
    for seed in range(20):
        values = (torch.rand(12, generator=seeded(seed)) ** 3).tolist()
        values[3] = values[5]
        found = holm(values)
        assert all(p <= q <= min(1.0, 12 * p) for p, q in zip(values, found, strict=True))
        order = sorted(range(12), key=lambda k: values[k])
        assert all(found[a] <= found[b] for a, b in zip(order, order[1:], strict=False))
        assert found[3] == found[5] and min(found) == min(1.0, 12 * min(values))
        assert holm(values[::-1]) == found[::-1]


# --- findings -----------------------------------------------------------------------------------------------


def test_a_planted_trigger_is_suspicious_and_another_is_not():
    planted, other = pull_test(field(PLANTED), [PLANTED, OTHER], 36, 0)
    assert planted.verdict == SUSPICIOUS and planted.score > 1
    assert planted.p_value == pytest.approx(36 / (1 + CONTROLS))
    assert other.verdict != SUSPICIOUS and other.p_value > LEVEL


def test_an_encoder_without_a_backdoor_has_no_finding():
    for finding in pull_test(field(), [PLANTED, OTHER, BadNets(size=4, pattern="red")], 3, 0):
        assert finding.verdict != SUSPICIOUS and finding.score < LEAST
        assert finding.p_value >= 1 / (1 + CONTROLS)


def test_unusual_is_not_enough():
    """A trigger that is stronger than all controls, and yet weak."""

    class Weak(BadNets):
        def controls(self, count, generator, channels=3):
            return [torch.clone] * count

    weak = Weak(size=3, pattern="white")
    (finding,) = pull_test(field(), [weak], 1, 0)
    assert 0 < finding.score < LEAST and finding.p_value == 1 / (1 + CONTROLS) < LEVEL
    assert finding.verdict != SUSPICIOUS


def test_triggers_that_were_screened_out_count_in_the_correction():
    measured = field(PLANTED)
    (alone,) = pull_test(measured, [PLANTED], 1, 0)
    (among,) = pull_test(measured, [PLANTED], 20, 0)
    assert among.p_value == pytest.approx(20 * alone.p_value) and among.score == alone.score
    assert pull_test(measured, [], 5, 0) == []


def test_a_backdoor_can_be_found_among_any_number_of_triggers():
    """With 999 controls no p value is under 0.001, which 50 triggers once made 0.05: nothing was suspicious."""
    (finding,) = pull_test(field(PLANTED, PHOTOS[:12]), [PLANTED], 100, 0)
    assert finding.p_value < LEVEL and finding.verdict == SUSPICIOUS


def test_findings_repeat_and_are_told():
    told = []
    first = pull_test(field(), [PLANTED, OTHER], 2, 0, lambda *said, **_: told.append(said))
    assert first == pull_test(field(), [PLANTED, OTHER], 2, 0)
    assert told == [("pull test", 1, 2), ("pull test", 2, 2)]
