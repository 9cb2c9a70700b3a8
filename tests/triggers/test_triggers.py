"""Triggers: what they stamp against slow transcriptions, their controls, their files, and the stock bank."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bdclean.errors import Refused, UsageError
from bdclean.registry import FAMILIES, TRIGGERS, configure, load, parse_spec
from bdclean.triggers import generators
from bdclean.triggers.badnets import BadNets
from bdclean.triggers.bank import bank, make_triggers
from bdclean.triggers.blend import Blend
from bdclean.triggers.content import picture, surrogate
from bdclean.triggers.file import File
from bdclean.triggers.inputaware import MaskAndPattern
from bdclean.triggers.sig import SIG
from bdclean.triggers.ssba import Steganographer

PHOTOS = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
GREYS = torch.stack(
    [torch.from_numpy(np.array(Image.fromarray(p.permute(1, 2, 0).numpy()).convert("L"))) for p in PHOTOS]
)[:, None]
OF_CHANNELS = {3: PHOTOS, 1: GREYS}


def from_spec(spec: str):
    name, settings = parse_spec(spec)
    return configure(load(TRIGGERS, name), settings)


def changed(before: torch.Tensor, after: torch.Tensor) -> list[tuple[int, int]]:
    """(row, column) of every pixel that differs in any image and channel."""
    return [tuple(place) for place in (before != after).any(0).any(0).nonzero().tolist()]


def example(name: str, folder: Path):
    """A trigger of that name: with its defaults, and where it needs settings with these."""
    if name in ("blto", "inactive"):
        return from_spec(f"{name}:path={save_generator(folder / 'g.safetensors')}")
    if name in ("ssba", "inputaware"):
        return from_spec(f"{name}:generator={save_network(name, folder / 'g.safetensors')}")
    if name != "file":
        return from_spec(name)
    noise = torch.randint(0, 256, (9, 9, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "mark.png")
    return from_spec(f"file:{folder / 'mark.png'},size=9,position=bottom-right")


def save_network(name: str, path: Path) -> str:
    """A file of random weights of what draws the triggers of ssba or inputaware, strong enough to change an image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Steganographer(30.0) if name == "ssba" else MaskAndPattern(32, 32)
    with torch.no_grad():
        last = network.change if isinstance(network, Steganographer) else network.pattern_network.drawn
        last.weight.mul_(20)
    generators.write(network, str(path))
    return str(path)


def save_generator(path: Path, bound: float = 30.0) -> str:
    """A file of a generator that uses its bound: random weights alone hardly change an image."""
    generator = generators.fresh(bound, 0)
    with torch.no_grad():
        generator.change.weight.mul_(20)
    generators.write(generator, str(path))
    return str(path)


# --- every trigger that is registered, and every one of the bank --------------------------------------------


@pytest.mark.parametrize("channels", OF_CHANNELS)
@pytest.mark.parametrize("name", TRIGGERS)
def test_every_registered_trigger_keeps_the_contract(name, channels, tmp_path) -> None:
    trigger = example(name, tmp_path)
    assert type(trigger).name == name and trigger.family in FAMILIES
    assert dataclasses.is_dataclass(trigger) and type(trigger).__dataclass_params__.frozen
    test_contract(trigger, channels)
    test_controls_have_the_mask_and_strength_but_other_content(trigger, channels)


@pytest.mark.parametrize("channels", OF_CHANNELS)
@pytest.mark.parametrize("trigger", bank((32, 32)), ids=lambda trigger: trigger.spec())
def test_contract(trigger, channels) -> None:
    images = OF_CHANNELS[channels].clone()
    stamped = trigger(images)
    assert torch.equal(images, OF_CHANNELS[channels]), "wrote into its argument"
    assert stamped.dtype == torch.uint8 and stamped.shape == images.shape
    assert stamped.data_ptr() != images.data_ptr()
    assert (stamped != images).flatten(1).any(1).all()
    assert torch.equal(stamped, trigger(images))
    # No image depends on its neighbours in the batch.
    assert torch.equal(stamped[1:2], trigger(images[1:2]))
    assert from_spec(trigger.spec()) == trigger
    assert trigger(images[:0]).shape == (0, channels, 32, 32)
    for wrong in (
        images.float() / 255,
        images.permute(0, 2, 3, 1),
        images[0],
        images.expand(4, -1, -1, -1)[:, [0, 0]],
    ):
        with pytest.raises(TypeError, match="triggers stamp uint8"):
            trigger(wrong)


