"""A device whose memory is too small for a step: the same bits all the same, or one sentence."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdclean.data.scratch import allocate
from bdclean.errors import Refused
from bdclean.training import memory
from bdclean.training.memory import Roomy

IMAGES = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def disk(size):
    return allocate((size,), 0)[0]


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3)
        )


class Device:
    """Four steps of training in which memory is short at the given (step, attempt), after the forward pass."""

    def __init__(self, short=(), host=None, change=None):
        self.model, self.mask, self.short = network(), torch.zeros(3), set(short)
        self.optimiser = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.roomy = Roomy(self.model.parameters(), [*self.model.buffers(), self.mask], host, disk)
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
    assert same(Device(host=10**9).train(), expected)


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


def test_an_allocation_that_fails_on_the_host_is_refused():
    with pytest.raises(Refused, match="bcu needs more memory than is free .* smaller batch"):
        Device([(1, 1)], host=10**9).train()


@pytest.mark.parametrize("host", [0, 8_000])
def test_what_the_host_has_no_room_for_waits_on_disk_to_the_same_bits(host, monkeypatch):
    """Its kernel would end the process: the bytes that wait for the backward pass are counted."""
    monkeypatch.setattr(memory, "LEAST", 0)
    expected, device = Device().train(), Device(host=host)
    assert same(device.train(), expected)
    assert device.roomy.ledger.spilled and device.roomy.ledger.bytes == 0
    held = Device(host=10**9)
    assert same(held.train(), expected) and not held.roomy.ledger.spilled


def test_a_full_disk_is_refused(monkeypatch):
    def full(size):
        raise Refused("full")

    monkeypatch.setattr(memory, "LEAST", 0)
    device = Device(host=100)
    device.roomy.disk = full
    with pytest.raises(Refused, match="the disk has no room for it: give it a smaller batch"):
        device.train()


def test_strides_survive_the_disk_and_files_are_few(monkeypatch):
    monkeypatch.setattr(memory, "LEAST", 0)
    monkeypatch.setattr(memory, "PART", 1000)
    asked = []
    ledger = memory._Ledger(0, [], lambda size: (asked.append(size), disk(size))[1])
    places, tensors = (
        [],
        [
            torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            torch.rand(4, 6).t(),
            torch.rand(4, 6)[:, ::2],
            torch.rand(6).bool(),
            torch.tensor(3.0),
        ],
    )
    for tensor in tensors:
        kept = ledger.keep(tensor)
        assert torch.equal(kept, tensor)
        assert kept.stride() == torch.empty_like(tensor).stride()
        places.append(kept)
    assert asked == [1000]
    assert all(torch.equal(a, b) for a, b in zip(places, tensors, strict=True)), "one wrote over another"
    large = torch.rand(2000)
    assert torch.equal(ledger.keep(large), large) and asked == [1000, 8000]


def test_the_count_is_what_autograd_keeps_and_ends_at_nothing(monkeypatch):
    ledgers = []
    real = memory._Ledger.__init__

    def noting(self, *arguments):
        real(self, *arguments)
        ledgers.append(self)

    monkeypatch.setattr(memory._Ledger, "__init__", noting)
    most = []
    release = memory._Ledger.release
    monkeypatch.setattr(
        memory._Ledger, "release", lambda self, tensor: (most.append(self.bytes), release(self, tensor))
    )
    Device(host=10**9).train()
    (ledger,) = ledgers  # the first step alone is counted
    assert ledger.bytes == 0
    # input 8 x 3 x 6 x 6; convolution, batch norm's and ReLU's outputs 8 x 4 x 4 x 4 each: 4 bytes a number
    assert 4 * (864 + 3 * 512) <= max(most) <= 2 * 4 * (864 + 3 * 512)
