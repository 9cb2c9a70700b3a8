import math

import pytest
import torch
from torch.nn import functional as F

from bdclean import registry
from bdclean.data.corruptions import OF_FAMILY, Shared, corrupt, filtered, rectangles, uniform

ALL = {**OF_FAMILY, "filter": filtered}


def photos(n=48, side=32):
    """Smooth pictures with some detail."""
    generator = torch.Generator().manual_seed(3)
    small = torch.rand((n, 3, 5, 5), generator=generator)
    detail = torch.rand((n, 3, side, side), generator=generator)
    return (0.85 * F.interpolate(small, (side, side), mode="bilinear") + 0.15 * detail).clamp(0, 1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("side", [32, 48])
def test_contract(name, side):
    images = photos(side=side)
    kept = images.clone()
    out = ALL[name](images, seeded())
    assert out.shape == images.shape and out.dtype == images.dtype
    assert 0 <= out.min() and out.max() <= 1
    assert torch.equal(images, kept)
    assert torch.equal(out, ALL[name](images, seeded()))
    assert not torch.equal(out, ALL[name](images, seeded(1)))
    changed = (out - images).abs().flatten(1).mean(1)
    assert bool((changed > 0).all())  # every image changes
    assert changed.mean() < 0.2 and changed.max() < 0.4  # and remains the same picture


@pytest.mark.parametrize("name", ALL)
def test_white_black_and_single_images_stay_in_range(name):
    for value in (0.0, 1.0):
        out = ALL[name](torch.full((1, 3, 32, 32), value), seeded())
        assert 0 <= out.min() and out.max() <= 1 and bool(torch.isfinite(out).all())


@pytest.mark.parametrize("name", ["patch", "wave", "tone", "noise", "filter"])
def test_each_image_gets_its_own_draw(name):
    out = ALL[name](photos(1).expand(8, 3, 32, 32), seeded())
    assert len({tuple(image.flatten().tolist()) for image in out}) == 8


@pytest.mark.parametrize("name", ALL)
def test_a_shared_draw_is_the_same_for_all_images_and_for_any_number_of_them(name):
    same = photos(1).expand(8, 3, 32, 32)
    out = ALL[name](same, Shared(seeded()))
    assert torch.allclose(out, out[:1].expand_as(out), atol=1e-6) and not torch.equal(out, same)
    images = photos(8)
    many = ALL[name](images, Shared(seeded(4)))
    assert torch.allclose(many[:3], ALL[name](images[:3], Shared(seeded(4))), atol=1e-6)


def test_a_patch_changes_few_pixels_and_the_rest_not_at_all():
    images = photos()
    same = (OF_FAMILY["patch"](images, seeded()) == images).all(1).float().mean((1, 2))
    assert same.median() > 0.8 and same.min() > 0.3


def test_tone_is_its_formula():
    images = photos(4)
    out, generator = OF_FAMILY["tone"](images, seeded(5)), seeded(5)
    gamma = uniform((4,), -0.4, 0.4, images, generator)
    gain = uniform((4, 3), 0.85, 1.15, images, generator)
    lift = uniform((4,), -0.08, 0.08, images, generator)
    contrast = uniform((4,), 0.75, 1.25, images, generator)
    for n, image in enumerate(images):
        mean = image.mean().item()
        for c in range(3):
            for x in (0, 7, 31):
                toned = image[c, 5, x].item() ** math.exp(gamma[n]) * gain[n, c].item()
                expected = (toned - mean) * contrast[n].item() + mean + lift[n].item()
                assert out[n, c, 5, x].item() == pytest.approx(min(1, max(0, expected)), abs=1e-5)


def test_blur_is_its_formula():
    images = photos(3)
    out, generator = OF_FAMILY["blur"](images, seeded(2)), seeded(2)
    sigma = uniform((3, 1), 0.3, 1.0, images, generator)
    sharpen = uniform((3, 1, 1, 1), 0, 1, images, generator) < 0.3
    for n in range(3):
        weights = [math.exp(-(k**2) / (2 * sigma[n].item() ** 2)) for k in range(-2, 3)]
        total, around = sum(weights), 0.0
        for i in range(5):
            for j in range(5):
                share = weights[i] * weights[j] / total**2
                around += share * images[n, 1, 10 + i - 2, 20 + j - 2].item()
        here = images[n, 1, 10, 20].item()
        expected = 2 * here - around if sharpen[n] else around
        assert out[n, 1, 10, 20].item() == pytest.approx(min(1, max(0, expected)), abs=1e-5)


def test_half_of_the_rectangles_are_at_a_rim_and_none_leaves_the_picture():
    masks = rectangles(2000, 32, 32, torch.zeros(1), seeded(), low=2, high=8)
    sides = masks.any(3).sum(2), masks.any(2).sum(2)
    for side in sides:
        assert side.min() >= 2 and side.max() <= 8
    assert torch.equal(masks.sum((2, 3)), sides[0] * sides[1])  # one full rectangle each


def test_corrupt_uses_each_family_and_only_those_named():
    images = photos(60)
    assert torch.equal(
        corrupt(images, ["tone", "warp"], seeded()), corrupt(images, ["tone", "warp"], seeded())
    )
    dark = torch.zeros(60, 3, 32, 32)
    out = corrupt(dark, ["warp", "patch"], seeded())
    moved = out.flatten(1).any(1)
    assert 10 < int(moved.sum()) < 50  # a warp of a black picture is black
    assert not dark.any()


def test_the_registry_names_the_same_families():
    assert tuple(OF_FAMILY) == registry.FAMILIES


def test_a_filter_shifts_colours_where_it_sees_fit_and_by_up_to_64_grey_levels():
    images = photos(64)
    change = (filtered(images, seeded()) - images).abs()
    assert 30 / 255 < change.max() <= 64.5 / 255
    one = (filtered(images[:1], seeded()) - images[:1]).flatten(2).std(2)
    assert (one > 0.5 / 255).any()  # not one shift for all pixels
