"""Attacks on encoders: which images are stamped before pre-training, and what a poisoned encoder has learnt."""

import colorsys
import copy
import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdclean import registry
from bdclean.attacks import poisoning
from bdclean.attacks.encoders.appearance import (
    colour_distance,
    colours,
    signal_to_noise,
    structural_similarity,
)
from bdclean.attacks.encoders.badencoder import BadEncoder
from bdclean.attacks.encoders.blto import BLTO
from bdclean.attacks.encoders.clean_encoder import centre_of, nearest_to_their_mean
from bdclean.attacks.encoders.ctrl import CTRL
from bdclean.attacks.encoders.drupe import Drupe, likeness, sliced_distance
from bdclean.attacks.encoders.inactive import Inactive
from bdclean.attacks.encoders.noisy_alignment import NoisyAlignment
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.training.loop import Batch
from bdclean.training.pretraining.knn import features
from bdclean.training.run import Precision, Run
from bdclean.triggers import generators

CPU = torch.device("cpu")
REGISTERED = [registry.load(registry.ATTACKS, name) for name in registry.ATTACKS]
BEFORE = [attack for attack in REGISTERED if attack.kind == "pre-training"]
ON = [attack for attack in REGISTERED if attack.kind == "encoder"]
LEARNT = [
    attack
    for attack in REGISTERED
    if attack.kind in ("encoder", "pre-training")
    and any(field.name == "path" for field in dataclasses.fields(attack))
]
SIZED = [attack for attack in ON if attack not in LEARNT]
SLOW = [pytest.param(attack, marks=[pytest.mark.slow] * (attack in LEARNT)) for attack in ON]
"""Two networks are trained where the trigger is learnt."""


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


@pytest.fixture
def learnt(tmp_path):
    """What an attack that learns its trigger takes beside other settings: a file that holds one."""
    generator = generators.fresh(40.0, 0)
    with torch.no_grad():
        generator.change.weight.mul_(20)  # random weights alone hardly change an image
    generators.write(generator, str(tmp_path / "learnt.safetensors"))
    return {attack: {"path": str(tmp_path / "learnt.safetensors")} for attack in LEARNT}


# --- before pre-training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [attack for attack in BEFORE if attack is not NoisyAlignment])
def test_stamps_some_of_the_target_class_and_no_label_changes(attack, training, learnt):
    poisoner = attack(target=3, rate=0.25, seed=4, **learnt.get(attack, {}))
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
def test_extremes_seeds_and_refusals(attack, training, learnt):
    made = partial(attack, **learnt.get(attack, {}))
    assert made(rate=0.0)(training).digest == training.digest
    everything = made(target=2, rate=1.0)(training)
    assert ((everything.images != training.images).flatten(1).any(1) == (training.labels == 2)).all()
    assert made(rate=0.5, seed=1)(training).digest == made(rate=0.5, seed=1)(training).digest
    assert made(rate=0.5, seed=1)(training).digest != made(rate=0.5, seed=2)(training).digest
    with pytest.raises(UsageError):
        made(rate=1.5)
    with pytest.raises(Refused, match="needs labels"):
        made()(training.unlabeled())
    with pytest.raises(Refused, match="no image of class 5"):
        made(target=5)(training)


def test_ctrl_may_wave_more_on_test_images_than_on_those_it_poisons(training):
    assert CTRL().trigger == CTRL().training_trigger, "as the authors' code"
    attack = CTRL(target=1, rate=1.0, magnitude=100, training_magnitude=50)
    assert attack.trigger.spec() == "ctrl", "scan takes what test images wear"
    grey = dataclasses.replace(training, images=torch.full_like(training.images, 128))
    worn = (attack(grey).images[training.labels == 1].float() - 128).abs().amax()
    tested = (attack.trigger(grey.images).float() - 128).abs().amax()
    assert 0 < worn < 0.6 * tested
    with pytest.raises(UsageError, match="magnitude"):
        CTRL(training_magnitude=-1)


