"""What `patches` finds, on networks whose patch is known."""

import pytest
import torch
from torch import nn
from training.test_patches import pictures

from bdclean.detectors.patches import AREA, WORTH, Patches
from bdclean.errors import UsageError
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.stages import describe
from bdclean.training.run import Precision, Run

CPU = torch.device("cpu")
ARCH = describe("tiny", lambda: ResidualNetwork((1, 1, 1), (4, 8, 8), 3, 3), (3, 32, 32))


def images(n=120, side=32):
    return (255 * pictures(n, side)).to(torch.uint8)


def looked(network, seed=0, side=32, **settings):
    return Patches(**settings)(network, ARCH, images(side=side), Run(CPU, Precision(), seed))


class Red(nn.Module):
    """Class 1 is a red square of 4 x 4 anywhere, as a network of convolutions sees it; else class 0."""

    def forward(self, x):
        red = (x[:, 0] - x[:, 1] - x[:, 2])[:, None]
        most = nn.functional.avg_pool2d(red, 4, 1).amax((1, 2, 3))
        return torch.stack([torch.full_like(most, 6.0), 12 * most, torch.zeros_like(most)], 1)


class Constant(nn.Module):
    """The same answer for every image."""

    def forward(self, x):
        return torch.tensor([[9.0, 0.0, 0.0]]).expand(len(x), 3)


class Dark(nn.Module):
    """Class 1 needs a patch of the largest size: more of the picture than a trigger covers."""

    def forward(self, x):
        black = (x.mean(1) < 0.05).float().sum((1, 2))
        return torch.stack([torch.full_like(black, 30.0), 30 * black / 60], 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_red_square_is_found_by_any_seed(seed):
    found = looked(Red(), seed)
    (outlier,), (finding,) = found.outliers, found.findings
    stamped = outlier(images())
    assert (Red()(stamped.float() / 255).argmax(1) == 1).float().mean() > 0.9
    assert outlier.target == 1 and 9 <= outlier.size <= 30  # a mask's faint part counts, too
    changed = (stamped.int() - images().int()).abs() > 1
    assert changed.any(1).sum((1, 2)).float().mean() <= 30
    assert finding["verdict"] == "outlier" and finding["score"] == found.statistic > WORTH
    assert list(found.pictures) == ["patch found for class 1, on grey"]


def test_what_covers_much_is_worth_little():
    found = looked(Dark())
    assert not found.outliers and found.statistic < 1 - AREA / 2 < 1
    (finding,) = found.findings
    assert finding["verdict"] == "no-outlier" and finding["threshold"] == WORTH


def test_a_network_with_one_answer_has_no_outlier():
    found = looked(Constant(), rounds=1)
    assert not found.outliers and found.statistic < 0.01


def test_other_sides_are_searched_as_well_and_the_same_seed_finds_the_same():
    class Large(nn.Module):
        def forward(self, x):
            return Red()(nn.functional.avg_pool2d(x, 2))

    found, again = looked(Large(), side=64), looked(Large(), side=64)
    assert found.outliers and found.findings == again.findings
    assert torch.equal(found.outliers[0].parameters, again.outliers[0].parameters)


def test_it_needs_a_round():
    with pytest.raises(UsageError, match="rounds are positive, not 0"):
        Patches(rounds=0)
