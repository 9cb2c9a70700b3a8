"""Pre-training without labels: losses and views against slow transcriptions, repeatability, resuming, learning."""

import copy
import math
import os
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.errors import Interrupted
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.training.losses import cosine, nt_xent
from bdclean.training.pretraining.augmentations import LUMINANCE, Views, blur, recolour, resized_crop
from bdclean.training.pretraining.byol import BYOL
from bdclean.training.pretraining.knn import features, knn
from bdclean.training.pretraining.learning import follow
from bdclean.training.pretraining.moco import MoCo, enqueue, info_nce
from bdclean.training.pretraining.simclr import SimCLR
from bdclean.training.resume import Saved
from bdclean.training.run import Precision, Run

CPU = torch.device("cpu")
METHODS = [SimCLR, MoCo, BYOL]
NOTHING = Views(1.0, 1.0, 0, 0, 0, 0, 0, 0, 0, 0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


PHOTOS = torch.rand(6, 3, 16, 12, generator=generator(1))


def encoder(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 24, 3, 2, bias=False),
            nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
    return Classifier(network, parse_preprocess("half"))


def squares(n=96):
    """Four kinds of pictures, told apart by a texture, whatever its colour and that of the background."""
    g = generator(3)
    labels = torch.arange(n) % 4
    background = 140 * torch.rand(n, 3, 1, 1, generator=g)
    tint = 30 + 80 * torch.rand(n, 3, 1, 1, generator=g)
    images = background + 10 * torch.rand(n, 3, 16, 16, generator=g)
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    textures = torch.stack(
        [rows % 4 < 2, columns % 4 < 2, (rows + columns) % 4 < 2, (rows % 2 == 0) & (columns % 2 == 0)]
    )
    images[:, :, 2:14, 2:14] += tint * textures[labels][:, None]
    return ImageSet(images.to(torch.uint8), labels, tuple("abcd"))


# --- losses -------------------------------------------------------------------------------------------------


def test_nt_xent_is_the_equation():
    first, second = torch.randn(2, 5, 7, generator=generator())
    views = [*first, *second]
    total = 0.0
    for i in range(10):
        partner = (i + 5) % 10
        terms = [math.exp(float(views[i] @ v / (views[i].norm() * v.norm())) / 0.3) for v in views]
        total -= math.log(terms[partner] / (sum(terms) - terms[i]))
    assert float(nt_xent(first, second, 0.3)) == pytest.approx(total / 10, rel=1e-5)


def test_nt_xent_between_its_extremes_and_whatever_the_length():
    alike = torch.ones(4, 3)
    assert float(nt_xent(alike, alike)) == pytest.approx(math.log(7))
    apart = torch.eye(4)
    assert 0 <= float(nt_xent(apart, apart, 0.01)) < 1e-6
    first, second = torch.randn(2, 5, 7, generator=generator())
    assert torch.allclose(nt_xent(first * 9, second / 3), nt_xent(second, first))
    assert float(cosine(apart, -2 * apart)) == -1


def test_info_nce_is_the_equation():
    queries, positives = (F.normalize(torch.randn(4, 5, generator=generator(s)), dim=1) for s in (0, 1))
    negatives = F.normalize(torch.randn(6, 5, generator=generator(2)), dim=1)
    total = 0.0
    for q, p in zip(queries, positives, strict=True):
        own = math.exp(float(q @ p) / 0.2)
        total -= math.log(own / (own + sum(math.exp(float(q @ k) / 0.2) for k in negatives)))
    assert float(info_nce(queries, positives, negatives, 0.2)) == pytest.approx(total / 4, rel=1e-5)


def test_the_queue_forgets_the_oldest_keys_first():
    queue = torch.zeros(5, 1)
    for step in range(4):
        enqueue(queue, torch.full((2, 1), step + 1.0), step * 2)
    assert queue[:, 0].tolist() == [3, 4, 4, 2, 3]
    enqueue(queue, torch.arange(7.0)[:, None], 0)
    assert sorted(queue[:, 0].tolist()) == [2, 3, 4, 5, 6]


def test_a_slow_copy_follows():
    fast, slow = nn.Linear(2, 2), nn.Linear(2, 2)
    before = copy.deepcopy(slow)
    follow(slow, fast, 1.0)
    assert torch.equal(slow.weight, before.weight)
    follow(slow, fast, 0.75)
    assert torch.allclose(slow.weight, 0.75 * before.weight + 0.25 * fast.weight)
    follow(slow, fast, 0.0)
    assert torch.allclose(slow.weight, fast.weight)


# --- views --------------------------------------------------------------------------------------------------


def test_views_have_range_shape_and_a_draw_for_each_image():
    same = PHOTOS[:1].expand(8, -1, -1, -1)
    for views in (Views(), Views(blurred=1.0), Views(hue=0.5, brightness=1.0, contrast=1.0)):
        seen = views(same, generator())
        assert seen.shape == same.shape and seen.dtype == torch.float32
        assert 0 <= float(seen.min()) and float(seen.max()) <= 1
        assert len({view.numpy().tobytes() for view in seen}) == 8
        assert torch.equal(seen, views(same, generator())) and not torch.equal(
            seen, views(same, generator(1))
        )
    assert torch.equal(same[0], PHOTOS[0]), "wrote into its argument"


def test_views_take_pixels():
    pixels = (PHOTOS * 255).round().to(torch.uint8)
    assert torch.equal(Views()(pixels, generator()), Views()(pixels.float() / 255, generator()))


def test_views_that_change_nothing():
    assert torch.equal(NOTHING(PHOTOS, generator()), PHOTOS)
    assert torch.allclose(resized_crop(PHOTOS, generator(), 1.0, 1.0, 0.0), PHOTOS, atol=1e-6)
    assert torch.allclose(resized_crop(PHOTOS, generator(), 1.0, 1.0, 1.0), PHOTOS.flip(3), atol=1e-6)
    assert torch.allclose(recolour(PHOTOS, generator(), (0.9, 0.9, 0.9, 0.5), 0.0, 1e-9), PHOTOS, atol=1e-5)
    assert torch.equal(blur(PHOTOS, generator(), 0.0), PHOTOS)


def test_a_crop_is_a_part_of_the_image_at_its_own_place():
    ramp = torch.linspace(0, 1, 32).expand(400, 3, 32, 32)
    seen = resized_crop(ramp, generator(), 0.25, 1.0, 0.0)[:, 0, 16]
    spans = seen[:, 31] - seen[:, 0]
    assert 0.42 < float(spans.min()) < 0.6 and 0.9 < float(spans.max()) <= 1
    assert float(seen[:, 0].min()) < 0.05 and float(seen[:, 31].max()) > 0.95


def grey_of(image):
    return sum(share * image[c] for c, share in enumerate(LUMINANCE))


def test_colours_change_as_one_by_one():
    n = 40
    photos = 0.3 + 0.3 * torch.rand(
        n, 3, 4, 4, generator=generator(2)
    )  # far enough from 0 and 1 to clamp nothing
    grey = recolour(photos, generator(), (0, 0, 0, 0), 0.0, 1.0)
    dull = recolour(photos, generator(), (0, 0, 0.9, 0), 1.0, 0.0)
    turned = recolour(photos, generator(), (0, 0, 0, 0.1), 1.0, 0.0)
    for k in range(n):
        luminance = grey_of(photos[k])
        assert torch.allclose(grey[k], luminance.expand(3, 4, 4), atol=1e-5)
        assert torch.allclose(grey_of(turned[k]), luminance, atol=2e-3)
        away, now = photos[k] - luminance, dull[k] - luminance
        share = float((away * now).sum() / (away * away).sum())
        assert 0.1 - 1e-4 <= share <= 1.9 + 1e-4 and torch.allclose(now, share * away, atol=2e-3)
    light = recolour(photos, generator(), (0.4, 0, 0, 0), 1.0, 0.0) / photos
    assert (
        float(light.flatten(1).std(1).max()) < 1e-5
        and 0.6 <= float(light.min()) < float(light.max()) <= 1.4001
    )
    flat = recolour(photos, generator(), (0, 0.4, 0, 0), 1.0, 0.0)
    for k in range(n):
        mean = grey_of(photos[k]).mean()
        share = (flat[k] - mean) / (photos[k] - mean)
        assert float(share.max() - share.min()) < 1e-2 and torch.allclose(
            grey_of(flat[k]).mean(), mean, atol=1e-4
        )


def test_blur_smooths_and_keeps_flat_images():
    assert torch.allclose(
        blur(torch.full((3, 3, 16, 16), 0.4), generator(), 1.0), torch.tensor(0.4), atol=1e-6
    )
    assert float(blur(PHOTOS, generator(), 1.0).std()) < float(PHOTOS.std())


# --- the methods --------------------------------------------------------------------------------------------


def pretrain(method, run, epochs=1.0):
    small = {"queue": 40} if method is MoCo else {}
    model = encoder()
    found = method(epochs=epochs, batch_size=24, peak=0.01, **small)(model, squares(), run)
    return {**model.state_dict(), **found.projector.state_dict()}, found.curve, model


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits_and_another_does_not(method):
    first, curve, model = pretrain(method, Run(CPU, Precision(), 0))
    torch.rand(3)
    again, same_curve, _ = pretrain(method, Run(CPU, Precision(), 0))
    other, *_ = pretrain(method, Run(CPU, Precision(), 1))
    assert all(torch.equal(first[name], again[name]) for name in first) and curve == same_curve
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert not model.training and all(math.isfinite(row["loss"]) for row in curve)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", [Precision(), Precision(True, True)], ids=str)
def test_a_run_that_was_stopped_ends_in_the_same_bits(method, precision, tmp_path):
    expected, curve, _ = pretrain(method, Run(CPU, precision, 0))
    for stop in (1, 3):
        path = tmp_path / f"{stop}.resume.safetensors"

        def tell(stage, done, total, stop=stop, **measures):
            if done == stop:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted):
            pretrain(method, Run(CPU, precision, 0, tell, Saved(path, {"seed": 0})))
        saved = Saved(path, {"seed": 0})
        assert saved.open() and saved.position.done == stop
        found, found_curve, _ = pretrain(method, Run(CPU, precision, 0, saved=saved))
        assert all(torch.equal(found[name], expected[name]) for name in expected) and found_curve == curve


