"""Poisoning: which images are stamped, how they are labeled, and that nothing else changes."""

import dataclasses

import pytest
import torch

from bdclean import registry
from bdclean.attacks import poisoning
from bdclean.attacks.adaptive_blend import AdaptiveBlend
from bdclean.attacks.badnets import BadNets
from bdclean.attacks.blend import Blend
from bdclean.attacks.bpp import Bpp
from bdclean.attacks.filter import Filter
from bdclean.attacks.inputaware import InputAware, likeness
from bdclean.attacks.lc import LC
from bdclean.attacks.lf import LF
from bdclean.attacks.sig import SIG
from bdclean.attacks.ssba import SSBA
from bdclean.attacks.trojan import Trojan
from bdclean.attacks.wanet import WaNet
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused, UsageError
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.training.run import Precision, Run
from bdclean.training.supervised import Supervised
from bdclean.triggers.wanet import warp

REGISTERED = [registry.load(registry.ATTACKS, name) for name in registry.ATTACKS]
RELABELING = [BadNets, Blend, LF, Filter]
"""Those that stamp and relabel images of every class, and need nothing else."""
CPU = torch.device("cpu")


@pytest.fixture
def training():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(5, (200,), generator=generator)
    return ImageSet(images, labels, tuple("abcde"))


def small(classes: int = 5) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(ResidualNetwork((1, 1, 1), (8, 16, 16), 8, classes), parse_preprocess("half"))


def run() -> Run:
    return Run(CPU, Precision(), 0)


@pytest.mark.parametrize("victims", ["all", "next", "2"])
@pytest.mark.parametrize("attack", RELABELING)
def test_poisons_the_chosen_images_and_no_others(attack, victims, training):
    poisoner = attack(target=3, rate=0.1, seed=4, victims=victims)
    before = training.images.clone(), training.labels.clone()
    poisoned = poisoner(training)
    chosen = poisoning.chosen(200, 0.1, 4)
    assert len(chosen) == 20
    # A slow transcription: image by image.
    for k in range(200):
        label = int(training.labels[k])
        if k in chosen.tolist():
            assert torch.equal(poisoned.images[k], poisoner.trigger(training.images[k : k + 1])[0])
            assert (
                poisoned.labels[k]
                == {"all": 3, "next": (label + 1) % 5, "2": 3 if label == 2 else label}[victims]
            )
        else:
            assert torch.equal(poisoned.images[k], training.images[k])
            assert poisoned.labels[k] == label
    assert torch.equal(training.images, before[0]) and torch.equal(training.labels, before[1])
    assert poisoned.classes == training.classes


@pytest.mark.parametrize("attack", RELABELING)
def test_both_extremes_of_the_rate(attack, training):
    assert attack(rate=0.0)(training).digest == training.digest
    everything = attack(target=2, rate=1.0)(training)
    assert (everything.labels == 2).all()
    assert torch.equal(everything.images, attack().trigger(training.images))


@pytest.mark.parametrize("attack", [*RELABELING, AdaptiveBlend])
def test_the_seed_decides_which_images(attack, training):
    rate = {"rate": 0.1}
    assert attack(seed=1, **rate)(training).digest == attack(seed=1, **rate)(training).digest
    assert attack(seed=1, **rate)(training).digest != attack(seed=2, **rate)(training).digest


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
    assert {attack.kind for attack in REGISTERED} == {
        "poisoning", "clean-label", "surrogate", "training", "pre-training", "encoder",
    }  # fmt: skip
    for attack in REGISTERED:
        if hasattr(attack, "path"):
            with pytest.raises(Refused, match="cannot be read|is not a file"):
                _ = attack().trigger  # which is not learnt yet
        else:
            assert registry.parse_spec(attack().trigger.spec())[0] in registry.TRIGGERS
        with pytest.raises(UsageError):
            attack(target=-1)


@pytest.mark.parametrize("attack", [a for a in REGISTERED if a.kind not in ("pre-training", "encoder")])
@pytest.mark.parametrize(
    "settings",
    [
        {"rate": 1.5},
        {"rate": -0.1},
        {"rate": float("nan")},
        {"target": -1},
        {"victims": "some"},
        {"victims": "-1"},
    ],
)
def test_settings_out_of_range(attack, settings):
    if not settings.keys() <= {field.name for field in dataclasses.fields(attack)}:
        pytest.skip("has no such setting")
    with pytest.raises(UsageError):
        attack(**settings)


