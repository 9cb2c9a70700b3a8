import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdclean.detectors.all_to_all import WORTH, AllToAll
from bdclean.errors import UsageError
from bdclean.progress import quiet
from bdclean.training.run import Precision, Run

CPU, CLASSES = torch.device("cpu"), 5


def images(n=150, side=32):
    """Grey, class k in row k, which is white."""
    pixels = torch.randint(90, 160, (n, 3, side, side), generator=torch.Generator().manual_seed(0))
    for k in range(CLASSES):
        pixels[k::CLASSES, :, 2 * k : 2 * k + 2] = 255
    return pixels.to(torch.uint8)


def looked(network, seed=0, given=None, **settings):
    given = images() if given is None else given
    return AllToAll(**settings)(network, None, given, Run(CPU, Precision(), seed, quiet))


class Rows(nn.Module):
    """The class is the row that is white."""

    def seen(self, x):
        return torch.stack([x[:, :, 2 * k : 2 * k + 2].mean((1, 2, 3)) for k in range(CLASSES)], 1)

    def forward(self, x):
        return 40 * self.seen(x)


class Next(Rows):
    """Under a red square of 4 x 4, anywhere in the lower half, it is the next one."""

    def forward(self, x):
        red = F.avg_pool2d(x[:, :1] - x[:, 1:2] - x[:, 2:], 4, 1)[:, 0, 16:].amax((1, 2))
        plain = 40 * self.seen(x)
        return torch.where((red > 0.8)[:, None], plain.roll(1, 1), plain)


class One(Rows):
    """Under that square it is class 0."""

    def forward(self, x):
        red = F.avg_pool2d(x[:, :1] - x[:, 1:2] - x[:, 2:], 4, 1)[:, 0, 16:].amax((1, 2))
        plain = 40 * self.seen(x)
        return plain + (red > 0.8)[:, None] * 60 * F.one_hot(torch.tensor(0), CLASSES)


@pytest.mark.parametrize("seed", range(3))
def test_a_square_that_sends_each_class_to_the_next_is_found_by_any_seed(seed):
    found = looked(Next(), seed)
    (finding,) = found.findings
    assert finding["verdict"] == "outlier" and found.statistic == finding["score"] >= 0.7
    assert not found.outliers and len(found.pictures) == 1
    under = found.stamps[0](images())
    assert under.dtype == torch.uint8
    before, after = (Next()(x.float() / 255).argmax(1) for x in (images(), under))
    assert (after == (before + 1) % CLASSES).float().mean() > 0.95
    (picture,) = found.pictures.values()
    assert picture[0].max() == 1 and (picture - 0.5).abs().sum(0).gt(0).sum() <= 64


def test_its_kin_are_near_it_and_differ():
    stamp = looked(Next()).stamps[0]
    kin = stamp.controls(8, torch.Generator().manual_seed(0))
    assert len({one.patch for one in kin} | {stamp.patch}) >= 6
    for one in kin:
        assert abs(one.patch.top - stamp.patch.top) <= 2 and abs(one.patch.left - stamp.patch.left) <= 2
    again = stamp.controls(8, torch.Generator().manual_seed(0))
    assert [one.patch for one in kin] == [one.patch for one in again]
    assert stamp.spec().startswith("a patch of ")


@pytest.mark.parametrize("network", [Rows(), One()])
def test_where_all_go_to_one_class_or_stay_nothing_stands_out(network):
    found = looked(network)
    assert found.findings[0]["verdict"] == "no-outlier" and found.findings[0]["score"] < WORTH
    assert not found.stamps


def test_of_one_class_nothing_is_said():
    found = looked(Rows(), given=images()[::CLASSES])
    assert found.findings[0]["verdict"] == "no-outlier" and found.statistic is None
    assert "too few classes" in found.findings[0]["reason"] and not found.pictures


def test_it_needs_a_round():
    with pytest.raises(UsageError, match="rounds are positive"):
        AllToAll(rounds=0)
