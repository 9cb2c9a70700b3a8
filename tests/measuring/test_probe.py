"""Probes: blobs that any of them tells apart, votes and gradients written out, and what features remember."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdclean.errors import Refused
from bdclean.measuring import probe
from bdclean.measuring.predictor import Predictor
from bdclean.measuring.probe import (
    Encoded,
    Features,
    Probing,
    check_features,
    knn,
    linear,
    mlp,
    nearest_mean,
)
from bdclean.training.linear_head import DECAY

CLASSES, WIDTH = 3, 6
HEADS = {
    "linear": linear,
    "knn": knn,
    "nearest mean": nearest_mean,
    "mlp": lambda features, labels, classes: mlp(features, labels, classes, 0),
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(probe, "MLP_STEPS", 120)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n=90, seed=0, spread=0.1):
    """Features of length one around CLASSES directions, with their classes."""
    labels = torch.arange(n) % CLASSES
    features = torch.eye(CLASSES, WIDTH)[labels] + spread * torch.randn(n, WIDTH, generator=seeded(seed))
    return F.normalize(features, dim=1), labels


def pictures(n, seed=0):
    return torch.randint(256, (n, 3, 4, 4), generator=seeded(seed), dtype=torch.uint8)


class Counting(nn.Module):
    """An encoder, of a picture's corner, that counts the images it sees."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.width, self.seen = width, 0

    def forward(self, images):
        self.seen += len(images)
        return images.flatten(1)[:, : self.width].float() + 1


def features_of(encoder):
    return Features(Predictor(encoder, torch.device("cpu"), 4))


# --- features -----------------------------------------------------------------------------------------------


def test_features_have_length_one_and_the_encoders_direction():
    images = pictures(9)
    found = features_of(Counting())(images)
    for image, row in zip(images, found, strict=True):
        raw = [float(v) + 1 for v in image.flatten()[:WIDTH]]
        length = math.sqrt(sum(v * v for v in raw))
        assert row.tolist() == pytest.approx([v / length for v in raw], rel=1e-5)
    assert found.dtype == torch.float32 and bool((found.norm(dim=1) - 1).abs().max() < 1e-6)


def test_images_are_encoded_once_and_others_anew():
    encoder = Counting()
    features = features_of(encoder)
    first = features(pictures(9))
    assert torch.equal(features(pictures(9)), first) and encoder.seen == 9
    features(pictures(9, seed=1))
    assert encoder.seen == 18
    features(pictures(9)[:5])
    assert encoder.seen == 23
    features(pictures(9).flip(0).flip(0))
    assert encoder.seen == 23
    features(pictures(9).contiguous(memory_format=torch.channels_last))
    assert encoder.seen == 23, "the layout is not the image"


def test_the_features_seen_longest_ago_are_forgotten(monkeypatch):
    monkeypatch.setattr(probe, "REMEMBERED", 2 * 4 * WIDTH * 4)  # two times four images
    encoder = Counting()
    features = features_of(encoder)
    for seed in (0, 1, 0, 2):
        features(pictures(4, seed))
    assert encoder.seen == 12 and features.held == 2 * 4 * WIDTH * 4
    features(pictures(4, 0))
    assert encoder.seen == 12, "looked at again, so it was not the oldest"
    features(pictures(4, 1))
    assert encoder.seen == 16
    features(pictures(40, 3))
    assert len(features.remembered) == 1, "more than there is room for is kept while it is all there is"


def test_features_that_are_all_alike_are_refused():
    check_features(blobs()[0])
    same = F.normalize(torch.ones(5, WIDTH), dim=1)
    with pytest.raises(Refused, match="the same features"):
        check_features(same)
    check_features(torch.cat([same, blobs(1)[0]]))
    constant = Probing(torch.full((6, 3, 4, 4), 9, dtype=torch.uint8), torch.arange(6) % 2, 2, True)
    with pytest.raises(Refused, match="the same features"):
        Encoded.of(features_of(Counting()), constant)


def test_features_that_are_no_numbers_are_refused():
    class Broken(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :3].float() / 0

    with pytest.raises(Refused, match="finite"):
        features_of(Broken())(pictures(3))


# --- heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_blobs_are_told_apart(name):
    features, labels = blobs()
    head = HEADS[name](features, labels, CLASSES)
    others, expected = blobs(60, seed=1)
    assert torch.equal(head(features), labels) and torch.equal(head(others), expected)


@pytest.mark.parametrize("name", HEADS)
def test_heads_repeat_and_leave_the_global_generator(name):
    features, labels = blobs(spread=0.7)
    before = torch.get_rng_state()
    first = HEADS[name](features, labels, CLASSES)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = HEADS[name](features, labels, CLASSES)
    others = blobs(300, seed=1, spread=0.7)[0]
    assert torch.equal(first(others), again(others))
    answers = first(others)
    assert answers.dtype == torch.int64 and 0 <= int(answers.min()) and int(answers.max()) < CLASSES
    parts = torch.cat([first(part) for part in others.split(7)])
    assert torch.equal(answers, parts), "an image's class depends on the images beside it"


