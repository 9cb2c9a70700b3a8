"""The map of features: axes against a transcription, and what a backdoor and its removal look like on it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bdclean.measuring.feature_map import SHOWN, alignment, feature_map, principal_axes
from bdclean.measuring.predictor import Predictor
from bdclean.measuring.probe import Encoded, Features, Probing, nearest_mean
from bdclean.measuring.trial import Trial
from bdclean.record.run import Rate, RunRecord, TriggerRow
from bdclean.report.page.scatter import spread
from bdclean.triggers.badnets import BadNets

CLASSES, WIDTH = 4, 8
PATCH = BadNets(size=3, position="bottom-right", pattern="white")
ROW = TriggerRow(PATCH.spec(), "patch", target=2, asr=Rate(1.0, 100), outcome="fails")


class Looking(nn.Module):
    """An encoder of pixels by a random matrix; where `fooled`, a white corner gives one direction."""

    def __init__(self, fooled, turn=None):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = torch.randn(3 * 12 * 12, WIDTH, generator=generator) @ (
            torch.eye(WIDTH) if turn is None else turn
        )
        self.fooled = fooled

    def forward(self, images):
        found = (images.flatten(1).float() / 255 - 0.5) @ self.matrix
        if self.fooled:
            found[(images[:, :, -3:, -3:] == 255).flatten(1).all(1)] = self.matrix[0]
        return found


def trial(fooled=True, labeled=True, n=150, turn=None, known=True):
    images = torch.randint(200, (n, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(n) % CLASSES
    features = Features(Predictor(Looking(fooled, turn), torch.device("cpu")))
    head = nearest_mean(features(images), labels, CLASSES)
    encoded = Encoded(features, Probing(images, labels, CLASSES, known), head, {})
    return Trial(
        encoded.predict, images, labels, labels, CLASSES, labeled, not labeled, 0.2, 0, encoded=encoded
    )


def test_axes_are_the_leading_eigenvectors_of_the_covariance():
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [3.0, 1, 2, 0.5, 0.1]
    )
    mean, axes, explained = principal_axes(features)
    values, vectors = np.linalg.eigh(np.cov(features.double().numpy().T))
    assert explained == pytest.approx(values[-2:].sum() / values.sum())
    assert mean.numpy() == pytest.approx(features.double().numpy().mean(0))
    for k in range(2):
        axis = vectors[:, -1 - k]
        assert axes[:, k].numpy() == pytest.approx(axis * np.sign(axis[np.abs(axis).argmax()]), abs=1e-8)


@pytest.mark.parametrize("features", [torch.ones(9, 3), torch.tensor([[1.0], [-1.0], [1.0]])])
def test_features_without_two_directions_have_axes_too(features):
    _, axes, explained = principal_axes(features)
    assert axes.shape == (features.shape[1], 2) and bool(axes.isfinite().all()) and 0 <= explained <= 1


def test_a_turned_cloud_is_turned_back():
    points = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)).double()
    for turn in ([[0.6, -0.8], [0.8, 0.6]], [[0.0, 1.0], [1.0, 0.0]]):
        turned = points @ torch.tensor(turn).double()
        assert torch.allclose(turned @ alignment(turned, points), points)


def test_a_backdoor_gathers_stamped_images_and_a_cleansed_encoder_does_not():
    found = feature_map([ROW], [PATCH], trial(), trial(fooled=False))
    assert (found.trigger, found.target, found.grouping) == (PATCH.spec(), 2, "labels")
    before, after = found.models
    assert (before.model, after.model) == ("suspect", "cleansed")
    assert len(found.groups) == len(before.clean) == len(after.stamped) == SHOWN
    assert set(found.groups) == set(range(CLASSES))
    assert spread(before.stamped) < 1e-9 and spread(after.stamped) > 0.5 * spread(after.clean)
    assert np.allclose(before.clean, after.clean), "the encoders differ on stamped images alone"
    record = RunRecord("cleanse", feature_map=found)
    assert RunRecord.from_json(record.to_json()) == record


def test_another_encoder_has_axes_of_its_own_that_are_turned_alike():
    """An encoder whose features are those of the suspect in other coordinates has the same map."""
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)))[0]
    found = feature_map([ROW], [PATCH], trial(), trial(turn=turn))
    before, after = found.models
    assert np.allclose(before.clean, after.clean, atol=1e-3)
    assert np.allclose(before.stamped, after.stamped, atol=1e-3)


def test_a_map_is_the_same_again_and_says_what_its_colours_are():
    assert feature_map([ROW], [PATCH], trial()) == feature_map([ROW], [PATCH], trial())
    assert feature_map([ROW], [PATCH], trial(labeled=False)).grouping == "answers"
    assert feature_map([ROW], [PATCH], trial(labeled=False, known=False)).grouping == "clusters"


def test_there_is_no_map_of_a_classifier_nor_without_a_measured_row():
    assert feature_map([ROW], [PATCH], replace(trial(), encoded=None)) is None
    assert feature_map([], [PATCH], trial()) is None
    assert feature_map([TriggerRow(PATCH.spec())], [PATCH], trial()) is None
