"""Triggers that a user may get wrong, and controls at the edges of what a trigger may be."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bdclean.attacks.badnets import BadNets
from bdclean.attacks.inputaware import InputAware as Attack
from bdclean.attacks.ssba import SSBA
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.training.run import Precision, Run
from bdclean.triggers import generators
from bdclean.triggers.bank import make_triggers
from bdclean.triggers.blend import Blend
from bdclean.triggers.ctrl import CTRL
from bdclean.triggers.inputaware import InputAware, MaskAndPattern
from bdclean.triggers.reading import read_content
from bdclean.triggers.sig import SIG
from bdclean.triggers.ssl_backdoor import SSLBackdoor
from bdclean.triggers.trojan import Trojan
from bdclean.triggers.wanet import WaNet, warp


@pytest.mark.parametrize(
    "spec",
    ["sig:frequency=16", "sig:delta=0.3", "blend:alpha=0.001", "wanet:strength=0.001", "ctrl:magnitude=1"],
)
def test_a_trigger_that_changes_no_pixel_is_wrong_usage(spec):
    with pytest.raises(UsageError, match="changes no pixel of images of 32 x 32"):
        make_triggers((spec,), (32, 32))


def test_controls_of_waves_in_a_corner_of_the_table_end_and_differ():
    for channels in (1, 3):
        made = CTRL(first=0, second=0).controls(37, torch.Generator().manual_seed(0), channels)
        assert len({control.keywords["waves"] for control in made}) == 37


def test_controls_of_the_highest_stripes_are_stripes():
    assert len(SIG(frequency=1000).controls(40, torch.Generator().manual_seed(0))) == 40
    assert len(SIG(frequency=0.0004).controls(40, torch.Generator().manual_seed(0))) == 40


def test_a_warp_is_as_strong_along_each_axis_of_a_picture_that_is_not_square():
    field = torch.ones(32, 128, 2)
    columns, rows = torch.meshgrid(torch.arange(128), torch.arange(32), indexing="xy")
    for along in (columns, rows):
        pixels = along[None, None].to(torch.uint8)
        moved = warp(pixels, field, 4.0).int() - pixels.int()
        # half of `strength` in pixels, as coordinates go from -1 to 1
        assert moved[0, 0, 4:-4, 4:-4].unique().tolist() == [2]


@pytest.mark.parametrize("dtype", [">f4", "f8", "longdouble"])
def test_a_field_is_read_in_any_byte_order(tmp_path, dtype):
    noise = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 2))
    np.savez(tmp_path / "field.npz", noise=noise.astype(dtype))
    assert torch.allclose(WaNet(grid=str(tmp_path / "field.npz")).given, torch.from_numpy(noise[0]).float())
    np.savez(tmp_path / "flat.npz", noise=np.ones((1, 8, 8, 2), np.float32))
    with pytest.raises(Refused, match="the same everywhere"):
        WaNet(grid=str(tmp_path / "flat.npz"))


def test_a_network_that_draws_one_colour_has_controls_of_the_opposite_one(tmp_path):
    drawing = MaskAndPattern(16, 16)
    with torch.no_grad():
        for parameter in drawing.parameters():
            parameter.zero_()
        drawing.mask_network.drawn.bias.fill_(9.0)
        drawing.pattern_network.drawn.bias.fill_(9.0)
    generators.write(drawing, str(tmp_path / "white.safetensors"))
    trigger = InputAware(str(tmp_path / "white.safetensors"))
    images = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    assert trigger(images).min() > 250
    assert all(control(images).max() < 5 for control in trigger.controls(3, torch.Generator().manual_seed(0)))


def test_numbers_that_no_generator_has_are_refused(tmp_path):
    tensors = {name: t.to(torch.float8_e4m3fn) for name, t in MaskAndPattern(16, 16).state_dict().items()}
    save_file(tensors, tmp_path / "f8.safetensors")
    with pytest.raises(Refused, match="other numbers than floats"):
        InputAware(str(tmp_path / "f8.safetensors"))


def test_pictures_of_sixteen_bits_and_arrays_are_read_as_they_are_meant(tmp_path):
    grey = np.arange(0, 64000, 1000, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    read = read_content(str(tmp_path / "deep.png")).pattern
    assert read[0].int().tolist() == (grey >> 8).tolist()
    np.savez(tmp_path / "grey.npz", pattern=np.zeros((3, 3, 1), np.uint8))
    with pytest.raises(Refused, match="first axis or on its last"):
        read_content(str(tmp_path / "grey.npz"))
    np.savez(
        tmp_path / "stripe.npz",
        pattern=np.stack([np.zeros((3, 3)), np.full((3, 3), 255), np.zeros((3, 3))], 1),
    )
    with pytest.raises(Refused, match="first axis or on its last"):
        read_content(str(tmp_path / "stripe.npz"))
    np.savez(tmp_path / "bits.npz", pattern=np.eye(4, dtype=np.uint8))
    with pytest.raises(Refused, match="integers 0 and 1"):
        read_content(str(tmp_path / "bits.npz"))
    with pytest.raises(Refused, match="key is for pictures"):
        read_content(str(tmp_path / "bits.npz"), key="black")


@pytest.mark.parametrize("make", [lambda path: Blend(path), lambda path: SSLBackdoor(patch=path)])
def test_a_mask_is_not_dropped_in_silence(tmp_path, make):
    mask = np.zeros((8, 8), np.float32)
    mask[:3, :3] = 1
    np.savez(tmp_path / "masked.npz", pattern=np.full((3, 8, 8), 200, np.uint8), mask=mask)
    with pytest.raises(Refused, match="has a mask or is transparent: use file:"):
        make(str(tmp_path / "masked.npz"))


def test_seeds_beyond_what_is_drawn_from_and_victims_of_the_target_are_wrong_usage():
    with pytest.raises(UsageError, match="2\\^63"):
        Trojan(seed=2**64)
    with pytest.raises(UsageError, match="another class than the target, 2"):
        BadNets(target=2, victims="2")


def test_attacks_whose_networks_draw_on_colours_refuse_grey_images_before_they_learn(tmp_path):
    grey, run = (
        ImageSet(torch.zeros(8, 1, 16, 16, dtype=torch.uint8), torch.zeros(8).long(), ("a", "b")),
        Run(torch.device("cpu"), Precision(), 0),
    )
    path = str(tmp_path / "made.safetensors")
    with pytest.raises(Refused, match="ssba draws on images of three channels, these have 1: use badnets"):
        SSBA(path=path).learn(grey, run)
    with pytest.raises(Refused, match="inputaware draws on images of three channels, these have 1"):
        Attack(path=path)(torch.nn.Identity(), grey, run, None)


def test_a_path_may_hold_commas(tmp_path):
    Image.new("RGB", (600, 20), (10, 20, 30)).save(tmp_path / "a,b.png")
    trigger = Blend(str(tmp_path / "a,b.png"), alpha=0.5)
    (again,) = make_triggers((trigger.spec(),), (16, 16))
    assert again == trigger
    (control,) = trigger.controls(1, torch.Generator().manual_seed(0))
    assert control.keywords["content"].shape == (17, 512), "surrogates of a large picture are drawn at less"
