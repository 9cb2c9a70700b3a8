"""Clusters of features, and the head that makes them classes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdclean.measuring.probe import nearest_mean
from bdclean.training.clusters import SHARPNESS, Clustered, clusters, unit_features
from bdclean.training.run import Precision, Run

CLASSES, WIDTH = 4, 6
RUN = Run(torch.device("cpu"), Precision(), 0)


def blobs(n=80, seed=0, spread=0.2):
    """Features of length one around CLASSES directions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    noise = spread * torch.randn(n, WIDTH, generator=generator)
    return F.normalize(torch.eye(CLASSES, WIDTH)[labels] + noise, dim=1), labels


class Flat(nn.Module):
    """A linear encoder of pictures of 4 x 4."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(3)))

    def forward(self, x):
        return (x.flatten(1) - 0.5) @ self.matrix


def pictures(n=50):
    return torch.randint(256, (n, 3, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_clusters_are_the_blobs():
    features, labels = blobs()
    found = clusters(features, CLASSES, 0)
    assert found.dtype == torch.int64 and found.shape == labels.shape
    pairs = set(zip(found.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == CLASSES == len({group for group, _ in pairs})
    assert torch.equal(found, clusters(features, CLASSES, 0))


@pytest.mark.parametrize("seed", range(4))
def test_no_cluster_is_empty(seed):
    found = clusters(blobs(40, seed=seed, spread=2.0)[0], 12, seed)
    assert sorted(set(found.tolist())) == list(range(int(found.max()) + 1))


def test_fewer_different_images_than_clusters_are_clusters_all_the_same():
    """Copies, say: k-means once warned of it on the terminal."""
    features = torch.eye(3, WIDTH).repeat(20, 1)
    for seed in range(4):
        found = clusters(features, 8, seed)
        assert sorted(set(found.tolist())) == [0, 1, 2]
        assert len(set(zip(found.tolist(), [k % 3 for k in range(60)], strict=True))) == 3


def test_unit_features_are_the_encoders_whatever_the_batch():
    images, encoder = pictures(), Flat()
    expected = F.normalize(encoder(images.float() / 255), dim=1)
    for size in (7, 256):
        assert torch.allclose(unit_features(encoder, images, RUN, size), expected, atol=1e-6)


def test_the_head_is_the_nearest_mean_and_its_logits_are_cosines():
    images, encoder = pictures(), Flat()
    features = unit_features(encoder, images, RUN)
    groups = torch.arange(len(images)) % 3
    logits = Clustered(encoder, features, groups)(images.float() / 255)
    assert logits.shape == (50, 3) and logits.abs().max() <= SHARPNESS * (1 + 1e-5)
    assert torch.equal(logits.argmax(1), nearest_mean(features, groups, 3)(features))
    centred = F.normalize(features - features.mean(0), dim=1)
    for image in (0, 13):
        for group in range(3):
            mean = centred[groups == group].sum(0)
            cosine = float(centred[image] @ mean / mean.norm())
            assert logits[image, group].item() == pytest.approx(SHARPNESS * cosine, abs=1e-4)