def found_again(model):
    """How many images are found by one view among another view of all of them, by features less their mean."""
    first, second = (features(model, Views()(squares().images, generator(s)), CPU) for s in (1, 2))
    first, second = (F.normalize(view - view.mean(0), dim=1) for view in (first, second))
    return float(((first @ second.T).argmax(1) == torch.arange(len(first))).float().mean())


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_what_views_have_in_common(method):
    _, curve, model = pretrain(method, Run(CPU, Precision(), 0), epochs=15)
    if method is not MoCo:  # whose queue begins with random keys, which are easy
        assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    assert found_again(model) > 1.5 * found_again(encoder())


# --- nearest neighbours -------------------------------------------------------------------------------------


def test_nearest_neighbours_vote_by_their_cosine():
    g = generator()
    memory, queries = torch.randn(30, 6, generator=g), torch.randn(9, 6, generator=g)
    labels = torch.randint(0, 3, (30,), generator=g)
    found = knn(memory, labels, queries, 3, neighbours=7, temperature=0.5)
    for query, answer in zip(queries, found.tolist(), strict=True):
        cosines = [float(F.cosine_similarity(query, m, dim=0)) for m in memory]
        votes = [0.0] * 3
        for k in sorted(range(30), key=lambda k: -cosines[k])[:7]:
            votes[int(labels[k])] += math.exp(cosines[k] / 0.5)
        assert answer == votes.index(max(votes))
    assert knn(memory[:2], labels[:2], queries, 3).shape == (9,), "fewer images than neighbours"
    assert torch.equal(knn(memory, labels, memory, 3, neighbours=1), labels)
    assert knn(memory, labels, queries, 3, temperature=1e-3).shape == (9,), "nothing overflows"