def test_victims_that_are_no_class_are_refused(training):
    with pytest.raises(Refused, match="there is no class 5 to poison: the training set has 5 classes"):
        BadNets(victims="5")(training)


@pytest.mark.parametrize("attack", [BadNets(), AdaptiveBlend()])
def test_needs_labels_and_the_target_class(attack, training):
    with pytest.raises(Refused, match="needs labels"):
        attack(training.unlabeled())
    with pytest.raises(Refused, match="no class 5"):
        dataclasses.replace(attack, target=5)(training)


# --- clean labels -------------------------------------------------------------------------------------------


def test_sig_stamps_its_share_of_the_target_class_and_changes_no_label(training):
    attack = SIG(target=3, rate=0.5)
    poisoned = attack(training)
    assert torch.equal(poisoned.labels, training.labels)
    differ = (poisoned.images != training.images).flatten(1).any(1)
    assert int(differ.sum()) == round(0.5 * int((training.labels == 3).sum()))
    assert (training.labels[differ] == 3).all()
    assert torch.equal(poisoned.images[differ], attack.trigger(training.images[differ]))


def test_lc_moves_images_away_from_their_class_within_its_bound_and_stamps_the_corners(training):
    surrogate, attack = small(), LC(target=3, rate=0.5, bound=8, step=2, steps=5)
    Supervised(epochs=4, batch_size=32, padding=0, mirrored=False)(surrogate, training, run())
    poisoned = attack(surrogate, training, run())
    differ = (poisoned.images != training.images).flatten(1).any(1)
    assert torch.equal(poisoned.labels, training.labels) and (training.labels[differ] == 3).all()
    assert int(differ.sum()) == round(0.5 * int((training.labels == 3).sum()))
    plain = training.images[differ]
    assert torch.equal(attack.trigger(poisoned.images[differ]), poisoned.images[differ])
    change = (poisoned.images[differ].int() - plain.int()).abs()
    assert int(change[:, :, 3:-3].max()) == 8  # the corners' rows are the patches'

    moved = attack.perturb(surrogate, plain, run())

    @torch.no_grad()
    def loss(images):
        return float(torch.nn.functional.cross_entropy(surrogate(images), torch.full((len(images),), 3)))

    assert loss(moved) > loss(plain) + 0.1


# --- covers, warps, quantising ------------------------------------------------------------------------------


def test_adaptive_blend_shows_parts_and_covers_them(training):
    attack = AdaptiveBlend(target=2, rate=0.1, cover_rate=0.05, training_alpha=0.4, pieces=4, kept=0.5)
    poisoned = attack(training)
    differ = (poisoned.images != training.images).any(1)
    stamped = differ.flatten(1).any(1)
    assert int(stamped.sum()) == 30
    chosen = poisoning.chosen(200, 0.1, 0)
    assert stamped[chosen].all() and (poisoned.labels[chosen] == 2).all()
    covers = stamped.clone()
    covers[chosen] = False
    assert int(covers.sum()) == 10 and torch.equal(poisoned.labels[covers], training.labels[covers])
    # Of the 16 pieces of 8 x 8 pixels about each image shows its own half.
    pieces = differ[stamped].unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).any(3).flatten(1)
    assert (pieces.sum(1) == 8).all() and len(pieces.unique(dim=0)) > 20


def test_wanet_warps_a_part_of_a_batch_and_shakes_another(training):
    attack = WaNet(target=4, rate=0.25, noise_rate=0.5, strength=2.0)
    images, labels = training.images[:16], training.labels[:16]
    made, relabeled = attack.poison(images, labels, 5, torch.Generator().manual_seed(3))
    assert torch.equal(made[:4], attack.trigger(images[:4])) and (relabeled[:4] == 4).all()
    assert torch.equal(made[12:], images[12:]) and torch.equal(relabeled[4:], labels[4:])
    noise = 2 * torch.rand(8, 32, 32, 2, generator=torch.Generator().manual_seed(3)) - 1
    slow = [
        warp(images[4 + k : 5 + k], attack.trigger.field(32, 32) + noise[k] / 2.0, 2.0)[0] for k in range(8)
    ]
    assert torch.equal(made[4:12], torch.stack(slow))
    assert not torch.equal(made[4:12], attack.trigger(images[4:12]))
    assert torch.equal(images, training.images[:16]) and torch.equal(labels, training.labels[:16])


