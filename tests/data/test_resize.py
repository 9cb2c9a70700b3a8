"""Pictures are brought to the input size as the network's config says, else stretched."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import v2

from bdclean.data.decode import FILTERS, Resize, decode
from bdclean.files.tensorfile import read_header
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.checkpoint.claims import claimed_resize
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.progress import quiet
from bdclean.runs.images import read_images
from bdclean.runs.options import Inputs
from bdclean.runs.suspect import describe_checkpoint

MODES = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}


def picture(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BOX))


@pytest.mark.parametrize("interpolation", list(MODES))
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0, 224 / 235])
@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (375, 500), (256, 256), (224, 224), (40, 30), (1000, 224)]
)
def test_the_centre_is_what_torchvision_cuts_out(width, height, crop_pct, interpolation):
    pixels = picture(width, height)
    ours = decode(pixels, (224, 224), Resize(crop_pct, interpolation)).astype(int)
    side = {0.875: 256, 0.9: 248, 1.0: 224, 224 / 235: 235}[crop_pct]
    theirs = v2.Compose([v2.Resize(side, MODES[interpolation], antialias=True), v2.CenterCrop(224)])
    wanted = np.asarray(theirs(Image.fromarray(pixels))).transpose(2, 0, 1).astype(int)
    assert ours.shape == wanted.shape
    assert (
        np.abs(ours - wanted).max() <= 2
    )  # levels: what is resized once, and only where it is shown, rounds otherwise


@pytest.mark.parametrize(("width", "height"), [(1, 60_000), (60_000, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("crop_pct", [None, 0.1, 1.0])
def test_very_long_and_very_small_pictures_are_resized_without_much_memory(width, height, crop_pct):
    assert decode(picture(width, height), (64, 48), Resize(crop_pct)).shape == (3, 64, 48)


def test_a_picture_of_the_input_size_is_left_as_it_is_or_enlarged_and_cut():
    pixels = picture(32, 32)
    for resize in (Resize(), Resize(None, "bicubic"), Resize(1.0)):
        assert np.array_equal(decode(pixels, (32, 32), resize), pixels.transpose(2, 0, 1))
    enlarged = Image.fromarray(pixels).resize((36, 36), Image.Resampling.BILINEAR).crop((2, 2, 34, 34))
    cut = decode(pixels, (32, 32), Resize(0.875)).astype(int)
    assert np.abs(cut - np.asarray(enlarged).transpose(2, 0, 1)).max() <= 1


TIMM = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
EDGE = {"size": {"shortest_edge": 224}, "resample": 3}


@pytest.mark.parametrize(
    ("config", "processor", "wanted"),
    [
        (None, None, Resize()),
        (
            {"pretrained_cfg": {**TIMM, "crop_pct": 0.9, "interpolation": "bicubic"}},
            None,
            Resize(0.9, "bicubic"),
        ),
        ({**TIMM, "crop_pct": 0.95}, None, Resize(0.95, "bilinear")),
        (
            {**TIMM, "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"},
            None,
            Resize(None, "bicubic"),
        ),
        ({}, {"size": {"height": 224, "width": 224}, "resample": 2}, Resize(None, "bilinear")),
        ({}, {**EDGE, "image_processor_type": "ConvNextImageProcessor"}, Resize(0.875, "bicubic")),
        (
            {},
            {**EDGE, "feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.95},
            Resize(0.95, "bicubic"),
        ),
        ({}, {"size": 384, "crop_pct": 0.9, "image_processor_type": "ConvNextImageProcessor"}, Resize()),
        ({}, {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}, Resize(0.875)),
        (
            {},
            {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": {"height": 224}},
            Resize(),
        ),
        # what makes no sense is passed over
        ({**TIMM, "crop_pct": 0}, None, Resize()),
        ({**TIMM, "crop_pct": 1e308}, None, Resize()),
        ({**TIMM, "crop_pct": True, "interpolation": "random"}, None, Resize()),
        ({**TIMM, "crop_pct": "0.9", "interpolation": ["bicubic"]}, None, Resize()),
        ({}, {"size": {"shortest_edge": 10**30}, "do_center_crop": True, "crop_size": 10**30}, Resize()),
        ({}, {"resample": 99, "size": []}, Resize()),
        ([1], "text", Resize()),
    ],
)
def test_what_configs_say(config, processor, wanted):
    assert claimed_resize(config, processor) == wanted


def test_every_filter_has_the_name_that_configs_use():
    assert set(FILTERS) >= {"nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"}


def test_images_beside_a_config_are_cut_and_the_record_says_so(tmp_path):
    """The picture's border is black, its centre grey: cut out, no black is left."""
    folder = tmp_path / "model"
    folder.mkdir()
    alone = tmp_path / "alone.safetensors"
    for file in (alone, folder / "model.safetensors"):
        save_file(ResidualNetwork((1, 1, 1), (4, 8, 16), 4, 5).state_dict(), file)
    (folder / "config.json").write_text(json.dumps({"crop_pct": 0.5, "interpolation": "bicubic"}))
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[8:56, 40:88] = 128
    images = tmp_path / "images"
    images.mkdir()
    for k in range(20):
        Image.fromarray(pixels).save(images / f"{k}.png")
    for path, resize, darkest in ((folder, "crop_pct=0.5, bicubic", 128), (alone, "stretched, bilinear", 0)):
        checkpoint = Checkpoint.read(path)
        assert describe_checkpoint(checkpoint, path).resize == resize
        assert int(read_images(images, checkpoint, Inputs(data=images), quiet).images.min()) == darkest


@pytest.mark.parametrize(
    ("config", "processor"),
    [
        (
            {
                "architecture": "resnet18",
                "pretrained_cfg": {**TIMM, "crop_pct": 0.95, "interpolation": "bicubic"},
            },
            None,
        ),
        ({"crop_pct": 0.5, "interpolation": "lanczos"}, None),
        (None, {"size": {"height": 32, "width": 32}, "resample": 3}),
        ({"model_type": "convnext"}, {**EDGE, "image_processor_type": "ConvNextImageProcessor"}),
        (None, None),
    ],
)
def test_an_output_is_read_like_its_input(config, processor, tmp_path):
    """Alone, and where the input's config lies beside it."""
    network = ResidualNetwork((1, 1, 1), (4, 8, 16), 4, 5)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    found = replace(Checkpoint.read(tmp_path / "model.safetensors"), config=config, preprocessor=processor)
    (tmp_path / "alone").mkdir()
    out = tmp_path / "alone" / "out.safetensors"
    found.write(network, out, {})
    said = json.loads(read_header(out).metadata.get("bdclean.config", "{}"))
    assert claimed_resize(said, None) == claimed_resize(config, processor)
    assert bool(said) == (config is not None or processor is not None)
