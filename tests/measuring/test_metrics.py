import math

import pytest
import torch
from scipy import stats
from torch import nn

from bdclean.errors import Refused
from bdclean.measuring.intervals import lower_bound, measure, paired_difference, rate, upper_bound, wilson
from bdclean.measuring.metrics import accuracy, attack_success, balanced_score, defence_effectiveness
from bdclean.measuring.predictor import Predictor

COUNTS = [(0, 1), (1, 1), (0, 50), (50, 50), (3, 50), (49, 50), (37, 1000), (500, 1000)]


@pytest.mark.parametrize(("hits", "n"), COUNTS)
@pytest.mark.parametrize("level", [0.05, 0.001])
def test_wilson_is_scipys(hits, n, level):
    expected = stats.binomtest(hits, n).proportion_ci(1 - level, method="wilson")
    assert wilson(hits, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("hits", "n"), COUNTS)
@pytest.mark.parametrize("level", [0.05, 0.001])
def test_exact_bounds_are_scipys_clopper_pearson(hits, n, level):
    low = stats.binomtest(hits, n, alternative="greater").proportion_ci(1 - level, method="exact").low
    high = stats.binomtest(hits, n, alternative="less").proportion_ci(1 - level, method="exact").high
    assert lower_bound(hits, n, level) == pytest.approx(low, abs=1e-9)
    assert upper_bound(hits, n, level) == pytest.approx(high, abs=1e-9)


def test_no_images_say_nothing():
    assert wilson(0, 0) == (None, None)
    assert (lower_bound(0, 0, 0.05), upper_bound(0, 0, 0.05)) == (0.0, 1.0)
    empty = rate(torch.zeros(0, dtype=torch.bool))
    assert (empty.value, empty.n, empty.low, empty.high) == (None, 0, None, None)


def test_a_rate_has_its_n_and_its_interval():
    found = measure("x", torch.tensor([True] * 9 + [False]))
    assert (found.name, found.value, found.n) == ("x", 0.9, 10)
    assert found.low < 0.9 < found.high < 1


def test_attack_success_leaves_out_images_of_the_target():
    reference = torch.tensor([0, 0, 1, 2, 2])
    stamped = torch.tensor([0, 0, 0, 0, 1])
    assert attack_success(stamped, reference, 0, 3).tolist() == [True, True, False]
    assert len(attack_success(torch.zeros(4), torch.zeros(4), 0, 3)) == 0


def test_attack_success_of_next_wraps_around():
    reference = torch.tensor([0, 1, 2, 2])
    assert attack_success(torch.tensor([1, 1, 0, 2]), reference, "next", 3).tolist() == [
        True,
        False,
        True,
        False,
    ]


def test_accuracy_over_all_classes_and_in_the_worst():
    labels = torch.tensor([0] * 80 + [1] * 20)
    predictions = labels.clone()
    predictions[80:90] = 0
    overall, mean, worst = accuracy(predictions, labels)
    assert overall.value == pytest.approx(0.9) and overall.n == 100
    assert mean.value == pytest.approx(0.75) and worst.value == 0.5 and worst.n == 20
    assert (worst.low, worst.high) == pytest.approx(wilson(10, 20, 0.025))  # two classes were looked at
    for found in (overall, mean, worst):
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_paired_difference_knows_that_the_images_are_the_same():
    before = torch.tensor([True] * 90 + [False] * 10)
    same = paired_difference(before, before, "change")
    assert same.value == 0 and same.low < 0 < same.high and same.high < 0.03
    lost = paired_difference(before, before & (torch.arange(100) >= 20), "change")
    assert lost.value == pytest.approx(-0.2) and lost.high < -0.1
    assert paired_difference(before[:0], before[:0], "change").value is None
    worst = paired_difference(torch.ones(5).bool(), torch.zeros(5).bool(), "change")
    assert worst.value == -1 and -1 <= worst.low <= worst.high < 0


