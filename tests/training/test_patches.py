import random

import pytest
import torch
from torch import nn

from bdclean.training.inversion import spread_out
from bdclean.training.patches import CELLS, LONGEST, NEAR, Drawn, Patch, evolved, of_others, scored, search

RED, BLACK = (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)


def plain(colour, top=0, left=0, tall=4, wide=4):
    return Patch(top, left, tall, wide, ((colour,) * LONGEST,) * LONGEST)


def pictures(n=24, side=32, channels=3):
    return torch.rand((n, channels, side, side), generator=torch.Generator().manual_seed(0))


def mask_at(row, column, colour=RED, side=32):
    mask, pattern = torch.full((side, side), 1e-6), torch.rand((len(colour), side, side))
    mask[row, column], pattern[:, row, column] = 1.0, torch.tensor(colour)
    return mask, pattern


class Cornered(nn.Module):
    """Class 1 is a red square in the corner, class 2 a checker of black and white in the middle; else class 0."""

    def forward(self, x):
        red = (x[:, 0, :4, :4] - x[:, 1, :4, :4] - x[:, 2, :4, :4]).mean((1, 2))
        cells = x.mean(1)[:, 14:18, 14:18]
        signs = torch.ones(4, 4)
        signs[::2, 1::2] = signs[1::2, ::2] = -1
        even = (cells * signs).mean((1, 2))
        return torch.stack([torch.full_like(red, 4), 8 * red, 20 * even.abs()], 1)


@pytest.mark.parametrize("side", [32, 36, 64, 224, 8])
def test_a_patch_covers_its_cells_to_the_border_and_nothing_else(side):
    pixels = pictures(2, side)
    kept, unit, cells = (
        pixels.clone(),
        max(1, round(side / CELLS)),
        max(1, side // max(1, round(side / CELLS))),
    )
    changed = (plain(RED, 1, 2, 3, 4).stamp(pixels) != kept).any(1)[0]
    assert changed.sum() == 12 * unit**2 and changed[unit : 4 * unit, 2 * unit : 6 * unit].all()
    last = plain(RED, cells - 2, cells - 2, 2, 2).stamp(pixels)
    assert torch.equal(last[0, :, -1, -1], torch.tensor(RED))
    assert torch.equal(pixels, kept)


def test_a_patch_shows_the_colour_of_each_cell():
    colours = tuple(tuple((y / 8, x / 8, 0.0) for x in range(LONGEST)) for y in range(LONGEST))
    shown = Patch(4, 5, 2, 3, colours).stamp(pictures(1))[0, :, 4:6, 5:8]
    assert shown[:2].permute(1, 2, 0).tolist() == [[[y / 8, x / 8] for x in range(3)] for y in range(2)]


def test_patches_of_another_place_or_colour_are_unlike():
    patch = plain(RED, 4, 4)
    assert not patch.unlike(plain(RED, 5, 4)) and not patch.unlike(patch)
    assert (
        patch.unlike(plain(RED, 7, 4))
        and patch.unlike(plain(BLACK, 4, 4))
        and patch.unlike(plain(RED, 4, 4, 2, 2))
    )


def test_what_is_drawn_lies_within_the_image_and_near_ones_by_the_mask():
    for side, channels in ((32, 3), (6, 1), (64, 3)):
        mask, pattern = mask_at(1, side - 2, (1.0,) * channels, side)
        drawn, pixels = Drawn(mask, pattern, 3), pictures(1, side, channels)
        patches = [draw() for draw in (drawn.near, drawn.anywhere) for _ in range(50)]
        patches += [drawn.varied(patches) for _ in range(200)]
        for patch in patches:
            assert 1 <= patch.tall <= min(LONGEST, drawn.rows) and 0 <= patch.top <= drawn.rows - patch.tall
            assert (
                1 <= patch.wide <= min(LONGEST, drawn.columns)
                and 0 <= patch.left <= drawn.columns - patch.wide
            )
            assert patch.stamp(pixels).shape == pixels.shape
        assert all(patch.top <= 1 + NEAR for patch in patches[:50])
        assert len({patch.colours for patch in patches}) > 30


def test_the_search_finds_a_red_square_beside_the_mask_and_a_checker_that_no_mask_shows():
    model, pixels = Cornered(), pictures()
    mask, pattern = mask_at(1, 8)
    found = search(model, pixels, Drawn(mask, pattern, 0), 1)
    (best, sent), alone = found[0], scored(model, pixels, [plain(RED, 1, 8, 1, 1)], 1)[0][1]
    assert sent > 0.9 > 0.1 > alone
    assert best.top < 4 and best.left < 4  # it reaches into the trigger's place
    assert [worth for _, worth in found] == sorted((worth for _, worth in found), reverse=True)
    assert all(one.unlike(two) for k, (one, _) in enumerate(found) for two, _ in found[:k])
    checkers = search(model, pixels, Drawn(*mask_at(20, 20), 0), 2)
    assert checkers[0][1] > 0.9
    assert search(model, pixels, Drawn(mask, pattern, 0), 1) == found


def test_the_search_ends_where_nothing_sends_anything():
    def deaf(x):
        return torch.tensor([[0.0, -50.0]]).expand(len(x), 2)

    found = search(deaf, pictures(2), Drawn.blank(3, 32, 32, 0), 1)
    assert found and found[0][1] < 1e-6


def test_scores_do_not_depend_on_how_many_patches_go_at_once(monkeypatch):
    draw = random.Random(0)
    patches = [plain(RED, draw.randrange(28), draw.randrange(28)) for _ in range(9)] + [plain(RED)]
    together = scored(Cornered(), pictures(5), patches, 1)
    monkeypatch.setattr("bdclean.training.patches.PIXELS", 1)
    assert [patch for patch, _ in scored(Cornered(), pictures(5), patches, 1)] == [p for p, _ in together]
    assert together[0][0] == plain(RED)


def test_of_patches_that_do_the_same_the_smaller_one_is_worth_more():
    patches = [plain(RED, 0, 0, 8, 8), plain(RED, 9, 9, 2, 2)]

    def worth(patches):
        return torch.ones(len(patches))

    drawn = Drawn.blank(3, 32, 32, 0)
    assert evolved(drawn, patches, worth, 0.25, 0, 2) == [patches[1], patches[0]]
    (best, *_) = evolved(drawn, patches, worth, 0.25, 8, 2)
    assert best.tall * best.wide <= 2


def test_a_patch_is_packed_whole():
    patch = Drawn.blank(3, 32, 32, 0).anywhere()
    again = Patch.unpack(patch.pack())
    assert torch.equal(again.pack(), patch.pack()) and Patch.unpack(again.pack()) == again
    assert torch.allclose(again.stamp(pictures(2)), patch.stamp(pictures(2)))


@pytest.mark.parametrize("count", [12, 20, 39, 40, 100])
def test_images_that_come_class_by_class_are_taken_from_all_classes(count):
    classes = torch.arange(4).repeat_interleave(10)
    images = classes.to(torch.uint8).view(-1, 1, 1, 1)
    taken = spread_out(images, count).flatten()
    assert (
        len(taken) == min(count, 40) and len(taken.unique()) == 4 and taken.bincount().max() <= count / 4 + 1
    )
    others = (255 * of_others(images, classes, 1, 9, torch.device("cpu"))).round().flatten()
    assert others.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3]