@pytest.mark.parametrize("name", HEADS)
def test_a_class_without_images_is_given_to_none(name):
    features, labels = blobs(spread=0.5)
    head = HEADS[name](features, labels, CLASSES + 1)
    assert int(head(blobs(300, seed=1, spread=0.5)[0]).max()) < CLASSES


def test_the_linear_probe_ends_where_its_written_out_gradient_is_nothing():
    features, labels = blobs(60, spread=0.6)
    head = linear(features, labels, CLASSES)
    x = ((features - features.mean(0)) / features.std(0)).double().tolist()
    # A linear map is known by what it makes of nothing and of each axis.
    offset = head.network(torch.zeros(1, WIDTH))[0]
    weight = (head.network(torch.eye(WIDTH)) - offset).T.double().tolist()
    offset = offset.double().tolist()
    slopes = [[DECAY * weight[c][k] for k in range(WIDTH)] for c in range(CLASSES)]
    shifts = [0.0] * CLASSES
    for row, label in zip(x, labels.tolist(), strict=True):
        logits = [offset[c] + sum(weight[c][k] * row[k] for k in range(WIDTH)) for c in range(CLASSES)]
        parts = [math.exp(v) for v in logits]
        for c in range(CLASSES):
            error = (parts[c] / sum(parts) - (c == label)) / len(x)
            shifts[c] += error
            for k in range(WIDTH):
                slopes[c][k] += error * row[k]
    assert max(abs(v) for row in [*slopes, shifts] for v in row) < 1e-4
    assert max(abs(v) for row in weight for v in row) > 0.1


def test_the_linear_probe_does_not_see_scale_and_shift():
    features, labels = blobs(spread=0.6)
    others = blobs(300, seed=1, spread=0.6)[0]
    plain = linear(features, labels, CLASSES)(others)
    moved = linear(9 * features + 4, labels, CLASSES)(9 * others + 4)
    assert float((plain == moved).float().mean()) > 0.99


def test_a_dead_feature_does_no_harm_to_the_linear_probe():
    features, labels = blobs()
    features[:, 5] = 0.25
    assert torch.equal(linear(features, labels, CLASSES)(features), labels)


def test_the_mlp_differs_with_its_seed():
    features, labels = blobs(spread=0.7)
    others = blobs(500, seed=1, spread=0.7)[0]
    assert not torch.equal(
        mlp(features, labels, CLASSES, 0)(others), mlp(features, labels, CLASSES, 1)(others)
    )


def test_the_mlp_bends(monkeypatch):
    monkeypatch.setattr(probe, "MLP_STEPS", 400)
    points = F.normalize(torch.randn(400, 2, generator=seeded()), dim=1)
    labels = (points[:, 0] * points[:, 1] > 0).long()  # no line through them
    assert float((mlp(points, labels, 2, 0)(points) == labels).float().mean()) > 0.95
    assert float((linear(points, labels, 2)(points) == labels).float().mean()) < 0.75


def test_neighbours_vote_by_their_cosine():
    features, labels = blobs(30, spread=0.9)
    queries = blobs(20, seed=1, spread=0.9)[0]
    found = knn(features, labels, CLASSES)(queries)
    for query, answer in zip(queries, found.tolist(), strict=True):
        cosines = [sum(a * b for a, b in zip(query.tolist(), row.tolist(), strict=True)) for row in features]
        votes = [0.0] * CLASSES
        for k in sorted(range(30), key=lambda k: -cosines[k])[: 30 // (2 * CLASSES)]:
            votes[int(labels[k])] += math.exp(cosines[k] / 0.5)
        assert answer == votes.index(max(votes))
    assert knn(features[:2], labels[:2], CLASSES)(queries).shape == (20,)
    assert knn(features, labels, CLASSES)(queries[:0]).shape == (0,)


def test_the_nearest_mean_is_the_written_out_one():
    features, groups = blobs(30, spread=0.9)
    queries = blobs(20, seed=1, spread=0.9)[0]
    centre = features.double().mean(0)

    def direction(x):
        return (x.double() - centre) / (x.double() - centre).norm()

    means = [sum(direction(x) for x in features[groups == c]) for c in range(CLASSES)]
    for query, answer in zip(queries, nearest_mean(features, groups, CLASSES)(queries).tolist(), strict=True):
        cosines = [float(direction(query) @ mean / mean.norm()) for mean in means]
        assert answer == cosines.index(max(cosines))


# --- all of them --------------------------------------------------------------------------------------------


def test_with_labels_there_are_all_probes_and_without_means_alone():
    images = pictures(40)
    labels = (images.flatten(1)[:, 0] > 127).long()
    encoder = Counting()
    features = features_of(encoder)
    labeled = Encoded.of(features, Probing(images, labels, 2, True))
    assert set(labeled.others) == {"mlp/0", "mlp/1", "mlp/2", "knn"}
    assert torch.equal(labeled.predict(images), labeled.first(features(images)))
    assert encoder.seen == 40
    assert float((labeled.predict(images) == labels).float().mean()) > 0.9
    unlabeled = Encoded.of(features, Probing(images, labels, 2, False))
    assert not unlabeled.others and unlabeled.predict(images[:4]).shape == (4,)
