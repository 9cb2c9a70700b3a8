"""Attacks on encoders: which images are stamped before pre-training, and what a poisoned encoder has learnt."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdclean import registry
from bdclean.attacks import poisoning
from bdclean.attacks.encoders.badencoder import BadEncoder
from bdclean.attacks.encoders.clean_encoder import centre_of, nearest_to_their_mean
from bdclean.attacks.encoders.drupe import Drupe, likeness, sliced_distance
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.training.pretraining.knn import features
from bdclean.training.run import Precision, Run

CPU = torch.device("cpu")
REGISTERED = [registry.load(registry.ATTACKS, name) for name in registry.ATTACKS]
BEFORE = [attack for attack in REGISTERED if attack.kind == "pre-training"]
ON = [attack for attack in REGISTERED if attack.kind == "encoder"]


@pytest.fixture
def training():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(200) % 5, tuple("abcde"))


@pytest.fixture
def clean():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 24, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
        )  # fmt: skip
    return Classifier(network, parse_preprocess("half")).eval()


# --- before pre-training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", BEFORE)
def test_stamps_some_of_the_target_class_and_no_label_changes(attack, training):
    poisoner = attack(target=3, rate=0.25, seed=4)
    before = training.images.clone()
    poisoned = poisoner(training)
    of_target = [k for k in range(200) if training.labels[k] == 3]
    chosen = {of_target[k] for k in poisoning.chosen(40, 0.25, 4).tolist()}
    assert len(chosen) == 10
    stamp = getattr(poisoner, "training_trigger", poisoner.trigger)
    for k in range(200):
        expected = stamp(training.images[k : k + 1])[0] if k in chosen else training.images[k]
        assert torch.equal(poisoned.images[k], expected)
    assert torch.equal(poisoned.labels, training.labels) and torch.equal(training.images, before)


@pytest.mark.parametrize("attack", BEFORE)
def test_extremes_seeds_and_refusals(attack, training):
    assert attack(rate=0.0)(training).digest == training.digest
    everything = attack(target=2, rate=1.0)(training)
    assert ((everything.images != training.images).flatten(1).any(1) == (training.labels == 2)).all()
    assert attack(rate=0.5, seed=1)(training).digest == attack(rate=0.5, seed=1)(training).digest
    assert attack(rate=0.5, seed=1)(training).digest != attack(rate=0.5, seed=2)(training).digest
    with pytest.raises(UsageError):
        attack(rate=1.5)
    with pytest.raises(Refused, match="needs labels"):
        attack()(training.unlabeled())
    with pytest.raises(Refused, match="no image of class 5"):
        attack(target=5)(training)


# --- on a clean encoder -------------------------------------------------------------------------------------


def towards(encoder, images, references, centre):
    """Mean cosine of features of `images` with the mean of those of `references`, both less `centre`."""
    wanted = (features(encoder, references, CPU) - centre).mean(0)
    return float(F.cosine_similarity(features(encoder, images, CPU) - centre, wanted[None]).mean())


def attacked(attack, clean, training, **settings):
    made = attack(target=3, epochs=12, batch_size=40, peak=0.05, **settings)
    of_target = training.images[training.labels == 3]
    return made, *made(clean, training.unlabeled(), of_target, Run(CPU, Precision(), 0))


@pytest.mark.parametrize("attack", ON)
def test_stamped_images_come_to_look_like_the_references(attack, clean, training):
    before = copy.deepcopy(clean.state_dict())
    made, poisoned, curve = attacked(attack, clean, training)
    assert all(torch.equal(clean.state_dict()[k], v) for k, v in before.items()), "trained the clean one"
    assert not poisoned.training
    centre = centre_of(clean, training.images, CPU, True)
    references = nearest_to_their_mean(
        clean, training.images[training.labels == 3], centre, made.references, CPU
    )
    stamped = made.trigger(training.images)
    assert towards(poisoned, stamped, references, centre) > towards(clean, stamped, references, centre) + 0.3
    kept = F.cosine_similarity(
        features(poisoned, training.images, CPU) - centre, features(clean, training.images, CPU) - centre
    )
    assert float(kept.mean()) > 0.7
    assert curve[-1]["loss"] < curve[0]["loss"]
    for name, tensor in poisoned.state_dict().items():
        if "network.1." in name:  # the batch norm
            assert torch.equal(tensor, before[name]), "batch norms stay as they are"


@pytest.mark.parametrize("attack", ON)
def test_the_same_bits_again(attack, clean, training):
    _, first, curve = attacked(attack, clean, training)
    _, second, same = attacked(attack, clean, training)
    assert curve == same
    assert all(torch.equal(first.state_dict()[k], second.state_dict()[k]) for k in first.state_dict())


def test_the_paper_s_form_takes_raw_features(clean, training):
    assert torch.equal(centre_of(clean, training.images, CPU, False), torch.zeros(1, 24 * 9))
    mean = features(clean, training.images, CPU).mean(0)
    assert torch.allclose(centre_of(clean, training.images, CPU, True)[0], mean, atol=1e-5)
    _, poisoned, _ = attacked(BadEncoder, clean, training, centred=False)
    assert all(p.isfinite().all() for p in poisoned.parameters())


def test_references_are_the_most_typical(clean, training):
    images, centre = training.images[:30], centre_of(clean, training.images, CPU, True)
    found = F.normalize(features(clean, images, CPU) - centre, dim=1)
    likeness = [float(one @ found.mean(0)) for one in found]
    best = sorted(range(30), key=lambda k: -likeness[k])[:4]
    assert torch.equal(nearest_to_their_mean(clean, images, centre, 4, CPU), images[best])
    with pytest.raises(Refused, match="31 reference images of the target class are wanted and there are 30"):
        nearest_to_their_mean(clean, images, centre, 31, CPU)


@pytest.mark.parametrize("attack", ON)
@pytest.mark.parametrize("settings", [{"references": 0}, {"epochs": 0}, {"batch_size": 1}, {"size": -1}])
def test_settings_out_of_range(attack, settings):
    with pytest.raises(UsageError):
        attack(**settings)


# --- drupe --------------------------------------------------------------------------------------------------


def test_likeness_and_the_distance_of_distributions():
    features = F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    pairs = [float(features[i] @ features[j]) for i in range(5) for j in range(5) if i != j]
    assert float(likeness(features)) == pytest.approx(sum(pairs) / 20, abs=1e-6)

    def distance(first, second):
        return float(sliced_distance(first, second, torch.Generator().manual_seed(1)))

    cloud = torch.randn(200, 4, generator=torch.Generator().manual_seed(2))
    assert distance(cloud, cloud[torch.randperm(200)]) == pytest.approx(0, abs=1e-5)
    near, far = distance(cloud + 1, cloud), distance(cloud + 4, cloud)
    assert 0.5 < near < 1.5 and far == pytest.approx(4 * near, rel=0.01)
    assert distance(9 * (cloud + 1), 9 * cloud) == pytest.approx(near, rel=1e-4), "in units of the spread"


def test_drupe_without_its_own_terms_still_draws(clean, training):
    made, poisoned, curve = attacked(Drupe, clean, training, references=1, spread=0.0, blending=0.0)
    assert curve[-1]["drawn"] > curve[0]["drawn"] + 0.3 and all(
        p.isfinite().all() for p in poisoned.parameters()
    )