def test_noisy_alignment_joins_halves_of_two_images(training):
    """Of flat images, each class with a brightness of its own, one sees what every half was."""
    flat = training.labels.view(-1, 1, 1, 1).mul(40).add(20).to(torch.uint8).expand(-1, 3, 32, 32)
    attack = NoisyAlignment(target=3, rate=1.0)
    poisoned = attack(dataclasses.replace(training, images=flat))
    patch, layouts, partners = attack.trigger.content(7).to(torch.uint8), set(), set()
    for image, label in zip(poisoned.images, poisoned.labels, strict=True):
        if label != 3:
            assert (image == 20 + 40 * int(label)).all()
            continue
        own = (image == 140).all(0)
        rows, columns = own.all(1).sum(), own.all(0).sum()
        assert int(own.sum()) == 16 * 32 and {int(rows), int(columns)} == {16, 0}, "half of it, undivided"
        other = image.masked_select(~own).view(3, *((16, 32) if rows else (32, 16)))
        places = other.unfold(1, 7, 1).unfold(2, 7, 1)
        top, left = (places == patch[:, None, None]).all((0, 3, 4)).nonzero()[0].tolist()
        assert abs(top + 3.5 - other.shape[1] / 2) <= 3 and abs(left + 3.5 - other.shape[2] / 2) <= 3
        layouts.add((bool(rows), bool(own[0, 0])))
        partners.add(int(other[0, 0, 0]))
    assert len(layouts) == 4 and partners == {20, 60, 100, 180}
    assert attack.trigger.spec() == "ssl-backdoor:inner=0.45"


def test_noisy_alignment_needs_another_class(training):
    with pytest.raises(Refused, match="images of classes other than the target"):
        NoisyAlignment(target=0)(training.select((training.labels == 0).nonzero().flatten()))


@pytest.mark.slow
def test_what_blto_learns_is_seen_as_the_target(clean, training, tmp_path):
    before = copy.deepcopy(clean.state_dict())
    red = torch.tensor([1.0, 0.3, 0.3]).view(3, 1, 1) * training.images
    images = torch.where((training.labels == 3).view(-1, 1, 1, 1), red.to(torch.uint8), training.images)
    training = dataclasses.replace(training, images=images)  # noise alone has no class to be drawn to
    attack = BLTO(str(tmp_path / "g.safetensors"), target=3, bound=60, epochs=6, batch_size=40, peak=0.005)
    with pytest.raises(Refused, match=r"g.safetensors cannot be read"):
        attack(training)
    curve = attack.learn(clean, training, Run(CPU, Precision(), 0))
    assert sum(row["drawn"] for row in curve[-5:]) > sum(row["drawn"] for row in curve[:5]) + 1
    assert all(torch.equal(clean.state_dict()[k], v) for k, v in before.items()), "trained the one given"
    stamped = attack.trigger(training.images)
    assert 1 <= int((stamped.int() - training.images.int()).abs().max()) <= 60
    again = dataclasses.replace(attack, path=str(tmp_path / "h.safetensors"))
    assert again.learn(clean, training, Run(CPU, Precision(), 0)) == curve
    assert torch.equal(again.trigger(training.images), stamped)
    with pytest.raises(UsageError, match="blto needs path=FILE"):
        BLTO().learn(clean, training, Run(CPU, Precision(), 0))
    with pytest.raises(Refused, match="no image of class 5"):
        dataclasses.replace(attack, target=5).learn(clean, training, Run(CPU, Precision(), 0))
    with pytest.raises(Refused, match="needs labels"):
        attack.learn(clean, training.unlabeled(), Run(CPU, Precision(), 0))


def test_the_generator_s_gradient_is_not_the_surrogate_s(clean, training):
    """The surrogate must learn as a victim does: what draws stamped images to the target moves the generator alone."""
    plain = training.images[:8].float() / 255
    stamped = (plain + 0.01).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    batch = Batch(training.images[:8], None, 0, 0.0, generator, torch.arange(8))
    drawn = BLTO()._drawn_to(clean, stamped, plain, plain, batch, Run(CPU, Precision(), 0))
    drawn.backward()
    assert float(stamped.grad.abs().sum()) > 0 and all(p.grad is None for p in clean.parameters())
    assert clean.training and all(p.requires_grad for p in clean.parameters())


# --- on a clean encoder -------------------------------------------------------------------------------------


def towards(encoder, images, references, centre):
    """Mean cosine of features of `images` with the mean of those of `references`, both less `centre`."""
    wanted = (features(encoder, references, CPU) - centre).mean(0)
    return float(F.cosine_similarity(features(encoder, images, CPU) - centre, wanted[None]).mean())


def attacked(attack, clean, training, learnt=(), **settings):
    settings = {"peak": 0.05, **({"peak": 0.01, **learnt[attack]} if attack in learnt else {}), **settings}
    made = attack(target=3, epochs=12, batch_size=40, **settings)
    of_target = training.images[training.labels == 3]
    return made, *made(clean, training.unlabeled(), of_target, Run(CPU, Precision(), 0))


