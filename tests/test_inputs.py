"""How a suspect is understood where its tensors alone do not say."""

import pytest
import torch
from safetensors.torch import save_file

from bdclean.architectures.residual import ResidualNetwork
from bdclean.checkpoint import Checkpoint
from bdclean.inputs import Inputs, understand
from bdclean.normalisation import parse_preprocess
from bdclean.preprocessing import Choice, Classifier
from bdclean.readings import RATIO, fit
from bdclean.record import RunRecord
from bdclean.training import set_batch_statistics


@pytest.mark.parametrize("shortcut", ["a", "a-end"])
def test_statistics_part_architectures_that_fit_the_same_tensors(tmp_path, shortcut):
    torch.manual_seed(0)
    network = ResidualNetwork((3, 3, 3), (16, 32, 64), 16, 10, shortcut=shortcut)
    images = torch.randint(0, 256, (128, 3, 8, 8), dtype=torch.uint8)
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    set_batch_statistics(Classifier(network, parse_preprocess("cifar10")), lambda: iter([images]))
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    choice = Choice(parse_preprocess("cifar10"), float("nan"), "given")
    scores = {a.name: fit(checkpoint, a, choice, images, None).distance for a in checkpoint.candidates}
    best, second = sorted(scores, key=scores.__getitem__)[:2]
    assert best.endswith(f"-{shortcut}") and scores[second] > RATIO * scores[best]
    record = RunRecord("scan")
    suspect = understand(checkpoint, images, Inputs(preprocess="cifar10", device="cpu"), record)
    assert suspect.arch.name == best == record.checkpoint.architecture
    assert record.checkpoint.alternatives[0]["name"] == second
    assert record.checkpoint.architecture_margin == pytest.approx(scores[second] / scores[best])