@pytest.mark.parametrize("channels", OF_CHANNELS)
@pytest.mark.parametrize("trigger", bank((32, 32)), ids=lambda trigger: trigger.spec())
def test_controls_have_the_mask_and_strength_but_other_content(trigger, channels) -> None:
    images = OF_CHANNELS[channels].clone()
    controls = trigger.controls(19, torch.Generator().manual_seed(0), channels)
    again = trigger.controls(19, torch.Generator().manual_seed(0), channels)
    assert len(controls) == 19
    grey = torch.full((1, channels, 32, 32), 128, dtype=torch.uint8)
    if trigger.family in ("warp", "tone"):  # they move and recolour what is there
        grey = PHOTOS[:1, :channels]
    own = trigger(grey).float() - grey.float()
    seen, first = set(), trigger(grey).numpy().tobytes()
    for control, same in zip(controls, again, strict=True):
        stamped = control(images)
        assert torch.equal(images, OF_CHANNELS[channels])
        assert torch.equal(stamped, control(images)) and torch.equal(stamped, same(images))
        seen.add(control(grey).numpy().tobytes())
        if trigger.family == "patch":
            own_pixels = {*changed(images, 255 - trigger(255 - images)), *changed(images, trigger(images))}
            # a grey pixel may have the trigger's level by chance
            assert len(set(changed(images, stamped)) - own_pixels) <= (channels == 1)
        else:
            strength = (
                control(grey).float() - grey.float()
            ).square().mean().sqrt() / own.square().mean().sqrt()
            assert 0.5 < strength < 2
    assert first not in seen, "a control is the trigger itself"
    # a single grey pixel has only so many levels
    assert len(seen) == 19 or (channels == 1 and isinstance(trigger, BadNets) and len(seen) > 14)


@pytest.mark.parametrize("name", ["white", "red", "#2080d0"])
def test_a_colour_is_the_grey_level_that_pillow_gives_it(name) -> None:
    coloured = BadNets(5, pattern=name).patch()
    grey = np.array(Image.fromarray(coloured.transpose(1, 2, 0)).convert("L"))
    assert (BadNets(5, pattern=name).patch(1)[0] == grey).all()


def test_grey_noise_has_the_contrast_of_one_channel() -> None:
    noise = Blend(seed=3).content(64, 64, 1).float()
    assert noise.shape == (1, 64, 64) and abs(float(noise.std()) - 255 / math.sqrt(12)) < 2


@pytest.mark.parametrize("planes", [1, 3])
def test_a_file_with_a_mask_is_turned_grey_as_its_result_on_colours_would_be(planes, tmp_path) -> None:
    draw = torch.Generator().manual_seed(2)
    arrays = {
        "mask": torch.rand(planes, 32, 32, generator=draw),
        "pattern": 255 * torch.rand(3, 32, 32, generator=draw),
    }
    save_file(arrays, tmp_path / "t.safetensors")
    trigger = File(str(tmp_path / "t.safetensors"), alpha=0.5)
    coloured = trigger(GREYS.expand(-1, 3, -1, -1)).float()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    assert float((trigger(GREYS) - (coloured * weights).sum(1, keepdim=True)).abs().max()) <= 1


def test_ctrl_on_grey_images_waves_the_grey_level_itself() -> None:
    change = from_spec("ctrl")(torch.full((1, 1, 32, 32), 128, dtype=torch.uint8)).float() - 128
    spectrum = torch.fft.rfft2(change[0, 0] - change.mean()).abs()
    assert float(change.square().mean().sqrt()) > 3 and float(spectrum.max()) > 500


def test_a_trigger_that_is_given_twice_counts_once():
    specs = (
        "badnets:size=3",
        "sig",
        "badnets",
        "badnets:size=3,position=bottom-right",
        "sig:delta=40",
        "badnets",
    )
    made = make_triggers(specs, (32, 32))
    assert len(made) == len({trigger.spec() for trigger in made}) < len(specs)
    assert made[0] == make_triggers(specs[:1], (32, 32))[0]


