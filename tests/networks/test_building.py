"""Networks that are built to be loaded: nothing is drawn, nothing computed is lost, and nothing waits for a draw."""

import pytest
import torch
from torch import nn
from torchvision import models

from bdclean.networks.building import Undrawn


@pytest.mark.parametrize("name", ["resnet18", "swin_v2_t", "mobilenet_v3_small"])
def test_the_loaded_network_is_the_same(name):
    build = models.get_model_builder(name)
    torch.manual_seed(0)
    drawn = build(num_classes=3).eval()
    with Undrawn():
        network = build(num_classes=3).eval()
    network.load_state_dict(drawn.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(x), drawn(x))


def test_memory_that_nothing_fills_does_not_hang_the_truncated_normal_law(monkeypatch):
    """torch draws until all values are in range: never, where the drawing was skipped and the memory held NaN."""
    monkeypatch.setattr(torch, "empty", lambda *size, **more: torch.full(size, float("nan")))
    weight = nn.Parameter(torch.empty(4, 4))
    with Undrawn():
        nn.init.trunc_normal_(weight, std=0.02)
        assert torch.isnan(weight).all()
        draw = nn.init._no_grad_trunc_normal_ if hasattr(nn.init, "_no_grad_trunc_normal_") else None
        if draw is not None:
            draw(weight, 0.0, 0.02, -2.0, 2.0)
            assert not torch.isnan(weight).any()
    nn.init.trunc_normal_(weight, std=0.02)
    assert not torch.isnan(weight).any()


def test_it_is_undone_after_an_error():
    before = nn.init.trunc_normal_
    with pytest.raises(ValueError), Undrawn():
        raise ValueError
    assert nn.init.trunc_normal_ is before
