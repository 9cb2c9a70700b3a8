"""Detectors of encoders on one whose backdoor is known: a bright patch draws all images to one direction."""

import pytest
import torch
from torch import nn

from bdclean.detectors.decree import Decree, pairwise_cosine
from bdclean.detectors.inversion_encoder import InversionEncoder
from bdclean.errors import Refused, UsageError
from bdclean.training.run import Precision, Run

SIDE, WIDTH = 10, 8
SIGNS = torch.randn((WIDTH, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).sign()


class Planted(nn.Module):
    """Answers to WIDTH patterns over the whole picture; a bright 3x3 corner outweighs them by `backdoor`."""

    def __init__(self, backdoor=60.0):
        super().__init__()
        self.register_buffer("weight", 0.1 * SIGNS)
        self.backdoor = backdoor

    def forward(self, x):
        found = torch.einsum("nchw,kchw->nk", x - 0.5, self.weight)
        if self.backdoor:
            bright = (x[:, :, -3:, -3:].mean((1, 2, 3)) - 0.5).relu()
            found = found + self.backdoor * bright[:, None] * nn.functional.one_hot(torch.tensor(2), WIDTH)
        return found


class Fixed(nn.Module):
    """An encoder that gives every image the same features, all `value`."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return 0 * x.mean((1, 2, 3))[:, None] + torch.full((len(x), WIDTH), self.value)


def pictures(n=160):
    noise = torch.randn((n, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    images = 0.5 + 0.2 * SIGNS[torch.arange(n) % WIDTH] + 0.05 * noise
    return (images * 255).clamp(0, 255).to(torch.uint8)


def run(seed=0):
    return Run(torch.device("cpu"), Precision(), seed)


def corner(picture):
    """How much more a picture on grey differs from grey in the corner than elsewhere."""
    away = (picture - 0.5).abs()
    inside = away[:, -3:, -3:].sum()
    return float(inside / (away.sum() - inside))


@pytest.mark.slow
def test_the_cluster_that_a_backdoor_leads_to_is_the_outlier():
    found = InversionEncoder(clusters=WIDTH, steps=100)(Planted(), None, pictures(), run())
    (outlier,), (finding,), (picture,) = found.outliers, found.findings, found.pictures.values()
    assert finding["verdict"] == "outlier" and finding["score"] == outlier.size < finding["threshold"]
    assert f"to cluster {outlier.target}" in finding["reason"] and corner(picture) > 1


@pytest.mark.slow
def test_an_encoder_without_a_backdoor_has_no_outlier():
    found = InversionEncoder(clusters=WIDTH, steps=100)(Planted(0.0), None, pictures(), run())
    assert not found.outliers and [f["verdict"] for f in found.findings] == ["no-outlier"]


@pytest.mark.parametrize(
    ("encoder", "images", "words"),
    [
        (Planted(), pictures(79), "79 images are too few for 8 clusters: give 80 or more"),
        (Fixed(1.0), pictures(), "make 1 clusters, 3 or more are needed"),
        (Fixed(float("nan")), pictures(), "not all finite"),
    ],
)
def test_inversion_says_what_it_lacks(encoder, images, words):
    with pytest.raises(Refused, match=words):
        InversionEncoder(clusters=WIDTH)(encoder, None, images, run())


def test_settings_are_checked():
    for wrong in ({"clusters": 2}, {"steps": 0}):
        with pytest.raises(UsageError, match="inversion"):
            InversionEncoder(**wrong)
    for wrong in ({"batch_size": 1}, {"steps": 0}):
        with pytest.raises(UsageError, match="decree"):
            Decree(**wrong)


def test_the_pairwise_cosine_is_the_double_loop_and_has_both_extremes():
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    rows = features / features.norm(dim=1, keepdim=True)
    total = sum(float(rows[i] @ rows[j]) for i in range(7) for j in range(7) if i != j)
    assert float(pairwise_cosine(features)) == pytest.approx(total / 42, abs=1e-6)
    assert float(pairwise_cosine(features[:1].expand(4, -1))) == pytest.approx(1)
    assert float(pairwise_cosine(torch.stack([features[0], -features[0]]))) == pytest.approx(-1)


@pytest.mark.slow
def test_decree_finds_the_patch_and_tells_its_norm_without_a_verdict():
    found = Decree(steps=300, batch_size=64)(Planted(600.0), None, pictures(), run())
    (finding,), (picture,) = found.findings, found.pictures.values()
    assert 0 < finding["score"] < 0.2 and finding["threshold"] == 0.1 and corner(picture) > 1
    assert finding["verdict"] == "undecided" and "Weak" in finding["reason"] and not found.outliers
    without = Decree(steps=300, batch_size=64)(Planted(0.0), None, pictures(), run())
    assert without.findings[0]["score"] is None or without.findings[0]["score"] > 2 * finding["score"]


def test_decree_without_a_successful_mask_has_no_norm():
    found = Decree(steps=2, batch_size=16)(Planted(0.0), None, pictures(), run())
    assert found.findings[0]["score"] is None and not found.pictures
    assert "no mask pulls" in found.findings[0]["reason"]


@pytest.mark.parametrize(
    ("encoder", "images", "words"),
    [(Planted(), pictures(99), "99 images are too few"), (Fixed(float("nan")), pictures(), "not all finite")],
)
def test_decree_says_what_it_lacks(encoder, images, words):
    with pytest.raises(Refused, match=words):
        Decree(steps=2)(encoder, None, images, run())
