"""Two strangers' networks with a backdoor: what they showed wrong in the default recipe stays mended.

BDCLEAN_THIRD_PARTY names the folder that holds them, BDCLEAN_CIFAR10 the images.
"""

import os
from pathlib import Path

import pytest
import torch

from bdclean import registry
from bdclean.data.loading import load_images
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.progress import quiet
from bdclean.training.forms import mask
from bdclean.training.inversion import invert, outliers
from bdclean.training.run import Precision, Run
from bdclean.training.students import recentre

FOLDER = Path(os.environ.get("BDCLEAN_THIRD_PARTY", "."))
FILES = {"wrn16-grid": None, "vgg-added": f"{FOLDER / 'small_vgg.py'}:cifar10"}
pytestmark = pytest.mark.skipif(
    "BDCLEAN_THIRD_PARTY" not in os.environ, reason="BDCLEAN_THIRD_PARTY names no folder"
)
CPU = torch.device("cpu")


def opened(name):
    checkpoint = Checkpoint.read(FOLDER / f"{name}.safetensors", FILES[name])
    network = Classifier(checkpoint.build(), parse_preprocess("none")).eval()
    return checkpoint, network.requires_grad_(False)


@pytest.fixture(scope="module")
def images(cifar10):
    return load_images(cifar10, (32, 32), limit=400, seed=0, labeled=False, head_classes=10, tell=quiet)


@pytest.mark.parametrize("name", FILES)
def test_their_own_images_change_no_answer(name, images):
    """They were once taken for images of another kind: 0.020 from the second's, Tiny-ImageNet's are 0.017."""
    _, network = opened(name)
    pixels = images.images
    before = network(pixels)
    recentre(network, lambda: iter(pixels.split(200)))
    after = network(pixels)
    assert (before.argmax(1) == after.argmax(1)).float().mean() > 0.995
    assert (after - before).abs().max() < 0.01 * before.std()


@pytest.mark.slow
def test_a_run_on_a_network_with_tiny_variances_ends_with_one(images):
    """It once diverged between steps 22 and 32 of the first phase."""
    checkpoint, network = opened("vgg-added")
    settings = {"epochs": "1", "least_steps": "60", "inversion_steps": "0"}
    recipe = registry.configure(registry.load(registry.RECIPES, "inoculate"), settings)
    cleansed = recipe(network, checkpoint.arch, images.unlabeled(), None, Run(CPU, Precision(), 0))
    assert all(tensor.isfinite().all() for tensor in cleansed.model.state_dict().values())
    with torch.no_grad():
        kept = (cleansed.model(images.images).argmax(1) == network(images.images).argmax(1)).float().mean()
    assert kept > 0.85


@pytest.mark.slow
def test_the_class_of_a_small_patch_is_found_from_nearly_any_seed(images):
    """One start a class missed it in three of six seeds, 3 and 4 among them; several miss it in one of ten, which one
    being a matter of the processor's last digits."""
    _, network = opened("wrn16-grid")
    found = []
    for seed in (3, 4, 5):
        masks = invert(
            network, images.images, mask(32, 32), torch.tensor([0, 3, 8]), Run(CPU, Precision(), seed)
        )
        found.append(masks.classes[outliers(masks)[0]].tolist())
    assert found.count([0]) >= 2 and all(each in ([0], []) for each in found)
