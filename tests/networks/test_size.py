"""The size that images are read at: what says it, and what does not."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.imagenet_resnet import make_other
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.recognition.user_code import load
from bdclean.runs.images import at_own_size
from bdclean.runs.options import Inputs
from bdclean.runs.suspect import input_size
from bdclean.training.students import set_batch_statistics


def pictures(count, side):
    generator = torch.Generator().manual_seed(0)
    rough = torch.randint(0, 256, (count, 3, side // 4, side // 4), dtype=torch.uint8, generator=generator)
    return F.interpolate(rough, side)


def saved(images, folder):
    """A folder of these images as PNG."""
    folder.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
    return folder


def settle(network, images, path):
    """Write a file whose batch norm has the statistics of `images`, as training would leave them."""
    half = parse_preprocess("half")
    set_batch_statistics(Classifier(network, half), lambda: iter([images]))
    save_file(network.state_dict(), path, {"bdclean.preprocess": "half"})


def test_a_name_says_nothing_of_the_size(tmp_path):
    """A ResNet trained at 64 was read at 224 where --arch gave its name: its backdoor of 100 % read 0 %."""
    torch.manual_seed(0)
    network = make_other((1, 1, 1, 1), (8, 16, 32, 64), (8, 16, 32, 64), 8, 5, False, 1)
    images = pictures(24, 64)
    settle(network, images, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    folder, name = saved(images, tmp_path / "i"), checkpoint.arch.name
    assert checkpoint.arch.input == (3, 224, 224)
    for arch in (None, name):
        read = Checkpoint.read(tmp_path / "m.safetensors", arch)
        assert at_own_size(read, folder, Inputs(arch=arch)).arch.input == (3, 64, 64)
    sized = Checkpoint.read(tmp_path / "m.safetensors", f"{name}+224px")
    assert at_own_size(sized, folder, Inputs(arch=f"{name}+224px")) is sized


ANY_SIZE = """
from torch import nn

class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

class Fixed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 30 * 30, 5))
"""


@pytest.mark.parametrize(
    "name, trained, pictured, read",
    [
        ("Normed", 64, 64, 64),
        ("Normed", 32, 128, 32),  # its statistics tell
        ("Plain", None, 64, 64),
        ("Plain", None, 400, 32),  # photos, which nobody trains at their own size
        ("Fixed", 32, 64, 32),
    ],
)
def test_the_users_code_that_takes_any_size_is_read_at_that_of_the_images(
    tmp_path, name, trained, pictured, read
):
    """It was read at 32, the first size that runs: accuracy 0.72 in place of 0.99, without a word."""
    (tmp_path / "sizes.py").write_text(ANY_SIZE)
    spec = f"{tmp_path / 'sizes.py'}:{name}"
    torch.manual_seed(0)
    network, images = load(spec)(), pictures(24, pictured)
    shown = F.interpolate(images.float(), trained or pictured, mode="bilinear", antialias=True).byte()
    settle(network, shown, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors", spec)
    assert checkpoint.arch.input == (3, 32, 32)
    folder = saved(images, tmp_path / "i")
    found = at_own_size(checkpoint, folder, Inputs(arch=spec))
    assert found.arch.input == (3, read, read) and input_size(found, Inputs(arch=spec)) == (read, read)
    said = f"user:{name} is read at {read}x{read}, and they are {pictured}x{pictured}"
    assert any(said in warning for warning in found.warnings) == (read != pictured)
    given = Inputs(arch=spec, preprocess="half,size=32/32")
    assert at_own_size(checkpoint, folder, given) is checkpoint