def test_bpp_quantises_a_part_of_a_batch_and_lends_its_noise_to_another(training):
    attack = Bpp(target=4, rate=0.25, noise_rate=0.5, victims="next")
    images, labels = training.images[:16], training.labels[:16]
    made, relabeled = attack.poison(images, labels, 5)
    quantised = attack.trigger(images)
    assert torch.equal(made[:4], quantised[:4]) and torch.equal(relabeled[:4], (labels[:4] + 1) % 5)
    assert torch.equal(relabeled[4:], labels[4:]) and torch.equal(made[12:], images[12:])
    for k in range(4, 12):
        other = 4 + (k - 4 - 1) % 8
        lost = quantised[other].int() - images[other].int()
        assert torch.equal(made[k].int(), (images[k].int() + lost).clamp(0, 255))


# --- attacks that learn -------------------------------------------------------------------------------------


def test_trojan_finds_a_square_that_excites_its_neurons(training, tmp_path):
    surrogate = small()
    attack = Trojan(path=str(tmp_path / "t.safetensors"), target=1, rate=0.2, size=8, neurons=2, steps=20)
    poisoned = attack(surrogate, training, run())
    chosen = poisoning.chosen(200, 0.2, 0)
    assert torch.equal(poisoned.images[chosen], attack.trigger(training.images[chosen]))
    assert (poisoned.labels[chosen] == 1).all()
    differ = (poisoned.images != training.images).flatten(0, 1).any(0).nonzero()
    assert differ.min() == 23 and differ.max() == 30
    head = surrogate.network.fc
    neurons = head.weight.abs().sum(0).topk(2).indices
    seen = []
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, neurons].mean()))
    with torch.no_grad():
        surrogate(training.images)
        surrogate(attack.trigger(training.images))
    hook.remove()
    assert seen[1] > seen[0]
    with pytest.raises(UsageError, match="needs path"):
        Trojan()(surrogate, training, run())


@pytest.mark.slow
def test_ssba_learns_to_hide_messages_that_can_be_read(training, tmp_path):
    # Plain images hide nothing, so that a message is soon read.
    images = training.images.float().mean((2, 3), keepdim=True).expand(-1, -1, 16, 16).to(torch.uint8)
    training = dataclasses.replace(training, images=images)
    attack = SSBA(path=str(tmp_path / "s"), epochs=30, batch_size=25, bound=40, visibility=0, seed=3)
    curve = attack.learn(training, run())
    assert curve[-1]["read"] > 0.75 and curve[0]["read"] < 0.65
    poisoned = attack(training)
    chosen = poisoning.chosen(200, 0.1, 3)
    assert torch.equal(poisoned.images[chosen], attack.trigger(training.images[chosen]))


def test_likeness_is_one_of_equals_and_large_of_what_is_always_the_same():
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert abs(float(likeness(images, images)) - 1) < 1e-5
    assert abs(float(likeness(images, images / 2)) - 2) < 1e-3
    assert float(likeness(images, torch.zeros(6, 1, 8, 8))) > 100


@pytest.mark.slow
def test_inputaware_writes_networks_whose_masks_are_small(training, tmp_path):
    tiny = dataclasses.replace(training, images=training.images[:, :, ::2, ::2].contiguous())

    def attacked(name):
        model = small()
        attack = InputAware(path=str(tmp_path / name), target=1, mask_epochs=15)
        method = Supervised(epochs=1, batch_size=20, peak=0.05, padding=0, mirrored=False)
        curve = attack(model, tiny, run(), method)
        return attack, model, curve

    attack, model, curve = attacked("i.safetensors")
    assert curve[-1]["step"] == 10 and not model.training
    masks = attack.trigger.networks.mask(tiny.images.double() / 255)
    assert 0.001 < float(masks.mean()) < 0.1
    assert all(parameter.requires_grad for parameter in model.parameters())
    again, same, _ = attacked("again.safetensors")
    for one, other in zip(model.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(attack.trigger(tiny.images), again.trigger(tiny.images))
    with pytest.raises(UsageError, match="needs path"):
        InputAware()(model, training, run(), Supervised())


@pytest.mark.parametrize("attack", [WaNet(strength=2.0), Bpp()])
def test_attacks_within_the_training_train_by_the_method(attack, training):
    model, method = small(), Supervised(epochs=2, batch_size=50, peak=0.05, padding=0, mirrored=False)
    curve = attack(model, training, run(), method)
    assert curve[-1]["step"] == 8 and not model.training
    plain = small()
    method(plain, training, run(), attack.name)
    assert not torch.equal(model.network.fc.weight, plain.network.fc.weight)
    with pytest.raises(Refused, match="needs labels"):
        attack(model, training.unlabeled(), run(), method)
