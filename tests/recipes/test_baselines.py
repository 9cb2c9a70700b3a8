"""Baselines: what each one's equations ask, written out; networks that they do not know; runs that were stopped."""

import copy
import math
import os
import signal

import pytest
import torch
from torch import nn

from bdclean import registry
from bdclean.data.imageset import ImageSet
from bdclean.errors import Interrupted, Refused
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.preact import PreActNetwork
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.families.token_transformer import Form, TokenTransformer
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.stages import describe
from bdclean.recipes import mcr, nad
from bdclean.recipes.clp import channel_bounds, normed_layers
from bdclean.training.pruning import pruned_channels
from bdclean.training.resume import Saved
from bdclean.training.run import Precision, Run
from bdclean.training.students import set_batch_statistics

CLASSES = 4
QUICK = {
    "anp": {"steps": "8", "batch_size": "16", "pruned": "0.3"},
    "clp": {},
    "fp": {"epochs": "2", "batch_size": "16", "pruned": "0.3"},
    "mcr": {"epochs": "2", "batch_size": "16", "end_epochs": "1"},
    "moth": {"epochs": "0.5", "batch_size": "16", "fit_steps": "2"},
    "nad": {"epochs": "2", "batch_size": "16", "teacher_epochs": "1"},
    "otbr": {"steps": "3", "batch_size": "16"},
}
LABELED = [name for name in QUICK if name not in ("clp", "otbr")]


def run(seed=0, tell=lambda *_, **__: None, saved=None):
    return Run(torch.device("cpu"), Precision(), seed, tell, saved)


def network():
    return ResidualNetwork((1, 1, 1), (12, 12, 16), CLASSES, 4)