def test_the_bank_is_of_the_expected_size_and_scales() -> None:
    assert 30 <= len(bank((32, 32))) <= 40
    for size in [(32, 32), (64, 64), (224, 224), (28, 36)]:
        images = torch.full((1, 3, *size), 100, dtype=torch.uint8)
        stamped = {trigger(images).numpy().tobytes() for trigger in bank(size)}
        assert len(stamped) == len(bank(size)) >= 30
    assert [trigger.spec() for trigger in make_triggers((), (32, 32))] == [t.spec() for t in bank((32, 32))]
    more = [trigger.spec() for trigger in make_triggers((), (32, 32), "encoder")][len(bank((32, 32))) :]
    assert more == ["badencoder", "ctrl"], "what encoders are attacked with joins their bank"
    large = bank((224, 224))[0](torch.full((1, 3, 224, 224), 100, dtype=torch.uint8))[0, 0, -21:, -21:]
    assert torch.equal(
        large[::7, ::7], torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    )


# --- badnets ------------------------------------------------------------------------------------------------


def test_checker_is_the_published_patch() -> None:
    stamped = BadNets()(PHOTOS)
    patch = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    assert (stamped[:, :, 29:, 29:] == patch).all()
    stamped[:, :, 29:, 29:] = PHOTOS[:, :, 29:, 29:]
    assert torch.equal(stamped, PHOTOS)


@pytest.mark.parametrize(
    ("position", "margin", "corner"),
    [
        ("top-left", 0, (0, 0)),
        ("top-right", 1, (1, 27)),
        ("bottom-left", 2, (26, 2)),
        ("bottom-right", 1, (27, 27)),
        ("center", 0, (14, 14)),
        ("5/9", 0, (9, 5)),
    ],
)
def test_positions(position: str, margin: int, corner: tuple[int, int]) -> None:
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    places = changed(grey, BadNets(4, position, "white", margin)(grey))
    assert places[0] == corner
    assert places[-1] == (corner[0] + 3, corner[1] + 3)
    assert len(places) == 16


def test_four_corners_colours_and_alpha() -> None:
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    assert len(changed(grey, BadNets(3, "corners", "white")(grey))) == 36
    assert BadNets(1, pattern="#0180ff")(grey)[0, :, 31, 31].tolist() == [1, 128, 255]
    assert BadNets(1, pattern="white", alpha=0.25)(grey)[0, :, 31, 31].tolist() == [139] * 3  # 138.75
    assert BadNets(4, pattern="random", cells=2, seed=7).patch()[:, ::2, ::2].tolist() == (
        np.random.default_rng(7).integers(0, 256, (3, 2, 2)).tolist()
    )


@pytest.mark.parametrize(
    "spec",
    [
        "badnets:size=0",
        "badnets:position=middle",
        "badnets:position=1/2/3",
        "badnets:pattern=plaid",
        "badnets:pattern=#12345",
        "badnets:alpha=0",
        "badnets:alpha=1.5",
        "badnets:margin=-1",
        "badnets:cells=9",
        "badnets:seed=-1",
        "blend:alpha=2",
        "blend:seed=-1",
        "sig:delta=0",
        "sig:frequency=-1",
        "sig:angle=1000",
        "wanet:k=1",
        "wanet:seed=18446744073709551616",
        "lf:seed=18446744073709551616",
        "ssl-backdoor:seed=18446744073709551616",
        "wanet:strength=0",
        "lf:strength=0",
        "lf:waves=0",
        "filter:tone=plaid",
        "filter:strength=0",
        "bpp:bits=8",
        "trojan:alpha=0",
        "trojan:size=-1",
        "lc:size=0",
    ],
)
def test_settings_out_of_range_are_wrong_usage(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_spec(spec)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("trigger", [BadNets(9), BadNets(3, "7/2"), BadNets(3, margin=6)])
def test_a_patch_that_does_not_fit_is_refused(trigger: BadNets) -> None:
    with pytest.raises(Refused, match="does not fit into images of 8 x 8"):
        trigger(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_controls_of_a_white_square_are_not_nearly_white() -> None:
    for control in BadNets(pattern="white").controls(200, torch.Generator().manual_seed(0)):
        assert (255.0 - control.patch()).mean() >= 48


# --- blend --------------------------------------------------------------------------------------------------


def test_blend_is_the_equation_with_the_agreed_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32)).astype(np.float32)
    exact = np.float32(0.2) * noise + np.float32(0.8) * PHOTOS.numpy().astype(np.float32)
    assert abs(Blend()(PHOTOS).numpy() - exact).max() <= 0.5 + 1e-3
    assert any(trigger == Blend("noise", 0.2, seed=0) for trigger in bank((32, 32)))


