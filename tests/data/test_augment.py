"""Batched augmentation against the same thing image by image."""

import pytest
import torch
from torch.nn import functional

from bdclean.data.augment import crop, mirror


def some_images(count: int = 64, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_crop_is_a_shifted_window_of_each_padded_image(dtype: torch.dtype) -> None:
    images = some_images(16, 12, 20).to(dtype)
    cropped = crop(images, torch.Generator().manual_seed(1), padding=3)
    down, right = torch.randint(7, (2, 16), generator=torch.Generator().manual_seed(1)).tolist()
    for image, result, row, column in zip(images, cropped, down, right, strict=True):
        padded = functional.pad(image, (3, 3, 3, 3))
        assert torch.equal(result, padded[:, row : row + 12, column : column + 20])


def test_crop_reaches_every_shift_and_zero_padding_changes_nothing() -> None:
    images = torch.ones(2000, 1, 4, 4, dtype=torch.uint8)
    kept = crop(images, torch.Generator().manual_seed(0), padding=2).sum((1, 2, 3))
    assert set(kept.tolist()) == {
        4,
        6,
        8,
        9,
        12,
        16,
    }  # areas left of 4 x 4 when shifted by up to 2 either way
    images = some_images(8)
    same = crop(images, torch.Generator().manual_seed(0), padding=0)
    assert torch.equal(same, images)
    assert same.data_ptr() != images.data_ptr()


def test_mirror_flips_about_half_of_the_images_whole() -> None:
    images = some_images(512, 8, 8)
    mirrored = mirror(images, torch.Generator().manual_seed(0))
    flipped = (mirrored == images.flip(3)).flatten(1).all(1)
    kept = (mirrored == images).flatten(1).all(1)
    assert bool((flipped ^ kept).all())
    assert 200 < int(flipped.sum()) < 312


@pytest.mark.parametrize("augment", [crop, mirror])
def test_augmentation_repeats_bit_for_bit_and_leaves_its_argument(augment) -> None:
    images = some_images()
    before = images.clone()
    first = augment(images, torch.Generator().manual_seed(5))
    second = augment(images, torch.Generator().manual_seed(5))
    assert torch.equal(first, second)
    assert torch.equal(images, before)
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(6)))
