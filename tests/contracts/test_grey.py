"""Grey images, [n 1 h w]: every registered recipe and detector, and what they are made of, works on them as on RGB."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from recipes.test_recipes import QUICK, QUICK_ENCODER, QUICK_TEACHER

from bdclean import registry
from bdclean.data.corruptions import OF_FAMILY, Shared
from bdclean.data.imageset import ImageSet
from bdclean.measuring import pictures
from bdclean.networks.classifier import Classifier
from bdclean.networks.encoder import headless
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import NAMED
from bdclean.networks.recognition.channels import first_convolution_takes
from bdclean.networks.stages import describe
from bdclean.training import adversaries
from bdclean.training.forms import ADDED, added, mask, striped
from bdclean.training.pretraining.augmentations import Views, recolour
from bdclean.training.run import Precision, Run
from bdclean.training.students import set_batch_statistics

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network():
    return first_convolution_takes(1, ResidualNetwork((1, 1, 1), (4, 8, 8), 4, 4))


PIXELS = torch.randint(256, (96, 1, 28, 28), dtype=torch.uint8, generator=seeded())
FLOATS = PIXELS[:12].float() / 255
IMAGES = ImageSet(PIXELS, torch.arange(96) % 4, tuple("abcd"))


def suspect(kind="classifier"):
    arch = describe("tiny", network, (1, 28, 28))
    arch = arch if kind == "classifier" else headless(arch)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(arch.build(), NAMED["mnist"]).eval()
    if kind == "classifier":
        set_batch_statistics(model, lambda: iter([PIXELS]))
    return model, arch


def run():
    return Run(CPU, Precision(), 1)


RECIPES = [
    *((name, "classifier", QUICK[name]) for name, e in registry.RECIPES.items() if e.path and name != "auto"),
    *((name, "encoder", settings) for name, settings in QUICK_ENCODER.items()),
    ("distill", "encoder", QUICK_ENCODER["distill"] | QUICK_TEACHER | {"teacher": "moth"}),
]


@pytest.mark.parametrize(("name", "kind", "settings"), RECIPES)
def test_every_recipe_makes_a_network_of_grey_images(name, kind, settings):
    model, arch = suspect(kind)
    recipe = registry.configure(registry.load_recipe(name, kind), settings)
    cleansed = recipe(model, arch, IMAGES.unlabeled(), IMAGES if recipe.needs_labels else None, run())
    assert cleansed.model.network.conv1.weight.shape == (4, 1, 3, 3)
    assert bool(cleansed.model(PIXELS[:8]).isfinite().all())


DETECTORS = [
    (name, kind)
    for name, entry in registry.DETECTORS.items()
    for kind in ("classifier", "encoder")
    if registry.path_for(entry, kind)
]


@pytest.mark.parametrize(("name", "kind"), DETECTORS)
def test_every_detector_looks_at_grey_images(name, kind):
    model, arch = suspect(kind)
    cls = registry.load_for(registry.DETECTORS, name, kind)
    few = {"steps": "4"} if "steps" in cls.__dataclass_fields__ else {}
    images = torch.cat([PIXELS, PIXELS.flip(2)])
    found = registry.configure(cls, few)(model, arch, images, run())
    assert found.findings and all(picture.shape == (1, 28, 28) for picture in found.pictures.values())
    for outlier in found.outliers:
        assert outlier.form.stamp(outlier.parameters[None], FLOATS).shape == (1, 12, 1, 28, 28)


@pytest.mark.parametrize("name", OF_FAMILY)
def test_every_corruption_keeps_grey_images_grey(name):
    for source in (seeded(), Shared(seeded())):
        out = OF_FAMILY[name](FLOATS, source)
        assert (
            out.shape == FLOATS.shape and 0 <= out.min() and out.max() <= 1 and not torch.equal(out, FLOATS)
        )


@pytest.mark.parametrize("kind", adversaries.KINDS)
def test_every_adversary_keeps_grey_images_grey(kind):
    model, _ = suspect()
    answers = model(FLOATS).softmax(1).detach()
    out = adversaries.attack(kind, model, FLOATS, answers, seeded())
    assert out.shape == FLOATS.shape and 0 <= out.min() and out.max() <= 1 and not torch.equal(out, FLOATS)


def test_forms_of_change_have_the_images_channels():
    pixels = torch.rand(5, 1, 20, 32)
    for form in (mask(20, 32, 1), *(added(20, 32, kind, 1) for kind in ADDED)):
        assert form.stamp(torch.randn(2, *form.shape), pixels).shape == (2, 5, 1, 20, 32)
        assert form.picture(torch.randn(form.shape)).shape == (1, 20, 32)
    grey, rgb = striped(20, 32, 1)[1], striped(20, 32)[1]
    assert torch.equal(grey.expand_as(rgb), rgb)


def test_views_of_grey_images_are_those_of_rgb_ones_without_colour():
    """On three equal channels hue and saturation do nothing, so that one channel must come out the same."""
    rgb = FLOATS.expand(-1, 3, -1, -1)
    strengths = (0.4, 0.4, 0.4, 0.1)
    grey = recolour(FLOATS, seeded(3), strengths, 0.8, 0.2)
    assert torch.allclose(
        recolour(rgb, seeded(3), strengths, 0.8, 0.2), grey.expand(-1, 3, -1, -1), atol=2e-3
    )
    assert Views(blurred=0.5)(PIXELS, seeded()).shape == PIXELS.shape


def test_grey_pictures_are_encoded_as_they_are():
    levels = torch.arange(28 * 28).view(1, 28, 28) % 256 / 255
    (shown,) = pictures.masks({"a": levels})
    read = Image.open(io.BytesIO(base64.b64decode(shown.png_base64)))
    assert read.mode == "L" and (np.asarray(read) == (255 * levels[0]).round().numpy()).all()