def built(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(make(), parse_preprocess("half")).eval()


@pytest.fixture
def images():
    pixels = torch.randint(
        256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return ImageSet(pixels, torch.arange(64) % CLASSES, tuple("abcd"))


@pytest.fixture
def suspect(images):
    model = built(network)
    set_batch_statistics(model, lambda: iter([images.images]))
    return model


ARCH = describe("tiny", network, (3, 32, 32))


def transformer():
    """A classifier of tokens, without batch norm."""
    form = Form(width=16, depth=4, heads=2, patch=8, inner=32, positions=17)
    return TokenTransformer(form, CLASSES)


def cleansed(name, model, images, arch=ARCH, how=None, **settings):
    recipe = registry.configure(
        registry.load(registry.RECIPES, name), QUICK[name] | {k: str(v) for k, v in settings.items()}
    )
    return recipe(model, arch, images.unlabeled(), images, how or run())


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- all ---


STOPPED = {
    "fp": "fp", "anp": "anp", "moth": "moth", "nad": "nad", "in nad's teacher": "nad teacher", "mcr": "mcr",
    "in mcr's end": "mcr end",
}  # fmt: skip


@pytest.mark.parametrize("case", STOPPED)
def test_a_run_that_was_stopped_ends_in_the_same_weights(case, suspect, images, tmp_path):
    where = STOPPED[case]
    name = where.split()[0]
    whole = cleansed(name, suspect, images)

    def stop(stage, done, total, **measures):
        if (stage, done) == (where, 2):
            os.kill(os.getpid(), signal.SIGINT)

    state, arguments = tmp_path / "s.safetensors", {"recipe": name}
    with pytest.raises(Interrupted, match=f"step 2 of .* of {where}"):
        cleansed(name, suspect, images, how=run(tell=stop, saved=Saved(state, arguments)))
    saved, told = Saved(state, arguments), []
    saved.open()
    tell = lambda stage, done, total, **measures: told.append((stage, done))  # noqa: E731
    resumed = cleansed(name, suspect, images, how=run(tell=tell, saved=saved))
    assert same(tensors(resumed.model), tensors(whole.model)) and resumed.curve == whole.curve
    assert resumed.stages == whole.stages and told[0] == (where, 3)


@pytest.mark.parametrize("name", ["anp", "clp"])
def test_pruning_by_norm_without_a_norm_is_refused_in_one_sentence(name, images):
    with pytest.raises(Refused, match=r"batch norm.*has none[^.]*\.$"):
        cleansed(name, built(transformer), images, describe("tokens", transformer, (3, 32, 32)))


@pytest.mark.parametrize("name", ["fp", "mcr", "moth", "nad"])
@pytest.mark.parametrize("kind", ["tokens", "pre-activation"])
def test_other_networks_are_trained(name, kind, images):
    make = {"tokens": transformer, "pre-activation": lambda: PreActNetwork((1, 1), (8, 8), 8, CLASSES)}[kind]
    model = built(make)
    found = cleansed(name, model, images, describe(kind, make, (3, 32, 32)))
    assert math.isfinite(found.curve[-1]["loss"]) and not same(tensors(model), tensors(found.model))


# --- clp ---


def test_a_bound_is_the_largest_singular_value_times_what_the_norm_multiplies_by():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2), norm.running_var.uniform_(0.5, 2)
        expected = [
            float(torch.linalg.svdvals(conv.weight[k].reshape(5, 9))[0] * abs(norm.weight[k]))
            / math.sqrt(float(norm.running_var[k]) + norm.eps)
            for k in range(6)
        ]
    assert channel_bounds(conv, norm).tolist() == pytest.approx(expected, rel=1e-4)
    linear, flat = nn.Linear(7, 6), nn.BatchNorm1d(6, eps=0.0)
    assert torch.allclose(channel_bounds(linear, flat), linear.weight.norm(dim=1))


@pytest.mark.parametrize("stride", [1, 2])
def test_no_input_is_amplified_beyond_its_bound_at_one_place(stride):
    """At one place the change of a channel's output is at most the bound times the change, but for the rank's root."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3, stride=stride, bias=False), nn.BatchNorm2d(8).eval()
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
    bounds = channel_bounds(conv, norm)
    change = torch.randn(200, 3, 3, 3)
    with torch.no_grad():
        there = norm(conv(change))[:, :, 0, 0] - norm(conv(torch.zeros_like(change)))[:, :, 0, 0]
    # a place sees the inner product with the kernel, at most its Frobenius norm: sqrt(rank) times the largest value
    assert bool((there.abs() <= math.sqrt(3) * bounds * change.flatten(1).norm(dim=1)[:, None] + 1e-5).all())


@pytest.mark.parametrize("make", [network, lambda: PreActNetwork((1, 1), (8, 8), 8, CLASSES)])
def test_a_norm_belongs_to_the_layer_that_ran_before_it(make, images):
    model = built(make)
    pairs = normed_layers(model, images.images[:1])
    names = {module: name for name, module in model.network.named_modules()}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm for _, norm in pairs} == set(norms) and all(
        layer.out_channels == norm.num_features for layer, norm in pairs
    )
    found = {names[norm]: names[layer] for layer, norm in pairs}
    if make is network:
        assert found["bn1"] == "conv1" and found["layer2.0.bn2"] == "layer2.0.conv2"
        assert found["layer2.0.downsample.1"] == "layer2.0.downsample.0"


def test_a_channel_that_amplifies_is_switched_off_and_no_other(suspect, images):
    with torch.no_grad():
        suspect.network.layer3[0].conv1.weight[5] *= 50
    found = cleansed("clp", suspect, images)
    norm = found.model.network.layer3[0].bn1
    assert norm.weight[5] == 0 and norm.bias[5] == 0
    assert pruned_channels(suspect, found.model) == 1 and found.stages[0].startswith("1 of ")
    none = cleansed("clp", suspect, images, deviations=100)
    assert same(tensors(none.model), tensors(suspect)) and none.stages[0].startswith("0 of ")
    most = cleansed("clp", suspect, images, deviations=0)
    assert pruned_channels(suspect, most.model) > 10


def test_clp_looks_at_no_image(suspect, images):
    other = ImageSet(255 - images.images)
    recipe = registry.load(registry.RECIPES, "clp")(0.5)
    found = [recipe(suspect, ARCH, given, None, run()) for given in (images.unlabeled(), other)]
    assert same(*(tensors(each.model) for each in found)) and pruned_channels(suspect, found[0].model)


# --- fp, anp ---


def test_fine_pruning_leaves_the_quietest_channels_of_the_last_layer_silent(suspect, images):
    found = cleansed("fp", suspect, images)
    last = found.model.network.layer3[0].bn2
    assert int((last.weight == 0).sum()) == 5 and found.stages[0].startswith("5 channels")  # 0.3 of 16
    assert not any("_orig" in name or "_mask" in name for name in found.model.state_dict())


@pytest.mark.parametrize("name", ["fp", "anp"])
def test_without_a_share_accuracy_decides_how_much_goes(name, suspect, images):
    with torch.no_grad():
        right = ImageSet(images.images, suspect(images.images).argmax(1), images.classes)
    counts = [
        pruned_channels(suspect, cleansed(name, suspect, right, pruned=None, tolerance=tolerance).model)
        for tolerance in (0.0, 1.0)
    ]
    assert counts[0] < counts[1]


def test_anp_trains_no_weight(suspect, images):
    before, after = tensors(suspect), tensors(cleansed("anp", suspect, images).model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    norms = {f"{n}.weight" for n, m in suspect.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert changed and set(changed) <= norms
    assert all(bool(((after[n] == before[n]) | (after[n] == 0)).all()) for n in changed)


# --- moth ---


def test_moth_marks_what_it_trained_on_as_seen(suspect, images):
    assert cleansed("moth", suspect, images).families == ("patch",)


# --- nad ---


def test_the_loss_of_attention_is_that_of_the_equations(suspect, images, monkeypatch):
    """With a teacher that is the suspect itself and nothing learnt, cross-entropy is all there is."""
    still = {"rate": 1e-12, "later_rate": 1e-12, "teacher_epochs": 1, "weight_decay": 0, "batch_size": 64}
    found = cleansed("nad", suspect, images, epochs=1, **still)
    assert (
        found.curve[0]["attention"] > 0
    )  # in training mode the student's norms see the batch, the teacher's do not
    monkeypatch.setattr(nad, "attention", lambda ours, theirs: ours.new_tensor(0.25))
    told = cleansed("nad", suspect, images, epochs=1, weights="1/2/5", **still)
    assert told.curve[0]["attention"] == pytest.approx(0.25 * (1 + 2 + 5))
    free = cleansed("nad", suspect, images, epochs=1, weights=0, **still)
    assert told.curve[0]["loss"] == pytest.approx(free.curve[0]["loss"] + 2.0)


def test_rates_of_nad_fall_after_the_first_epochs(suspect, images):
    recipe = registry.load(registry.RECIPES, "nad")()
    assert [recipe._rate(640, step) for step in (0, 19, 20, 199)] == [0.1, 0.1, 0.01, 0.01]


def test_the_student_comes_to_look_where_the_teacher_looks(suspect, images, monkeypatch):
    """A teacher whose first layer is another's looks elsewhere."""

    def other_teacher(teacher, *_, **__):
        with torch.no_grad():
            teacher.network.conv1.weight.copy_(
                torch.randn(teacher.network.conv1.weight.shape, generator=torch.Generator().manual_seed(5))
            )
        return [{"step": 1.0}]

    monkeypatch.setattr(nad, "train_classifier", other_teacher)
    slow = {"epochs": 6, "later_rate": 0.01, "high_epochs": 0}
    apart = []
    for weight in (1e-6, 1000.0):
        curve = cleansed("nad", suspect, images, weights=weight, **slow).curve
        apart.append(sum(row["attention"] for row in curve[-4:]) / 4 / weight)
    assert apart[1] < 0.7 * apart[0]


# --- mcr ---


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_a_curve_goes_through_its_ends_and_bends_to_its_middle(t):
    start, middle, end = ({"w": torch.tensor([x, 2 * x])} for x in (1.0, 4.0, -3.0))
    expected = (1 - t) ** 2 * 1 + 2 * t * (1 - t) * 4 + t**2 * -3
    assert mcr.bezier(start, middle, end, t)["w"].tolist() == pytest.approx([expected, 2 * expected])


def test_the_ends_of_mcr_are_the_suspect_and_its_fine_tuned_copy(suspect, images):
    weights = {name: w.detach() for name, w in suspect.named_parameters()}
    start = dict(cleansed("mcr", suspect, images, t=0).model.named_parameters())
    assert all(torch.equal(start[name], weight) for name, weight in weights.items())
    end, inside = (dict(cleansed("mcr", suspect, images, t=t).model.named_parameters()) for t in (1, 0.3))
    name = "network.layer2.0.conv1.weight"
    assert not torch.equal(end[name], weights[name]) and not torch.equal(inside[name], weights[name])
    assert (inside[name] - weights[name]).norm() < (end[name] - weights[name]).norm()


def test_statistics_of_mcr_are_those_of_the_given_images_at_its_place(suspect, images):
    other = copy.deepcopy(suspect)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 3.0  # whatever they were
    found = cleansed("mcr", other, images, t=0).model.network
    with torch.no_grad():
        seen = found.conv1(other.normalise(images.images)).mean((0, 2, 3))
    assert torch.allclose(found.bn1.running_mean, seen, atol=0.1)


def test_the_middle_of_the_curve_is_learnt(suspect, images):
    curve = cleansed("mcr", suspect, images, epochs=5, end_epochs=1).curve
    assert curve[-1]["cross_entropy"] < curve[0]["cross_entropy"]
    size = sum(float(w.detach().square().sum()) for w in suspect.parameters())
    assert curve[0]["loss"] - curve[0]["cross_entropy"] == pytest.approx(0.5e-4 * size, rel=0.1)