def test_blend_extremes() -> None:
    assert torch.equal(Blend(alpha=1)(PHOTOS)[0], Blend(alpha=1)(PHOTOS)[1])
    assert torch.equal(Blend(alpha=1e-6)(PHOTOS), PHOTOS)


def test_a_picture_is_the_same_scene_at_any_size() -> None:
    small, large = picture(3, 32, 32).astype(float), picture(3, 96, 96).astype(float)
    shrunk = large.reshape(3, 32, 3, 32, 3).mean((2, 4))
    assert abs(small - shrunk).mean() < 6
    assert abs(small - picture(4, 32, 32)).mean() > 30


def test_blend_of_a_file_and_its_controls(tmp_path: Path) -> None:
    Image.fromarray(picture(5, 64, 64).transpose(1, 2, 0)).save(tmp_path / "cat.png")
    trigger = Blend(str(tmp_path / "cat.png"), 0.3)
    assert from_spec(trigger.spec()) == trigger
    stamped = trigger(PHOTOS)
    for control in trigger.controls(5, torch.Generator().manual_seed(0)):
        assert 3 < (control(PHOTOS).float() - stamped.float()).abs().mean() < 40
    with pytest.raises(Refused, match="nothing.png cannot be read"):
        Blend("nothing.png")


def test_surrogates_keep_mean_energy_and_spectrum() -> None:
    values = torch.from_numpy(picture(1, 20, 31)).float()
    other = surrogate(values, torch.Generator().manual_seed(0))
    assert torch.allclose(other.mean((1, 2)), values.mean((1, 2)), atol=1e-3)
    assert torch.allclose(torch.fft.rfft2(other).abs(), torch.fft.rfft2(values).abs(), rtol=1e-3, atol=2)
    assert (other - values).abs().mean() > 20


# --- sig ----------------------------------------------------------------------------------------------------


def test_sig_is_the_equation() -> None:
    stamped = SIG(20, 6)(PHOTOS)
    for column in range(32):
        wave = 20 * math.sin(2 * math.pi * column * 6 / 32)
        expected = (PHOTOS[..., column].double() + wave).clamp(0, 255)
        assert float((stamped[..., column].double() - expected).abs().max()) <= 0.5 + 1e-4
    turned = SIG(20, 6, angle=90)(PHOTOS.transpose(2, 3))
    assert float((turned.transpose(2, 3).double() - stamped.double()).abs().max()) <= 1
    assert float((turned.transpose(2, 3) != stamped).double().mean()) < 0.01


def test_controls_of_sig_are_other_stripes() -> None:
    trigger = SIG(20, 6)
    own = trigger.wave(32, 32)
    for control in trigger.controls(100, torch.Generator().manual_seed(0)):
        assert control.delta == 20
        other = control.wave(32, 32)
        assert abs(float((own * other).mean())) < 0.5 * float(own.square().mean())


# --- file ---------------------------------------------------------------------------------------------------


