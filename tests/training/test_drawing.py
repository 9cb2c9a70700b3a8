"""Masks that a small network draws for each image find a trigger that is not the same on every image."""

import pytest
import torch
from torch import nn
from training.test_inversion import CLASSES, SIDE, SIGNS, TARGET, pictures, run

from bdclean.training.drawing import LEADING, STARTS, drawn
from bdclean.training.forms import mask
from bdclean.training.inversion import Inverted, Outlier, invert, outliers, smallest
from bdclean.training.pursuit import clearest


class Moving(nn.Module):
    """Knows each class by a pattern over the whole picture; a bright square, elsewhere for each class, means TARGET."""

    def __init__(self, backdoor):
        super().__init__()
        self.weight, self.backdoor = nn.Parameter(0.1 * SIGNS), backdoor

    def forward(self, x):
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        logits = torch.einsum("nchw,kchw->nk", x - 0.5, self.weight)
        if not self.backdoor:
            return logits
        places = [(2 * (k // 2), 4 * (k % 2) + 1) for k in logits.argmax(1).tolist()]
        squares = [one[:, top : top + 3, left : left + 3] for one, (top, left) in zip(x, places, strict=True)]
        bright = torch.stack([square.mean() for square in squares])
        return logits + 60 * (bright - 0.6).relu()[:, None] * nn.functional.one_hot(
            torch.tensor(TARGET), CLASSES
        )


def inverted(form, backdoor):
    return invert(Moving(backdoor), pictures(), form, torch.arange(CLASSES), run(), steps=60, batch_size=32)


@pytest.mark.parametrize("backdoor", [True, False])
def test_a_trigger_that_moves_from_image_to_image_is_found_by_masks_that_are_drawn_for_each(backdoor):
    masks, found = (inverted(form, backdoor) for form in (mask(SIDE, SIDE), drawn(pictures(16))))
    assert not outliers(masks)[0].any() and len(found.classes) == LEADING
    small, _, limit = outliers(found, masks.sizes)
    assert limit == pytest.approx(0.27 / 0.3 * outliers(masks)[2])
    assert found.classes[small].tolist() == ([TARGET] if backdoor else [])


def test_a_change_that_came_to_nothing_is_not_the_smallest():
    form = drawn(pictures(16))
    rows = form.start(2, torch.Generator().manual_seed(0))[0][:, 0]
    rows[0, -4] = -1e4  # nothing is drawn
    found = Inverted(form, torch.tensor([3, 5]), rows, torch.tensor([0.1, 0.9]))
    assert found.sizes[0] == 0 and smallest(found) == 1
    assert smallest(Inverted(form, torch.tensor([3, 5]), rows, torch.tensor([0.1, 0.2]))) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_its_size_is_the_mean_of_the_masks_on_the_images_that_it_was_made_with(channels):
    images = (255 * torch.rand(4, channels, 8, 12)).to(torch.uint8)
    form = drawn(images)
    rows, kinds = form.start(3, torch.Generator().manual_seed(0))
    assert rows.shape == (3, STARTS, *form.shape) and kinds.tolist() == [0] * STARTS
    pixels = images.float() / 255
    changes = rows[:, 0]
    out = form.stamp(changes, pixels)
    assert out.shape == (3, 4, channels, 8, 12) and 0 <= out.min() and out.max() <= 1
    dark, grey, light = (form.stamp(changes, torch.full_like(pixels[:1], shade)) for shade in (0.2, 0.5, 0.8))
    assert not torch.allclose(grey, (dark + light) / 2, atol=0.01), "one for all images would be linear"
    bias = changes.clone()
    bias[:, -(1 + channels)] = -1e4  # of the mask: nothing is drawn
    assert form.sizes(bias).tolist() == [0, 0, 0] and torch.allclose(form.stamp(bias, pixels)[0], pixels)
    bias[:, -(1 + channels)] = 1e4
    assert form.sizes(bias).tolist() == pytest.approx([96.0] * 3)
    picture = form.picture(changes[0])
    assert picture.shape == (channels, 8, 12) and 0 <= picture.min() and picture.max() <= 1


def test_beside_a_mask_for_each_image_what_is_the_same_for_all_is_worked_against_too():
    each, same = drawn(pictures(16)), mask(SIDE, SIDE)
    found = [
        Outlier(form, target, torch.zeros(form.shape), size, 10.0)
        for form, target, size in (
            (each, 1, 2.0),
            (same, 1, 6.0),
            (each, 2, 4.0),
            (same, 2, 3.0),
            (each, 3, 5.0),
        )
    ]
    assert [(o.form.name, o.target) for o in clearest(found)] == [
        ("sample-specific", 1), ("mask", 2), ("sample-specific", 3), ("mask", 1)
    ]  # fmt: skip
