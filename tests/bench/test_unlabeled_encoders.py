"""What the bench counts of encoders without labels, on features that are drawn."""

import torch
from torch import nn

from bdclean.bench.unlabeled_encoders import alarms, stamped
from bdclean.measuring.predictor import Predictor
from bdclean.measuring.probe import Features


def test_stamped_images_that_crowd_are_found_and_others_are_not():
    generator = torch.Generator().manual_seed(0)
    clean, place = torch.randn(800, 40, generator=generator), torch.randn(1, 40, generator=generator)
    found = stamped(clean, place + 0.1 * clean, 0.05, 0)
    assert found.found > 0.95 and found.false == 0 and found.crowd > 0.95
    nothing = stamped(clean, clean, 0.05, 0)
    assert nothing.found == nothing.false == 0 and 0.3 < nothing.crowd < 0.7


class Mean(nn.Module):
    """Features that a small patch hardly changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.randn(48, 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        return (nn.functional.avg_pool2d(x.float() / 255, 8).flatten(1) - 0.5) @ self.matrix


def test_an_encoder_that_no_patch_moves_is_not_accused():
    images = torch.randint(
        256, (200, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    found = alarms(Features(Predictor(Mean(), torch.device("cpu"))), images, 0)
    assert found.tried > 36 and found.suspicious <= found.strong <= found.tried
    assert found.suspicious == 0 and found.trigger
