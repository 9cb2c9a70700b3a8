"""Poisoning: which images are stamped, how they are labeled, and that nothing else changes."""

import pytest
import torch

from bdclean import registry
from bdclean.attacks import poisoning
from bdclean.attacks.badnets import BadNets
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError

REGISTERED = [registry.load(registry.ATTACKS, name) for name in registry.ATTACKS]
EVERY = [attack for attack in REGISTERED if attack.kind == "poisoning"]


@pytest.fixture
def training():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(5, (200,), generator=generator)
    return ImageSet(images, labels, tuple("abcde"))


@pytest.mark.parametrize("attack", EVERY)
def test_poisons_the_chosen_images_and_no_others(attack, training):
    poisoner = attack(target=3, rate=0.1, seed=4)
    before = training.images.clone(), training.labels.clone()
    poisoned = poisoner(training)
    chosen = poisoning.chosen(200, 0.1, 4)
    assert len(chosen) == 20
    # A slow transcription: image by image.
    for k in range(200):
        if k in chosen.tolist():
            assert torch.equal(poisoned.images[k], poisoner.trigger(training.images[k : k + 1])[0])
            assert poisoned.labels[k] == 3
        else:
            assert torch.equal(poisoned.images[k], training.images[k])
            assert poisoned.labels[k] == training.labels[k]
    assert torch.equal(training.images, before[0]) and torch.equal(training.labels, before[1])
    assert poisoned.classes == training.classes


@pytest.mark.parametrize("attack", EVERY)
def test_both_extremes_of_the_rate(attack, training):
    assert attack(rate=0.0)(training).digest == training.digest
    everything = attack(target=2, rate=1.0)(training)
    assert (everything.labels == 2).all()
    assert torch.equal(everything.images, attack().trigger(training.images))


@pytest.mark.parametrize("attack", EVERY)
def test_the_seed_decides_which_images(attack, training):
    assert attack(seed=1)(training).digest == attack(seed=1)(training).digest
    assert attack(seed=1)(training).digest != attack(seed=2)(training).digest


def test_a_lower_rate_poisons_a_part_of_the_same_images():
    low, high = poisoning.chosen(1000, 0.01, 7), poisoning.chosen(1000, 0.05, 7)
    assert len(low) == 10 and len(high) == 50
    assert set(low.tolist()) < set(high.tolist())


def test_images_of_every_class_are_drawn(training):
    chosen = poisoning.chosen(200, 0.5, 0)
    assert training.labels[chosen].unique().tolist() == [0, 1, 2, 3, 4]


def test_the_default_patch_is_the_checker_of_bcu(training):
    corner = BadNets(rate=1.0)(training).images[0, 0, 29:, 29:]
    assert corner.tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]]


def test_every_attack_is_of_a_known_kind():
    assert {attack.kind for attack in REGISTERED} == {"poisoning", "pre-training", "encoder"}
    for attack in REGISTERED:
        if hasattr(attack, "path"):
            with pytest.raises(Refused, match="cannot be read"):
                _ = attack().trigger  # which is not learnt yet
        else:
            assert registry.parse_spec(attack().trigger.spec())[0] in registry.TRIGGERS
        with pytest.raises(UsageError):
            attack(target=-1)


@pytest.mark.parametrize("attack", EVERY)
@pytest.mark.parametrize("settings", [{"rate": 1.5}, {"rate": -0.1}, {"rate": float("nan")}, {"target": -1}])
def test_settings_out_of_range(attack, settings):
    with pytest.raises(UsageError):
        attack(**settings)


def test_needs_labels_and_the_target_class(training):
    with pytest.raises(Refused, match="needs labels"):
        BadNets()(training.unlabeled())
    with pytest.raises(Refused, match="no class 5"):
        BadNets(target=5)(training)
