"""What every registered detector keeps to."""

import dataclasses

import pytest
import torch

from bdclean import registry
from bdclean.data.imageset import ImageSet
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.stages import describe
from bdclean.record.run import Finding
from bdclean.training.run import Precision, Run

QUICK = {"inversion": {"steps": "3"}}


def network():
    return ResidualNetwork((1, 1, 1), (4, 8, 8), 4, 4)


@pytest.fixture(scope="module")
def suspect():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(network(), parse_preprocess("half")).eval()


@pytest.fixture(scope="module")
def images():
    pixels = torch.randint(
        256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return ImageSet(pixels).images


@pytest.mark.parametrize("name", registry.DETECTORS)
def test_contract(name, suspect, images):
    detector = registry.configure(registry.load(registry.DETECTORS, name), QUICK.get(name, {}))
    arch = describe("tiny", network, (3, 32, 32))
    before = {key: tensor.clone() for key, tensor in suspect.state_dict().items()}
    pixels = images.clone()
    found, again = (
        detector(suspect, arch, images, Run(torch.device("cpu"), Precision(), 1)) for _ in range(2)
    )
    assert torch.equal(images, pixels)
    assert all(torch.equal(before[key], tensor) for key, tensor in suspect.state_dict().items())
    assert found.findings == again.findings and found.findings
    for finding in found.findings:
        entry = Finding(**finding)
        assert entry.detector == name and entry.reason and entry.verdict in ("outlier", "no-outlier")
        assert "does not decide the verdict" in entry.reason, "none is calibrated"
    assert len(found.outliers) == sum(finding["verdict"] == "outlier" for finding in found.findings)
    for picture in found.pictures.values():
        assert picture.shape == (3, 32, 32) and 0 <= picture.min() and picture.max() <= 1
    stamped = [o.form.stamp(o.parameters[None], images[:2].float() / 255) for o in found.outliers]
    assert all(x.shape == (1, 2, 3, 32, 32) for x in stamped)


@pytest.mark.parametrize("name", registry.DETECTORS)
def test_a_detector_says_what_it_is(name):
    detector = registry.load(registry.DETECTORS, name)
    assert dataclasses.is_dataclass(detector) and detector.__dataclass_params__.frozen
    assert detector.name == name and detector.source
    for head in ("What it does:", "When to use it:", "What it needs:", "Known limits:"):
        assert head in detector.__doc__
