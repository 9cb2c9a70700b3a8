"""Stages and taps of networks that follow no family's habits."""

from torch import nn
from torch.nn import functional as F

from bdclean.networks.stages import describe


class Gated(nn.Module):
    """A convolution with a squeeze-and-excitation branch, whose 1x1 layer runs on pooled features."""

    def __init__(self, stride):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(8, 8, 3, stride, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.conv(x)
        return x * self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid()


class Squeeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), Gated(1), Gated(2)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        for layer in (self.stem, self.a, self.b):
            x = self.act(layer(x))
        return self.fc(x.mean((2, 3)))


def test_a_pooled_side_branch_stays_in_its_stage():
    arch = describe("se", Squeeze, (3, 16, 16))
    assert [s.modules for s in arch.stages[1:-1]] == [("a.conv", "a.gate"), ("b.conv", "b.gate")]
    # `act` runs three times: its output is no tap
    assert arch.taps == ("a", "b")


class Tokens(nn.Module):
    """A small transformer: resolution never changes, and attention hides a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(4)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_a_network_of_one_resolution_is_cut_into_equal_parts():
    arch = describe("vit", Tokens, (3, 32, 32))
    assert [s.name for s in arch.stages] == ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    assert all(len(s.modules) == 4 for s in arch.stages[1:-1])
    assert [m.split(".")[1] for s in arch.stages[1:-1] for m in s.modules] == [
        k for k in "0123" for _ in range(4)
    ]


def test_code_without_a_meta_form_runs_on_the_cpu():
    class Looks(Squeeze):
        def forward(self, x):
            if float(x.sum()) > 1e9:
                raise ValueError("too bright")
            return super().forward(x)

    assert describe("looks", Looks, (3, 16, 16)).classes == 3
