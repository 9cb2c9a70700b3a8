"""Batch norm folded into convolutions: the same answers, and never where that would not hold."""

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from bdclean.measuring.folding import TOLERANCE, folded
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.preact import PreActNetwork
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess

IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def classifier(network: nn.Module) -> Classifier:
    """Behind ImageNet's normalisation, with statistics and scales that a training could have left."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return Classifier(network, parse_preprocess("imagenet")).eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def answers(model: Classifier, images: Tensor = IMAGES) -> Tensor:
    with torch.inference_mode():
        return model(images)


@pytest.mark.parametrize(
    ("build", "left"),
    [
        (lambda: ResidualNetwork((1, 1, 1), (8, 16, 32), 8, 5), 0),
        # before each block its norm reads a sum, not a convolution; the last one, too
        (lambda: PreActNetwork((1, 1, 1), (16, 32, 64), 16, 5), 4),
        (lambda: models.mobilenet_v2(num_classes=5), 0),
        (lambda: models.shufflenet_v2_x0_5(num_classes=5), 0),
    ],
)
def test_a_folded_network_gives_the_same_answers_and_leaves_the_one_it_was_made_of(build, left):
    torch.manual_seed(0)
    model = classifier(build())
    before, all_norms = {name: t.clone() for name, t in model.state_dict().items()}, norms(model)
    exact, quick = answers(model), folded(model, IMAGES[:2])
    assert quick is not model
    assert norms(quick) == left
    assert norms(model) == all_norms
    assert (answers(quick) - exact).abs().max() <= TOLERANCE * exact.abs().max()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(answers(model), exact)


class Branching(nn.Module):
    """What a trace cannot follow: the way depends on the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = -x
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


class Drawing(Branching):
    """What a trace would freeze: noise that is drawn anew each time."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)) + torch.randn(4))


class TwoReaders(Branching):
    """The convolution's own output is read, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head((self.norm(x) + x).mean((2, 3)))


class Repeated(Branching):
    """One convolution, called twice, once before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.norm(self.conv(x))).mean((2, 3)))


class OwnStatistics(Branching):
    """The norm has no running statistics: it takes each batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


class Keeping(Branching):
    """Keeps a table between calls, made at the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if self.table is None or self.table.shape[-2:] != x.shape[-2:]:
            self.table = torch.ones_like(x[:1])
        return self.head((x * self.table).mean((2, 3)))


class KeepingAll(Keeping):
    """The same, without a way that depends on it."""

    def forward(self, x: Tensor) -> Tensor:
        self.table = self.norm(self.conv(x))
        return self.head(self.table.mean((2, 3)))


@pytest.mark.parametrize("network", [Keeping, KeepingAll])
@pytest.mark.parametrize("called", [False, True])
def test_code_that_keeps_something_between_calls_is_left_unharmed(network, called):
    torch.manual_seed(0)
    model = classifier(network())
    before = answers(model) if called else None
    quick = folded(model, IMAGES[:2])
    for one in (quick, model):
        assert torch.allclose(answers(one), before if called else answers(model), atol=1e-5)
    assert isinstance(model.network.table, Tensor)


@pytest.mark.parametrize("network", [Branching, Drawing])
def test_a_network_whose_code_a_trace_does_not_show_is_left_as_it_is(network):
    torch.manual_seed(0)
    model = classifier(network())
    assert folded(model, IMAGES) is model


@pytest.mark.parametrize("network", [TwoReaders, Repeated, OwnStatistics])
def test_a_norm_stays_where_the_convolution_before_it_has_other_work(network):
    torch.manual_seed(0)
    model = classifier(network())
    quick = folded(model, IMAGES)
    assert norms(quick) == 1
    assert torch.allclose(answers(quick), answers(model), atol=1e-5)


def test_nothing_is_folded_in_training_or_without_batch_norm_or_with_answers_that_are_no_numbers():
    training = classifier(ResidualNetwork((1, 1, 1), (8, 16, 32), 8, 5)).train()
    assert folded(training, IMAGES) is training
    plain = classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 5)))
    assert folded(plain, IMAGES) is plain
    broken = classifier(ResidualNetwork((1, 1, 1), (8, 16, 32), 8, 5))
    nn.init.constant_(broken.network.fc.weight, float("nan"))
    assert folded(broken, IMAGES) is broken
