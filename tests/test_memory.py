"""A device whose memory is too small for a step: the same bits all the same, or one sentence."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdclean.errors import Refused
from bdclean.memory import Roomy

IMAGES = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3)
        )


class Device:
    """Four steps of training in which memory is short at the given (step, attempt), after the forward pass."""

    def __init__(self, short=(), spill=True, change=None):
        self.model, self.mask, self.short = network(), torch.zeros(3), set(short)
        self.optimiser = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.roomy = Roomy(self.model.parameters(), [*self.model.buffers(), self.mask], spill)
        self.calls, self.change = [], change

    def train(self, steps=4):
        for number in range(steps):
            attempts = []

            def passes(number=number, attempts=attempts):
                torch.manual_seed(number)
                self.mask += 1
                loss = F.cross_entropy(self.model(IMAGES), torch.arange(8) % 3)
                attempts.append(number)
                self.calls.append(number)
                if (number, len(attempts)) in self.short:
                    if self.change:
                        self.change(self)
                    raise torch.OutOfMemoryError("no room")
                self.optimiser.zero_grad()
                loss.backward()

            self.roomy(passes, "bcu")
            self.optimiser.step()
        return {**copy.deepcopy(self.model.state_dict()), "mask": self.mask.clone()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("short", [(0, 1), (2, 1)])
def test_a_step_without_room_is_repeated_to_the_same_bits(short):
    expected = Device().train()
    device = Device([short])
    assert same(device.train(), expected)
    assert device.roomy.spilling and len(device.calls) == 5
    assert same(Device(spill=False).train(), expected)


def test_activations_really_go_elsewhere_while_spilling(monkeypatch):
    packed = []
    real = torch.autograd.graph.save_on_cpu.__init__

    def noting(self, *arguments, **more):
        packed.append(1)
        real(self, *arguments, **more)

    monkeypatch.setattr(torch.autograd.graph.save_on_cpu, "__init__", noting)
    Device([(1, 1)]).train()
    assert len(packed) == 3  # the repeated step and the two after it


def test_no_room_on_the_host_either_is_refused():
    with pytest.raises(Refused, match="bcu does not fit .* lower batch_size with --set, or use --device cpu"):
        Device([(1, 1), (1, 2)]).train()


def test_a_step_that_has_moved_the_weights_is_not_repeated():
    def change(device):
        with torch.no_grad():
            device.model[0].weight.add_(1)

    with pytest.raises(Refused, match="bcu does not fit .* lower batch_size"):
        Device([(1, 1)], change=change).train()


def test_without_anywhere_to_spill_the_step_is_refused():
    with pytest.raises(Refused, match="does not fit"):
        Device([(0, 1)], spill=False).train()