def test_paired_interval_covers_the_truth_about_as_often_as_it_says():
    generator, covered, rounds = torch.Generator().manual_seed(0), 0, 400
    for _ in range(rounds):
        drawn = torch.rand(100, generator=generator)
        before, after = drawn < 0.8, (drawn > 0.05) & (drawn < 0.9)  # truth: +0.10 - 0.05
        found = paired_difference(before, after, "x")
        covered += found.low <= 0.05 <= found.high
    assert 0.92 <= covered / rounds <= 0.99


def test_defence_effectiveness_extremes():
    assert defence_effectiveness(0.9, 0.9, 1.0, 0.0) == 1
    assert defence_effectiveness(0.9, 0.9, 0.6, 0.6) == 0.5
    assert defence_effectiveness(1.0, 0.0, 0.5, 0.9) == 0
    assert defence_effectiveness(0.8, 0.95, 0.5, 0.9) == 0.5  # gains are not rewarded


def test_balanced_score_extremes():
    assert balanced_score(0.9, 0.9, 1.0, 0.0) == 1
    assert balanced_score(0.9, 0.95, 1.0, -0.1) == 1
    assert balanced_score(0.9, 0.9, 1.0, 1.0) == 0
    assert balanced_score(0.9, 0.0, 1.0, 0.0) == 0
    assert balanced_score(0.9, 0.0, 1.0, 1.0) == 0
    assert balanced_score(0.9, 0.9, 0.19, 0.0) is None
    assert balanced_score(0.8, 0.4, 1.0, 0.5) == pytest.approx(0.5)


class Narrow(nn.Module):
    """Runs out of memory on more than `room` images; else answers with the first pixel."""

    def __init__(self, room):
        super().__init__()
        self.room, self.sizes = room, []

    def forward(self, images):
        self.sizes.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("no room")
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 256).float()


def test_out_of_memory_halves_the_batch_and_loses_no_image():
    images = torch.randint(0, 256, (37, 3, 2, 2), dtype=torch.uint8)
    model = Narrow(room=5)
    predict = Predictor(model, torch.device("cpu"), 16)
    assert torch.equal(predict(images), images[:, 0, 0, 0].long())
    assert predict.batch_size == 4 and sum(size for size in model.sizes if size <= 5) == 37
    assert math.prod(predict(images[:0]).shape) == 0


def test_the_hosts_memory_counts_like_a_devices_and_other_errors_do_not():
    class Short(Narrow):
        def forward(self, images):
            if len(images) > self.room:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            if int(images.max()) == 99:
                raise RuntimeError("a shape is wrong")
            return super().forward(images)

    images = torch.randint(0, 90, (9, 3, 2, 2), dtype=torch.uint8)
    assert torch.equal(Predictor(Short(2), torch.device("cpu"), 8)(images), images[:, 0, 0, 0].long())
    with pytest.raises(RuntimeError, match="shape"):
        Predictor(Short(2), torch.device("cpu"), 2)(torch.full((2, 3, 2, 2), 99, dtype=torch.uint8))


def test_out_of_memory_with_one_image_is_refused():
    with pytest.raises(Refused, match="single image"):
        Predictor(Narrow(room=0), torch.device("cpu"), 4)(torch.zeros(3, 3, 2, 2, dtype=torch.uint8))


def test_the_class_means_interval_covers_the_truth_with_few_images_a_class():
    """1,000 classes with one to three images each: the interval holds the mean of their true rates."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        truth = torch.rand(300, generator=generator)
        labels = torch.randint(0, 300, (600,), generator=generator)
        right = torch.rand(600, generator=generator) < truth[labels]
        mean = accuracy(torch.where(right, labels, labels + 1), labels)[1]
        covered += mean.low <= float(truth[labels.unique()].mean()) <= mean.high
    assert 180 <= covered <= 200
    alone = accuracy(torch.tensor([0, 1, 2, 3, 0]), torch.arange(5))[1]
    assert alone.low < 0.8 < alone.high


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_answers_that_are_no_numbers_are_refused(bad):
    class Broken(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), 1.0).index_fill(0, torch.tensor([len(x) - 1]), bad)

    with pytest.raises(Refused, match="not all finite numbers"):
        Predictor(Broken(), torch.device("cpu"), 4)(torch.zeros(10, 3, 4, 4, dtype=torch.uint8))