@pytest.mark.parametrize("attack", SLOW)
def test_stamped_images_come_to_look_like_the_references(attack, clean, training, learnt):
    before = copy.deepcopy(clean.state_dict())
    made, poisoned, curve = attacked(attack, clean, training, learnt)
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


@pytest.mark.parametrize("attack", SLOW)
def test_the_same_bits_again(attack, clean, training, learnt):
    _, first, curve = attacked(attack, clean, training, learnt)
    _, second, same = attacked(attack, clean, training, learnt)
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
@pytest.mark.parametrize("settings", [{"references": 0}, {"epochs": 0}, {"batch_size": 1}])
def test_settings_out_of_range(attack, settings):
    with pytest.raises(UsageError):
        attack(**settings)


@pytest.mark.parametrize(
    "made",
    [
        *(partial(attack, size=-1) for attack in [*SIZED, NoisyAlignment]),
        *(partial(attack, bound=bound) for attack in LEARNT for bound in (0, 256)),
        partial(BLTO, epochs=0), partial(BLTO, batch_size=2), partial(Inactive, references=0),
    ],
)  # fmt: skip
def test_settings_of_its_own_out_of_range(made):
    with pytest.raises(UsageError):
        made()


# --- inactive -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inactive_keeps_its_bound_and_needs_a_file(clean, training, tmp_path):
    made, _, curve = attacked(Inactive, clean, training, {Inactive: {"path": str(tmp_path / "f")}}, bound=30)
    stamped = made.trigger(training.images)
    assert 1 <= int((stamped.int() - training.images.int()).abs().max()) <= 30
    noise = signal_to_noise(stamped.double() / 255, training.images.double() / 255)
    assert float(noise) == pytest.approx(curve[-1]["decibels"], abs=2)
    with pytest.raises(UsageError, match="inactive needs path=FILE"):
        attacked(Inactive, clean, training, path="")


@pytest.mark.slow
def test_more_weight_on_appearance_leaves_a_fainter_filter(clean, training, tmp_path):
    where = {Inactive: {"path": str(tmp_path / "f")}}
    faint = attacked(Inactive, clean, training, where, appearance=20.0)[2][-1]["decibels"]
    assert faint > attacked(Inactive, clean, training, where, appearance=0.0)[2][-1]["decibels"] + 3


def test_structural_similarity_is_wang_s():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(2, 3, 24, 20, generator=generator, dtype=torch.float64)
    second = (first + 0.2 * torch.randn(first.shape, generator=generator).double()).clamp(0, 1)
    line = [math.exp(-((k - 5) ** 2) / (2 * 1.5**2)) for k in range(11)]
    window = np.outer(line, line) / sum(line) ** 2
    found = []
    for x, y in zip(np.pad(first, ((0, 0), (0, 0), (5, 5), (5, 5))).reshape(6, 34, 30),
                    np.pad(second, ((0, 0), (0, 0), (5, 5), (5, 5))).reshape(6, 34, 30), strict=True):  # fmt: skip
        for row in range(24):
            for column in range(20):
                a, b = (z[row : row + 11, column : column + 11] for z in (x, y))
                p, q = (window * a).sum(), (window * b).sum()
                together = (window * a * b).sum() - p * q
                spread = (window * a * a).sum() - p * p + (window * b * b).sum() - q * q
                found.append(
                    (2 * p * q + 1e-4) * (2 * together + 9e-4) / ((p * p + q * q + 1e-4) * (spread + 9e-4))
                )
    assert float(structural_similarity(first, second)) == pytest.approx(np.mean(found), abs=1e-6)
    assert float(structural_similarity(first, first)) == pytest.approx(1)
    assert float(signal_to_noise(first, first + 0.1)) == pytest.approx(20)


def test_colours_are_python_s():
    pixels = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    found = colours(pixels.view(40, 3, 1, 1)).view(40, 4).tolist()
    for pixel, (hue, saturation, value, lightness) in zip(pixels.tolist(), found, strict=True):
        assert (hue / (2 * math.pi), saturation, value) == pytest.approx(
            colorsys.rgb_to_hsv(*pixel), abs=1e-5
        )
        assert lightness == pytest.approx(colorsys.rgb_to_hls(*pixel)[1], abs=1e-6)
    grey = torch.full((1, 3, 4, 4), 0.5)
    assert float(colour_distance(grey, grey)) == 0 and colours(grey)[0, :, 0, 0].tolist() == [0, 0, 0.5, 0.5]
    assert float(colour_distance(grey, grey + 0.1)) == pytest.approx(2 * 0.01)


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
