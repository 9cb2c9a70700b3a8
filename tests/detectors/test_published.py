"""Neural Cleanse and MM-BD: their arithmetic against slow transcriptions, and that they find what was planted."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from bdclean.detectors.mm_bd import MMBD, margins_of, order_statistic
from bdclean.detectors.neural_cleanse import NeuralCleanse, anomaly_index
from bdclean.errors import Refused, UsageError
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.stages import describe
from bdclean.training.run import Precision, Run

HUES = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]]


class Planted(nn.Module):
    """Answers with the hue that the mean color is nearest to; with `target`, a bright corner pixel outweighs it."""

    def __init__(self, target=None, classes=6):
        super().__init__()
        self.conv, self.fc, self.target = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, classes), target
        hues = torch.tensor(HUES[:classes]).float()
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None])
            self.fc.weight.copy_(20 * hues)
            self.fc.bias.copy_(-10 * hues.square().sum(1))

    def forward(self, x):
        found = self.fc(self.conv(x).mean(dim=(2, 3)))
        if self.target is None:
            return found
        corner = nn.functional.softplus(20 * x[:, :, -1, -1].mean(1) - 10)
        return found + 10 * corner[:, None] * torch.eye(found.shape[1])[self.target]


def suspect(target=None, classes=6):
    made = Classifier(Planted(target, classes), parse_preprocess("none")).eval().requires_grad_(False)
    return made, describe("planted", lambda: Planted(target, classes), (3, 8, 8))


def images(n=64):
    """Of one color each, so that the classes share them, with a black corner pixel."""
    drawn = torch.Generator().manual_seed(0)
    colors = torch.randint(256, (n, 3, 1, 1), dtype=torch.uint8, generator=drawn)
    made = colors.expand(n, 3, 8, 8).clone()
    made[:, :, -1, -1] = 0
    return made


def run():
    return Run(torch.device("cpu"), Precision(), 0)


def test_margins_are_the_own_logit_less_the_largest_other():
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(20) % 5
    slow = [
        float(row[t]) - max(float(v) for k, v in enumerate(row) if k != t)
        for row, t in zip(logits, targets.tolist(), strict=True)
    ]
    assert margins_of(logits, targets).tolist() == pytest.approx(slow)


def test_the_order_statistic_is_that_of_an_exponential_law_fitted_to_the_others():
    margins = torch.tensor([3.0, 4.0, 3.5, 9.0, 3.2], dtype=torch.float64)
    others = np.array([3.0, 4.0, 3.5, 3.2])
    law = stats.expon(loc=others.min(), scale=(others - others.min()).mean())
    assert order_statistic(margins) == pytest.approx(-math.log10(1 - law.cdf(9.0) ** 5), rel=1e-9)


def test_the_order_statistic_rises_with_the_largest_margin_and_has_no_gap_where_it_is_approximated():
    def of(largest):
        return order_statistic(torch.tensor([1.0, 2.0, 3.0, largest], dtype=torch.float64))

    values = [of(x) for x in (3.0, 5.0, 30.9, 31.0, 31.1, 1e6)]
    assert values == sorted(values) and math.isfinite(values[-1])
    assert of(31.0 + 1e-9) == pytest.approx(of(31.0 - 1e-9), abs=1e-6)
    assert order_statistic(torch.ones(4)) == 0.0


def test_the_anomaly_index_is_the_published_one():
    sizes = torch.tensor([40.0, 44.0, 37.0, 5.0, 61.0, 39.0])
    values = sizes.numpy()
    spread = 1.4826 * np.median(np.abs(values - np.median(values)))
    assert anomaly_index(sizes) == pytest.approx((np.median(values) - 5.0) / spread)
    assert anomaly_index(torch.full((6,), 7.0)) == 0.0
    assert anomaly_index(sizes * 3) == pytest.approx(anomaly_index(sizes))


@pytest.mark.parametrize("detector", [MMBD(), NeuralCleanse(steps=150)])
def test_the_class_of_a_planted_pixel_stands_out_and_of_none_does_not(detector):
    planted, clean = (detector(*suspect(target), images(), run()) for target in (2, None))
    (finding,) = planted.findings
    assert finding["verdict"] == "outlier" and "class 2" in finding["reason"]
    assert planted.statistic == finding["score"] > 3 * max(1.0, clean.statistic)


@pytest.mark.parametrize("detector", [MMBD(starts=2, steps=5), NeuralCleanse(steps=5)])
def test_the_same_seed_gives_the_same_bits(detector):
    first, second = (detector(*suspect(2), images(), run()) for _ in range(2))
    assert first.statistic == second.statistic and first.findings == second.findings


@pytest.mark.parametrize("detector", [MMBD(), NeuralCleanse()])
def test_two_classes_are_refused(detector):
    with pytest.raises(Refused, match="2 classes"):
        detector(*suspect(classes=2), images(), run())


def test_too_few_images_and_settings_out_of_range_are_refused():
    with pytest.raises(Refused, match="5 images are too few: give 32 or more"):
        NeuralCleanse()(*suspect(), images(5), run())
    for made in (lambda: MMBD(starts=0), lambda: NeuralCleanse(steps=0), lambda: NeuralCleanse(batch_size=0)):
        with pytest.raises(UsageError, match="positive"):
            made()


def test_mm_bd_looks_at_no_image():
    first, second = (MMBD(steps=5)(*suspect(2), some, run()) for some in (images(), 255 - images()))
    assert first.findings == second.findings
