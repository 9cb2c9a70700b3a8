"""What every registered detector keeps to."""

import dataclasses
import math

import pytest
import torch

from bdclean import registry
from bdclean.data.imageset import ImageSet
from bdclean.errors import UsageError
from bdclean.networks.classifier import Classifier
from bdclean.networks.encoder import headless
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.stages import describe
from bdclean.record.run import Finding
from bdclean.training.run import Precision, Run

CPU = torch.device("cpu")

QUICK = {
    "all-to-all": {"rounds": "1"},
    "filters": {"steps": "3"},
    "inversion": {"steps": "3"},
    "mm-bd": {"steps": "3"},
    "neural-cleanse": {"steps": "3"},
    "patches": {"rounds": "1"},
    "warps": {"steps": "3"},
    "decree": {"steps": "6", "batch_size": "16"},
}
KINDS = [
    (name, kind)
    for name, entry in registry.DETECTORS.items()
    for kind in ("classifier", "encoder")
    if registry.path_for(entry, kind)
]


def network():
    return ResidualNetwork((1, 1, 1), (4, 8, 8), 4, 4)


def described(kind):
    arch = describe("tiny", network, (3, 32, 32))
    return arch if kind == "classifier" else headless(arch)


def suspect(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(described(kind).build(), parse_preprocess("half")).eval()


@pytest.fixture(scope="module")
def images():
    pixels = torch.randint(
        256, (200, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return ImageSet(pixels).images


def made(name, kind):
    return registry.configure(registry.load_for(registry.DETECTORS, name, kind), QUICK.get(name, {}))


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_contract(name, kind, images):
    detector, network = made(name, kind), suspect(kind)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    pixels = images.clone()
    found, again = (detector(network, described(kind), images, Run(CPU, Precision(), 1)) for _ in range(2))
    assert torch.equal(images, pixels)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    assert found.findings == again.findings and found.findings
    for finding in [*found.findings, *found.uncounted]:
        entry = Finding(**finding)
        assert entry.detector == name and entry.reason
        assert entry.verdict in ("outlier", "no-outlier", "undecided")
        assert not entry.reason.endswith("."), "how odd it is among clean networks follows"
    assert found.statistic is None or math.isfinite(found.statistic)
    if found.outliers:
        every = [*found.findings, *found.uncounted]
        assert len(found.outliers) == sum(finding["verdict"] == "outlier" for finding in every)
    for picture in found.pictures.values():
        assert picture.shape == (3, 32, 32) and 0 <= picture.min() and picture.max() <= 1
    stamped = [o.form.stamp(o.parameters[None], images[:2].float() / 255) for o in found.outliers]
    assert all(x.shape == (1, 2, 3, 32, 32) for x in stamped)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_detector_says_what_it_is(name, kind):
    detector = registry.load_for(registry.DETECTORS, name, kind)
    assert dataclasses.is_dataclass(detector) and detector.__dataclass_params__.frozen
    assert detector.name == name and detector.source
    for head in ("What it does:", "When to use it:", "What it needs:", "Known limits:"):
        assert head in detector.__doc__


def test_a_detector_of_the_other_kind_is_refused():
    with pytest.raises(
        UsageError,
        match="decree does not work on classifiers: use one of all-to-all, filters, inversion, mm-bd, neural-cleanse",
    ):
        registry.load_for(registry.DETECTORS, "decree", "classifier")
    with pytest.raises(
        UsageError, match="stripes does not work on encoders: use one of decree, filters, inver"
    ):
        registry.load_for(registry.DETECTORS, "stripes", "encoder")
