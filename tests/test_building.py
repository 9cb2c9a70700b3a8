"""Networks built without drawing weights: nothing waits for numbers that are never drawn."""

import signal

import pytest
import torch
from torch import nn
from torchvision.models import swin_transformer

from bdclean.architectures.building import Undrawn


@pytest.fixture(autouse=True)
def _in_time():
    def late(*_):
        raise TimeoutError("building does not end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (-0.04, 0.04), (1.0, 1.1)])
@pytest.mark.parametrize("held", [0.0, 100.0, float("inf"), float("nan")])
def test_truncated_normals_end_whatever_memory_held(held, bounds):
    """torch draws these anew until all are within bounds; memory that nothing draws into may never be."""
    tensor = torch.full((500,), held)
    with Undrawn():
        assert nn.init.trunc_normal_(tensor, std=0.5, a=bounds[0], b=bounds[1]) is tensor


@pytest.mark.parametrize("held", [100.0, -3.0])
def test_a_swin_is_built_on_used_memory(held):
    """Freed memory of the sizes that the network asks for holds numbers outside any bounds."""
    blocks = [
        torch.full((n,), held) for n in (24 * 96, 24 * 72, 24 * 24, 48 * 192, 48 * 144) for _ in range(20)
    ]
    del blocks
    state = torch.random.get_rng_state()
    with Undrawn():
        swin_transformer.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5)
    assert torch.equal(state, torch.random.get_rng_state())


def test_given_values_are_used_and_other_arithmetic_is_untouched():
    with Undrawn():
        assert torch.empty(3).normal_(2.5, 1).tolist() == [2.5] * 3
        assert torch.empty(3).normal_(mean=1.5).tolist() == [1.5] * 3
        assert torch.empty(3).uniform_(-1, 1).tolist() == [-1] * 3
        assert torch.linspace(0, 1, 3).tolist() == [0, 0.5, 1]
        assert torch.zeros(2).fill_(3).tolist() == [3, 3]