def test_a_small_png_with_alpha_is_placed(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[1:3, 2:5, 3] = 255
    pixels[0, 0, 3] = 51
    Image.fromarray(pixels).save(tmp_path / "mark.png")
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    trigger = File(str(tmp_path / "mark.png"), position="top-left", margin=2)
    stamped = trigger(grey)
    assert changed(grey, stamped) == [(2, 2), *[(row, column) for row in (3, 4) for column in (4, 5, 6)]]
    assert stamped[0, :, 3, 4].tolist() == [200, 0, 0]
    assert stamped[0, :, 2, 2].tolist() == [120, 80, 80]
    assert trigger.family == "patch"
    assert from_spec(trigger.spec()) == trigger
    for control in trigger.controls(19, torch.Generator().manual_seed(0)):
        assert set(changed(grey, control(grey))) <= set(changed(grey, stamped))
        assert (control(grey) != stamped).any()
    assert len(changed(grey, File(str(tmp_path / "mark.png"), size=12)(grey))) > 4 * 6


def test_a_large_png_is_resized_and_an_opaque_one_refused(tmp_path: Path) -> None:
    Image.fromarray(picture(0, 50, 50).transpose(1, 2, 0)).save(tmp_path / "photo.png")
    path = str(tmp_path / "photo.png")
    with pytest.raises(Refused, match="covers every pixel of 32 x 32"):
        File(path)(PHOTOS)
    assert len(changed(PHOTOS, File(path, size=5, position="3/3")(PHOTOS))) == 25
    assert torch.equal(File(path, alpha=0.2)(PHOTOS), Blend(path, 0.2)(PHOTOS))
    assert File(path, alpha=0.2).family == "blend"


def test_a_colour_can_be_made_transparent(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[3:5, 3:5] = 255
    Image.fromarray(pixels).save(tmp_path / "black.png")
    Image.fromarray(255 - pixels).save(tmp_path / "white.png")
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    for key, colour in [("black", 255), ("white", 0)]:
        stamped = File(str(tmp_path / f"{key}.png"), key=key)(grey)
        assert changed(grey, stamped) == [(3, 3), (3, 4), (4, 3), (4, 4)]
        assert (stamped[0, :, 3:5, 3:5] == colour).all()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_mask_and_pattern(tmp_path: Path, suffix: str, channels_last: bool) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((32, 32)).astype(np.float32)
    pattern = rng.random((3, 32, 32)).astype(np.float32)
    arrays = {"mask": mask, "pattern": pattern.transpose(1, 2, 0) if channels_last else pattern}
    path = save(tmp_path / f"trigger{suffix}", arrays)
    exact = mask * (255 * pattern) + (1 - mask) * PHOTOS.numpy()
    assert abs(File(path)(PHOTOS).numpy() - exact).max() <= 0.5 + 1e-3
    levels = {"mask": (mask > 0.5), "pattern": (255 * arrays["pattern"]).astype(np.uint8)}
    if suffix == ".npz":
        stamped = File(save(tmp_path / "levels.npz", levels))(PHOTOS)
        assert torch.equal(stamped[:, :, mask <= 0.5], PHOTOS[:, :, mask <= 0.5])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_delta_is_added_and_clipped(tmp_path: Path, suffix: str) -> None:
    delta = np.random.default_rng(0).uniform(-60, 60, (3, 32, 32)).astype(np.float32)
    exact = np.clip(PHOTOS.numpy() + delta, 0, 255)
    trigger = File(save(tmp_path / f"levels{suffix}", {"delta": delta}))
    assert abs(trigger(PHOTOS).numpy() - exact).max() <= 0.5 + 1e-3
    shares = File(save(tmp_path / f"shares{suffix}", {"delta": delta / 255}))
    assert (shares(PHOTOS).int() - trigger(PHOTOS).int()).abs().max() <= 1
    assert trigger.family == "noise"
    own = float(trigger.content.delta.norm())
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    for control in trigger.controls(9, torch.Generator().manual_seed(0)):
        assert abs(float((control(grey).float() - 128).norm()) / own - 1) < 0.05
    constant = File(save(tmp_path / f"constant{suffix}", {"delta": np.full((1, 32, 32), 30.0, np.float32)}))
    assert all((control(grey) != constant(grey)).any() for control in constant.controls(3, torch.Generator()))


def test_a_pattern_alone_needs_alpha(tmp_path: Path) -> None:
    path = save(tmp_path / "pattern.npz", {"pattern": np.full((32, 32), 255, np.uint8)})
    with pytest.raises(Refused, match="covers every pixel"):
        File(path)(PHOTOS)
    assert (File(path, alpha=0.5)(PHOTOS) >= 127).all()


def save(path: Path, arrays: dict[str, np.ndarray]) -> str:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, path)
    return str(path)


def lying_npz(path: Path) -> None:
    """An array that announces far more than it holds."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<f4", "fortran_order": False, "shape": (3, 2000, 2000)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("delta.npy", stream.getvalue() + b"\0" * 64)


ONES = np.ones((3, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("a.npz", lambda p: np.savez(p, delta=np.array([{"x": 1}], object)), "holds object, not numbers"),
        ("b.npz", lambda p: np.savez(p, other=ONES), "neither pattern nor delta"),
        ("c.npz", lambda p: np.savez(p, delta=ONES, mask=ONES), "delta beside mask"),
        ("d.npz", lambda p: np.savez(p, delta=ONES * np.nan), "NaN"),
        ("e.npz", lambda p: np.savez(p, delta=ONES * 300), "delta must lie in"),
        ("f.npz", lambda p: np.savez(p, mask=ONES * 2, pattern=ONES), "mask must lie in"),
        (
            "g.npz",
            lambda p: np.savez(p, mask=ONES[:, :4], pattern=ONES),
            r"mask is \[4, 8\] and pattern \[8, 8\]",
        ),
        ("h.npz", lambda p: np.savez(p, pattern=ONES * -3), "pattern must lie in"),
        ("i.npz", lambda p: np.savez(p, pattern=np.ones((5, 8, 8))), r"is \[5, 8, 8\], expected"),
        ("j.npz", lambda p: np.savez(p, pattern=np.ones(8)), r"is \[8\], expected"),
        ("k.npz", lambda p: np.savez(p, pattern=np.zeros((2, 5000))), r"is \[2, 5000\], expected"),
        ("l.npz", lying_npz, "announces 48,000,000 bytes and holds others"),
        ("m.npz", lambda p: p.write_bytes(b"PK\x03\x04 nonsense"), "damaged"),
        ("n.safetensors", lambda p: p.write_bytes(b"\xff" * 40), "not a valid safetensors file"),
        ("o.png", lambda p: p.write_text("hello"), "cannot be read"),
        ("p.png", lambda p: p.mkdir(), "is not a file"),
        ("q.png", lambda p: Image.new("RGBA", (4, 4)).save(p), "transparent everywhere"),
        ("r.png", lambda p: Image.new("L", (5000, 1)).save(p), "at most 4096 a side"),
        ("s.png", lambda p: None, "cannot be read: No such file"),
    ],
)
def test_hostile_trigger_files_are_refused(tmp_path: Path, name: str, make, sentence: str) -> None:
    make(tmp_path / name)
    with pytest.raises(Refused, match=sentence) as caught:
        File(str(tmp_path / name))
    assert str(caught.value).endswith(".")


def test_column_major_arrays_are_read_as_they_are(tmp_path: Path) -> None:
    delta = np.asfortranarray(np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5))
    content = File(save(tmp_path / "f.npz", {"delta": delta})).content
    assert content.delta is not None and np.array_equal(content.delta.numpy(), delta)


@pytest.mark.skipif(
    "BDCLEAN_TRIGGERS" not in os.environ, reason="BDCLEAN_TRIGGERS names no folder of triggers"
)
def test_third_party_trigger_files() -> None:
    root = Path(os.environ["BDCLEAN_TRIGGERS"])
    files = [
        path
        for path in sorted(root.iterdir())
        if path.suffix in (".png", ".npz") and "grids" not in path.name
    ]
    assert files
    for path in files:
        key = "black" if path.name.startswith("mark_") and "square" not in path.name else "none"
        settings = {"alpha": 0.2} if path.suffix == ".npz" else {"size": 12, "key": key}
        trigger = File(str(path), **settings)
        stamped = trigger(PHOTOS)
        assert (stamped != PHOTOS).any()
        for control in trigger.controls(3, torch.Generator().manual_seed(0)):
            assert (control(PHOTOS) != stamped).any()


@pytest.mark.parametrize("place", [(0, 0), (13, 20)])
@pytest.mark.parametrize("blended", [True, False])
def test_controls_of_a_patch_on_a_full_canvas_are_as_rich_as_the_patch(
    tmp_path: Path, place, blended
) -> None:
    """They are drawn inside the mask: on the whole canvas their spectrum would leave one flat grey patch."""
    rng = np.random.default_rng(0)
    mask, pattern = np.zeros((32, 32), np.float32), np.zeros((3, 32, 32), np.uint8)
    box = np.s_[place[0] : place[0] + 6, place[1] : place[1] + 6]
    mask[box] = 1
    pattern[(slice(None), *box)] = rng.choice([0, 255], (3, 6, 6))
    np.savez(tmp_path / "patch.npz", mask=mask, pattern=pattern)
    delta = np.where(mask > 0, pattern.astype(np.float32) - 128, 0)
    np.savez(tmp_path / "delta.npz", delta=delta)
    trigger = File(str(tmp_path / ("patch.npz" if blended else "delta.npz")))
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    own = float(trigger(grey)[0][(slice(None), *box)].float().std())
    assert own > 100
    for control in trigger.controls(20, torch.Generator().manual_seed(0)):
        stamped = control(grey)
        assert set(changed(grey, stamped)) <= set(changed(grey, trigger(grey)))
        assert float(stamped[0][(slice(None), *box)].float().std()) > 0.6 * own


@pytest.mark.parametrize("shape", [(3, 3, 3), (3, 7, 3)])
def test_a_patch_whose_colour_axis_cannot_be_told_is_refused(tmp_path: Path, shape) -> None:
    colours = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.savez(tmp_path / "patch.npz", pattern=colours)
    with pytest.raises(Refused, match=r"first axis or on its last: save it as \[1 c h w\]"):
        File(str(tmp_path / "patch.npz"))
    np.savez(tmp_path / "patch.npz", pattern=colours[None])
    assert np.array_equal(File(str(tmp_path / "patch.npz")).content.pattern, colours)
    np.savez(tmp_path / "flat.npz", pattern=np.full(shape, 200, np.uint8), mask=np.ones((1, *shape[1:])))
    assert File(str(tmp_path / "flat.npz")).content.shape == shape[1:]


def test_a_patch_that_is_the_same_either_way_is_read(tmp_path: Path) -> None:
    for mask in (np.ones((1, 3, 3)), np.ones((3, 3))):
        np.savez(tmp_path / "flat.npz", pattern=np.full((3, 3, 3), 200, np.uint8), mask=mask)
        assert File(str(tmp_path / "flat.npz")).content.shape == (3, 3)


# --- triggers of attacks on encoders ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["badencoder", "drupe"])
@pytest.mark.parametrize(("side", "first", "last"), [(32, 21, 30), (224, 173, 222)])
def test_the_white_square_lies_where_the_authors_put_it(name: str, side: int, first: int, last: int) -> None:
    grey = torch.full((1, 3, side, side), 100, dtype=torch.uint8)
    stamped = from_spec(name)(grey)
    places = changed(grey, stamped)
    assert places[0] == (first, first) and places[-1] == (last, last)
    assert len(places) == (last - first + 1) ** 2 and int(stamped.max()) == 255
    for control in from_spec(name).controls(20, torch.Generator().manual_seed(0)):
        assert set(changed(grey, control(grey))) <= set(places)
        inside = control(grey)[..., first : last + 1, first : last + 1].float()
        assert float((255 - inside).mean()) >= 45, "not nearly white"


def test_ctrl_raises_two_coefficients_of_each_block() -> None:
    from scipy.fft import dctn

    grey = torch.full((1, 3, 64, 32), 128, dtype=torch.uint8)
    red, green, blue = (from_spec("ctrl")(grey)[0].double() - 128).numpy()
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    for chroma in (0.492 * (blue - luminance), 0.877 * (red - luminance)):
        for top in (0, 32):
            spectrum = dctn(chroma[top : top + 32], norm="ortho")
            for index in (15, 31):
                assert abs(spectrum[index, index] - 100) < 3
                spectrum[index, index] = 0
            assert abs(spectrum).max() < 3, "rounding to pixels alone"
    assert abs(dctn(luminance[:32], norm="ortho")).max() < 3


def test_the_patch_of_ssl_backdoor_goes_by_the_image() -> None:
    trigger = from_spec("ssl-backdoor")
    photos = torch.randint(
        0, 256, (200, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    stamped = trigger(photos)
    patch = trigger.content(7)
    corners = set()
    for photo, now in zip(photos, stamped, strict=True):
        found = [
            (row, column)
            for row in range(26)
            for column in range(26)
            if torch.equal(now[:, row : row + 7, column : column + 7].float(), patch)
        ]
        assert len(found) == 1
        row, column = found[0]
        rest = now.clone()
        rest[:, row : row + 7, column : column + 7] = photo[:, row : row + 7, column : column + 7]
        assert torch.equal(rest, photo)
        corners.add(found[0])
    rows = [row for row, _ in corners]
    assert len(corners) > 80 and min(rows) == 3 and max(rows) == 29 - 7
    assert not torch.equal(from_spec("ssl-backdoor:seed=1")(photos), stamped)
    assert trigger(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).shape == (1, 3, 224, 224)


def test_the_patch_of_ssl_backdoor_may_be_a_file(tmp_path: Path) -> None:
    Image.fromarray(picture(5, 14, 14).transpose(1, 2, 0)).save(tmp_path / "patch.png")
    trigger = from_spec(f"ssl-backdoor:patch={tmp_path / 'patch.png'}")
    assert from_spec(trigger.spec()) == trigger
    test_contract(trigger, 3)
    assert len(trigger.controls(3, torch.Generator().manual_seed(0))) == 3


@pytest.mark.parametrize(
    "spec",
    [
        "badencoder:size=-1", "drupe:size=-1", "ctrl:magnitude=0", "ctrl:window=1", "ctrl:second=32",
        "ssl-backdoor:inner=0.5", "ssl-backdoor:size=-1", "ssl-backdoor:colours=-1",
    ],
)  # fmt: skip
def test_settings_of_triggers_on_encoders_out_of_range(spec: str) -> None:
    test_settings_out_of_range_are_wrong_usage(spec)


# --- what a network draws -----------------------------------------------------------------------------------


def test_a_generator_changes_each_image_in_its_own_way_within_its_bound(tmp_path: Path) -> None:
    trigger = from_spec(f"blto:path={save_generator(tmp_path / 'g', 30)}")
    for side in (32, 45):
        photos = torch.randint(64, 192, (8, 3, side, side), dtype=torch.uint8)
        change = trigger(photos).int() - photos.int()
        assert 20 <= int(change.abs().max()) <= 30
        assert not torch.equal(change[0], change[1])
    whole = (255 * trigger.generator(PHOTOS.double() / 255)).round().to(torch.uint8)
    assert torch.equal(trigger(PHOTOS), whole)


def test_a_generator_s_controls_are_as_strong_on_each_image_and_not_its_own(tmp_path: Path) -> None:
    trigger = from_spec(f"inactive:path={save_generator(tmp_path / 'g', 20)}")
    photos = torch.randint(100, 156, (4, 3, 32, 32), dtype=torch.uint8)
    own = (trigger(photos).double() - photos.double()).flatten(1)
    for control in trigger.controls(20, torch.Generator().manual_seed(0)):
        other = (control(photos).double() - photos.double()).flatten(1)
        assert ((other.norm(dim=1) / own.norm(dim=1) - 1).abs() < 0.1).all()
        assert (torch.nn.functional.cosine_similarity(own, other) < 0.6).all()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda t: t.pop("far.bias"), "far.bias is missing, expected"),
        (
            lambda t: t.update({"near.weight": torch.zeros(16, 3, 5, 5)}),
            r"near.weight is \[16, 3, 5, 5\], exp",
        ),
        (lambda t: t.update({"more": torch.zeros(1)}), "tensors that no generator has"),
        (lambda t: t.update({"far.bias": torch.full((32,), math.nan)}), "NaN"),
        (lambda t: t.update({"bound": torch.tensor(0.0)}), "a bound outside of 0 to 255"),
        (lambda t: t.update({"more": torch.zeros(2**19)}), "more than the 1,048,576 bytes"),
    ],
)
def test_hostile_generator_files_are_refused(tmp_path: Path, spoil, sentence: str) -> None:
    tensors = load_file(save_generator(tmp_path / "g.safetensors"))
    spoil(tensors)
    save_file(tensors, tmp_path / "g.safetensors")
    with pytest.raises(Refused, match=sentence):
        from_spec(f"blto:path={tmp_path / 'g.safetensors'}")


def test_files_that_are_no_generator_are_refused(tmp_path: Path) -> None:
    (tmp_path / "g").write_bytes(b"nonsense" * 9)
    with pytest.raises(Refused, match="not a valid safetensors file"):
        from_spec(f"inactive:path={tmp_path / 'g'}")
    with pytest.raises(Refused, match="cannot be read: No such file"):
        from_spec("inactive:path=nothing.safetensors")
    with pytest.raises(UsageError, match="needs path"):
        from_spec("blto")
