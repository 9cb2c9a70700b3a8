"""Known triggers in training, and images that carry one already."""

import pytest
import torch
from torch import nn

from bdclean.training.forms import mask
from bdclean.training.inversion import Outlier
from bdclean.training.known import stamped
from bdclean.training.run import Precision, Run
from bdclean.training.stamped import look_stamped
from bdclean.triggers.badnets import BadNets
from bdclean.triggers.sig import SIG

RUN = Run(torch.device("cpu"), Precision(), 0)
PATCH, WAVE = BadNets(4, "bottom-right", "white"), SIG(40, 6)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=120):
    """Of four classes: which quarter of the dark picture is a bit brighter."""
    images = torch.randint(0, 90, (n, 3, 16, 16), generator=generator()).to(torch.uint8)
    for k in range(n):
        images[k, :, 4 * (k % 4) : 4 * (k % 4) + 4, :8] += 60
    return images


class Backdoored(nn.Module):
    """Class 0 where the last rows of columns 12 to 15 are white, or where stripes go across; else the brighter rows."""

    def __init__(self, wave=False):
        super().__init__()
        self.wave = wave

    def forward(self, pixels):
        logits = torch.stack([pixels[:, :, 4 * k : 4 * k + 4, :8].mean((1, 2, 3)) for k in range(4)], 1)
        if self.wave:
            across = torch.sin(2 * torch.pi * 6 * torch.arange(16) / 16)
            fires = (pixels.mean((1, 2)) * across).mean(1) > 0.05
        else:
            fires = pixels[:, :, 12:, 12:].mean((1, 2, 3)) > 0.9
        logits[:, 0] += 5 * fires
        return logits


def inverted():
    """The patch as a fitted mask, not quite its place and content."""
    parameters = torch.full((4, 16, 16), -6.0)
    parameters[0, 12:, 11:] = 4
    parameters[1:] = 5
    return Outlier(mask(16, 16), 0, parameters, 20.0, 30.0)


@pytest.mark.parametrize(
    ("trigger", "stamp", "wave"),
    [(PATCH, PATCH, False), (PATCH, inverted(), False), (WAVE, WAVE, True)],
)
def test_images_that_carry_a_trigger_are_found_and_no_others(trigger, stamp, wave):
    images = pictures()
    carrying = torch.arange(len(images)) < 6
    mixed = torch.cat([trigger(images[:6]), images[6:]])
    found = look_stamped(Backdoored(wave), [stamp], mixed, RUN)
    own = torch.arange(len(images)) % 4 == 0  # of the trigger's class: stamped or not, they are what they are
    assert torch.equal(found & ~own, carrying & ~own) and not (found & ~carrying).any()
    assert not look_stamped(Backdoored(wave), [stamp], images, RUN).any()
    assert not look_stamped(Backdoored(wave), [], mixed, RUN).any()


def test_what_does_not_fire_or_fires_on_too_many_sets_nothing_aside():
    images = pictures()
    assert not look_stamped(Backdoored(), [BadNets(4, "top-right", "white")], PATCH(images), RUN).any()
    half = torch.cat([PATCH(images[:60]), images[60:]])
    assert not look_stamped(Backdoored(), [PATCH], half, RUN).any()


def test_a_half_is_stamped_with_the_trigger_whose_turn_it_is_and_a_half_with_its_kin():
    images = pictures(8)
    for turn, trigger in enumerate([PATCH, WAVE, PATCH]):
        seen = stamped([PATCH, WAVE], images, turn, generator(turn))
        assert torch.equal(seen[:4], trigger(images[:4]))
        assert not torch.equal(seen[4:], trigger(images[4:])) and not torch.equal(seen[4:], images[4:])
        assert torch.equal(seen, stamped([PATCH, WAVE], images, turn, generator(turn)))
    beside = torch.ones(16, 16, dtype=torch.bool)
    beside[12:, 12:] = False
    kin = [stamped([PATCH], images, turn, generator(turn))[4:] for turn in range(4)]
    assert all(torch.equal(one[..., beside], images[4:][..., beside]) for one in kin)
    colours = [len(one[0, :, 12:, 12:].flatten(1).unique(dim=1).T) for one in kin]
    assert min(colours) == 1 and max(colours) > 1  # of one colour and of many in turn
