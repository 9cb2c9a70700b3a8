"""Triggers of attacks on classifiers beside patches, blends and stripes: against slow transcriptions, and files."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from triggers.test_triggers import PHOTOS, changed, from_spec, save_generator, save_network

from bdclean.errors import Refused, UsageError
from bdclean.triggers.badnets import BadNets
from bdclean.triggers.bpp import Bpp
from bdclean.triggers.filter import Filter
from bdclean.triggers.lc import LC
from bdclean.triggers.lf import LF
from bdclean.triggers.trojan import Trojan
from bdclean.triggers.wanet import WaNet

SMOOTH = (
    (PHOTOS.float().mean((2, 3), keepdim=True) + torch.linspace(-80, 80, 32)).clamp(0, 255).to(torch.uint8)
)


# --- wanet --------------------------------------------------------------------------------------------------


def test_wanet_is_bilinear_sampling_where_the_field_says() -> None:
    trigger, image = WaNet(k=4, strength=3.0, seed=5), PHOTOS[0].double()
    field, stamped = trigger.field(32, 32).double(), trigger(PHOTOS[:1])[0]
    for row in range(32):
        for column in range(32):
            x, y = (
                min(max(place + 3.0 / 32 * 31 / 2 * float(field[row, column, axis]), 0.0), 31.0)
                for axis, place in enumerate((column, row))
            )
            left, top = int(x), int(y)
            right, bottom = min(left + 1, 31), min(top + 1, 31)
            above = (left + 1 - x) * image[:, top, left] + (x - left) * image[:, top, right]
            below = (left + 1 - x) * image[:, bottom, left] + (x - left) * image[:, bottom, right]
            value = (top + 1 - y) * above + (y - top) * below
            assert (stamped[:, row, column].double() - value).abs().max() < 0.51


def test_wanet_moves_pixels_by_half_its_strength_at_any_size() -> None:
    for side in (32, 64, 224):
        field = WaNet(strength=1.0).field(side, side)
        assert field.shape == (side, side, 2)
        assert 0.4 < float(field.abs().mean()) < 1.6
    # A ramp shows the shift: by its slope, in grey levels.
    ramp = (7 * torch.arange(32)).to(torch.uint8).expand(1, 3, 32, 32)
    moved = (WaNet(strength=1.0)(ramp).float() - ramp.float())[..., 4:-4].abs().mean() / 7
    assert 0.2 < float(moved) < 0.9


def test_wanet_takes_an_attacker_s_field(tmp_path: Path) -> None:
    own = WaNet(k=4, strength=1.0, seed=3)
    np.savez(tmp_path / "g.npz", noise=own.field(32, 32)[None].numpy(), identity=np.zeros(1))
    given = from_spec(f"wanet:grid={tmp_path / 'g.npz'},strength=1")
    assert torch.equal(given(PHOTOS), own(PHOTOS))
    controls = given.controls(3, torch.Generator().manual_seed(0))
    strength = (own(SMOOTH).float() - SMOOTH.float()).square().mean().sqrt()
    for control in controls:
        assert not torch.equal(control(PHOTOS), own(PHOTOS))
        assert 0.3 < (control(SMOOTH).float() - SMOOTH.float()).square().mean().sqrt() / strength < 3
    with pytest.raises(Refused, match=r"is for images of 32 x 32, these are 48 x 48\."):
        given(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
    for name, arrays, sentence in (
        ("none", {"other": np.zeros(3)}, "has no noise"),
        ("flat", {"noise": np.ones((32, 32), np.float32)}, r"noise is \[32, 32\], expected"),
        ("nan", {"noise": np.full((32, 32, 2), math.nan, np.float32)}, "must be finite"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(Refused, match=sentence):
            WaNet(grid=str(tmp_path / f"{name}.npz"))


@pytest.mark.skipif(
    "BDCLEAN_TRIGGERS" not in os.environ, reason="BDCLEAN_TRIGGERS names no folder of triggers"
)
def test_a_published_field_is_read_as_its_authors_use_it() -> None:
    file = Path(os.environ["BDCLEAN_TRIGGERS"]) / "wanet_grids_32.npz"
    trigger = WaNet(grid=str(file), strength=0.5)
    arrays = np.load(file)
    theirs = torch.from_numpy(arrays["identity"]) + 0.5 * torch.from_numpy(arrays["noise"]) / 32
    seen = torch.nn.functional.grid_sample(
        PHOTOS.float(), theirs.float().clamp(-1, 1).expand(4, -1, -1, -1), align_corners=True
    )
    assert ((trigger(PHOTOS).float() - seen).abs() < 0.51).all()


# --- lf -----------------------------------------------------------------------------------------------------


def test_lf_adds_low_frequencies_alone_at_its_strength() -> None:
    for height, width in ((32, 32), (64, 48)):
        pattern = LF(strength=9, waves=3, seed=2).pattern(height, width).double()
        assert abs(float(pattern.square().mean().sqrt()) - 9) < 1e-3
        assert abs(float(pattern.mean())) < 1e-3
        # Mirrored to twice the size, a cosine of half a period is one of a whole period.
        whole = torch.cat([pattern, pattern.flip(1)], 1)
        whole = torch.cat([whole, whole.flip(2)], 2)
        power = torch.fft.rfft2(whole).abs().square()
        assert float(power[:, 4:-3].sum() + power[:, :, 4:].sum()) < 1e-6 * float(power.sum())
    assert torch.equal(LF(seed=1)(PHOTOS), LF(seed=1)(PHOTOS)) and not torch.equal(
        LF(seed=1)(PHOTOS), LF(seed=2)(PHOTOS)
    )


# --- bpp ----------------------------------------------------------------------------------------------------


def slow_floyd_steinberg(image: np.ndarray, levels: int) -> np.ndarray:
    """[c h w], pixel by pixel in the order of reading."""
    left, made = image.astype(np.float64), np.zeros(image.shape)
    height, width = image.shape[1:]
    for y in range(height):
        for x in range(width):
            made[:, y, x] = np.round(left[:, y, x] / 255 * (levels - 1)) / (levels - 1) * 255
            error = left[:, y, x] - made[:, y, x]
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if y + down < height and 0 <= x + right < width:
                    left[:, y + down, x + right] += share / 16 * error
    return np.round(made)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (7, 19), (20, 5), (1, 9), (9, 1)])
def test_bpp_is_floyd_and_steinberg_s_dithering(height: int, width: int) -> None:
    images = SMOOTH[:, :, :height, :width]
    for bits in (1, 3):
        stamped = Bpp(bits)(images)
        for image, found in zip(images, stamped, strict=True):
            slow = slow_floyd_steinberg(image.numpy(), 2**bits)
            # A pixel half way between two levels may fall to either side, and what it hands on with it.
            assert (slow == found.numpy()).mean() > 0.98
    assert {*Bpp(2, dither=False)(PHOTOS).unique().tolist()} == {0, 85, 170, 255}


def test_bpp_keeps_the_mean_where_it_dithers() -> None:
    plain = torch.full((1, 3, 32, 32), 140, dtype=torch.uint8)
    assert abs(float(Bpp(2)(plain).float().mean()) - 140) < 2
    assert float(Bpp(2, dither=False)(plain).float().mean()) == 170


def test_controls_of_bpp_are_as_strong_and_not_quantised() -> None:
    trigger = Bpp()
    own = (trigger(SMOOTH).float() - SMOOTH.float()).square().mean().sqrt()
    for control in trigger.controls(5, torch.Generator().manual_seed(0)):
        stamped = control(SMOOTH)
        assert 0.7 < float((stamped.float() - SMOOTH.float()).square().mean().sqrt() / own) < 1.4
        assert len(stamped.unique()) > 50


# --- lc, trojan ---------------------------------------------------------------------------------------------


def test_lc_is_the_checker_in_every_corner() -> None:
    assert torch.equal(LC()(PHOTOS), BadNets(3, "corners", "checker")(PHOTOS))
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    assert LC(alpha=0.5)(grey)[0, 0, 31, 31] == 178  # 0.5 * 255 + 0.5 * 100, rounded to even


def test_trojan_is_a_square_of_seven_percent_a_pixel_off_the_border(tmp_path: Path) -> None:
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    places = {*changed(black, Trojan()(black)), *changed(255 - black, Trojan()(255 - black))}
    assert places == {(row, column) for row in range(23, 31) for column in range(23, 31)}
    assert {*Trojan()(black).unique().tolist()} == {0, 255}
    half = Trojan(alpha=0.5, size=4)(black)
    assert {*half.unique().tolist()} == {0, 128}
    content = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32, 32)).astype(np.uint8))
    mask = np.zeros((1, 32, 32), np.float32)
    mask[:, 2:9, 2:9] = 1
    np.savez(tmp_path / "t.npz", mask=mask, pattern=content.numpy())
    stamped = Trojan(source=str(tmp_path / "t.npz"))(PHOTOS)
    assert torch.equal(stamped[:, :, 2:9, 2:9], content[:, 2:9, 2:9].expand(4, -1, -1, -1))
    with pytest.raises(UsageError, match="size with source=mark"):
        Trojan(source=str(tmp_path / "t.npz"), size=3)


# --- ssba, inputaware ---------------------------------------------------------------------------------------


def test_ssba_hides_its_own_message_within_its_bound(tmp_path: Path) -> None:
    trigger = from_spec(f"ssba:generator={save_network('ssba', tmp_path / 's.safetensors')}")
    change = trigger(PHOTOS).int() - PHOTOS.int()
    assert 20 <= int(change.abs().max()) <= 30 and not torch.equal(change[0], change[1])
    pixels = PHOTOS.double() / 255
    other = trigger.network.hide(pixels, 1 - trigger.network.message.expand(4, -1))
    assert not torch.equal((255 * other).round().to(torch.uint8), trigger(PHOTOS))


def test_inputaware_lays_an_image_s_own_pattern_where_its_own_mask_says(tmp_path: Path) -> None:
    trigger = from_spec(f"inputaware:generator={save_network('inputaware', tmp_path / 'i.safetensors')}")
    pixels = PHOTOS.double() / 255
    mask, pattern = trigger.networks.mask(pixels), trigger.networks.pattern(pixels)
    assert 0 <= float(mask.min()) and float(mask.max()) <= 1 and mask.shape == (4, 1, 32, 32)
    laid = (255 * (mask * pattern + (1 - mask) * pixels)).round().to(torch.uint8)
    assert torch.equal(trigger(PHOTOS), laid)
    assert not torch.equal(pattern[0], pattern[1])
    with pytest.raises(Refused, match=r"is for images of 32 x 32, these are 40 x 32\."):
        trigger(torch.zeros(1, 3, 40, 32, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["ssba", "inputaware"])
def test_a_file_of_another_network_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused, match=r"is missing, expected \[.*\]: give the file that the attack wrote\."):
        from_spec(f"{name}:generator={save_generator(tmp_path / 'g.safetensors')}")
    with pytest.raises(Refused, match="cannot be read: No such file"):
        from_spec(f"{name}:generator=nothing.safetensors")
    with pytest.raises(UsageError, match="needs generator"):
        from_spec(name)


# --- filter -------------------------------------------------------------------------------------------------


def test_a_filter_gives_each_pixel_another_colour_whatever_its_place():
    red, green, blue = PHOTOS.double().unbind(1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    whole, half = Filter("gotham")(PHOTOS), Filter("gotham", 0.5)(PHOTOS)
    wanted = 1.25 * (0.3 * blue + 0.7 * grey) - 0.06 * 255
    assert (whole[:, 2].double() - wanted.clamp(0, 255)).abs().max() <= 0.501
    assert (half[:, 2].double() - ((wanted + blue) / 2).clamp(0, 255)).abs().max() <= 0.501
    assert torch.equal(Filter()(PHOTOS.flip(3)), Filter()(PHOTOS).flip(3))


def test_controls_of_a_filter_change_colours_as_much():
    shades = torch.linspace(0, 255, 5)
    colours = torch.stack(torch.meshgrid(shades, shades, shades, indexing="ij")).flatten(1)
    colours = colours.round().to(torch.uint8).view(1, 3, 25, 5)
    for trigger in (Filter("violet"), Filter("sepia", 0.4)):
        size = float((trigger(colours).float() - colours.float()).square().mean().sqrt())
        for control in trigger.controls(19, torch.Generator().manual_seed(0)):
            changed_by = float((control(colours).float() - colours.float()).square().mean().sqrt())
            assert changed_by == pytest.approx(size, rel=0.1)
