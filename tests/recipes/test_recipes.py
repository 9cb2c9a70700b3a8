import ast
import copy
import math
import os
import signal
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from recipes import planted
from torch import nn

import bdclean.recipes
from bdclean import registry
from bdclean.data import corruptions
from bdclean.data.imageset import ImageSet
from bdclean.detectors import inversion
from bdclean.detectors.all_to_all import AllToAll
from bdclean.errors import Interrupted, Refused, UsageError
from bdclean.networks.classifier import Classifier
from bdclean.networks.encoder import headless
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.families.token_transformer import Form, TokenTransformer
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.stages import describe
from bdclean.recipes import auto, inoculate
from bdclean.recipes.bcu import by_depth, reinitialise
from bdclean.recipes.inoculate import Inoculate
from bdclean.recipes.recipe import Informed
from bdclean.training import adversaries
from bdclean.training.encoder_lesson import EncoderLesson, Terms
from bdclean.training.forms import added, mask, recoloured, striped, warped
from bdclean.training.inversion import Detected
from bdclean.training.map_losses import attention, scaled_attention
from bdclean.training.patches import Drawn, FoundPatch
from bdclean.training.resume import Saved
from bdclean.training.run import Precision, Run
from bdclean.training.students import set_batch_statistics
from bdclean.triggers.badnets import BadNets
from bdclean.triggers.sig import SIG

CPU = torch.device("cpu")
QUICK = {
    "anp": {"steps": "3", "batch_size": "8", "pruned": "0.3"},
    "auto": {},
    "bcu": {"epochs": "0.2", "batch_size": "8"},
    "cbd": {"epochs": "0.2", "batch_size": "8", "adversary_steps": "1"},
    "clp": {"deviations": "0.5"},
    "fp": {"epochs": "0.2", "batch_size": "8", "pruned": "0.3"},
    "ft": {"epochs": "0.2", "batch_size": "8"},
    "mcr": {"epochs": "0.2", "batch_size": "8", "end_epochs": "0.2"},
    "moth": {"epochs": "0.1", "batch_size": "8", "fit_steps": "2"},
    "nad": {"epochs": "0.2", "batch_size": "8", "teacher_epochs": "0.1"},
    "otbr": {"steps": "2", "batch_size": "8", "ratio": "0.3"},
    "sft": {"epochs": "0.2", "first_epochs": "0.1", "batch_size": "8"},
    "d3": {"epochs": "0.2", "batch_size": "8"},
    "fst": {"epochs": "0.2", "batch_size": "8"},
    "ft-sam": {"epochs": "0.2", "batch_size": "8"},
    "ibau": {"rounds": "1", "batch_size": "32"},
    "lmr": {"batch_size": "8", "unlearning_steps": "2", "repulsion_steps": "2", "recovery_steps": "3"},
    "sau": {"epochs": "0.2", "batch_size": "8", "adversary_steps": "2"},
    "inoculate": {
        "epochs": "0.2",
        "least_steps": "1",
        "batch_size": "8",
        "inversion_steps": "2",
        "adversary_steps": "1",
    },
}


STEPS = {"clp": None, "otbr": None, "moth": 4 + 2}
"""Of the quick settings' last stage, where it has not three: none, or one for each class and two for pairs."""
UNSEEDED = ("clp",)


QUICK_ENCODER = {
    "bcu": {"epochs": "0.2", "batch_size": "32"},
    "cbd": {"epochs": "0.2", "batch_size": "32", "adversary_steps": "1"},
    "distill": {"epochs": "0.2", "batch_size": "32", "warmup_epochs": "0.2"},
    "inoculate": {
        "epochs": "0.2",
        "least_steps": "1",
        "batch_size": "32",
        "inversion_steps": "2",
        "search_rounds": "1",
    },
    "mimic": {"epochs": "0.2", "batch_size": "32", "mi_epochs": "2"},
    "pretrain": {"epochs": "0.2", "batch_size": "32"},
}
QUICK_TEACHER = {"teacher_epochs": "0.2", "anp_steps": "2", "moth_epochs": "0.1", "moth_steps": "2"}


def network():
    return ResidualNetwork((1, 1, 1), (4, 8, 8), 4, 4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def suspect():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(network(), parse_preprocess("half")).eval()
        set_batch_statistics(model, lambda: iter([torch.randint(256, (96, 3, 32, 32), dtype=torch.uint8)]))
        return model


@pytest.fixture(scope="module")
def arch():
    return describe("tiny", network, (3, 32, 32))


@pytest.fixture(scope="module")
def images():
    pixels = torch.randint(256, (96, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    return ImageSet(pixels, torch.arange(96) % 4, tuple("abcd"))


def made(name):
    return registry.configure(registry.load(registry.RECIPES, name), QUICK[name])


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", [name for name, e in registry.RECIPES.items() if e.path and name != "auto"])
@pytest.mark.parametrize("precision", ["fp32", "bf16+channels_last"])
def test_contract(name, precision, suspect, arch, images):
    recipe = made(name)
    before, pixels, labels = tensors(suspect), images.images.clone(), images.labels.clone()
    told = []
    run = Run(CPU, Precision.parse(precision), 3, lambda stage, done, total, **m: told.append(stage))
    labeled = images if recipe.needs_labels else None
    cleansed = recipe(suspect, arch, images.unlabeled(), labeled, run)
    assert same(before, tensors(suspect)) and all(p.grad is None for p in suspect.parameters())
    assert torch.equal(pixels, images.images) and torch.equal(labels, images.labels)
    after = tensors(cleansed.model)
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
        k: (v.shape, v.dtype) for k, v in before.items()
    }
    assert not same(before, after) and all(bool(v.isfinite().all()) for v in after.values())
    assert not cleansed.model.training and cleansed.model.preprocess == suspect.preprocess
    assert cleansed.settings == asdict(recipe) and cleansed.stages and name in told
    steps = STEPS.get(name, 3)
    assert not cleansed.curve if steps is None else cleansed.curve[-1]["step"] == steps
    assert steps is None or "loss" in cleansed.curve[-1]
    again = made(name)(suspect, arch, images.unlabeled(), labeled, Run(CPU, run.precision, 3))
    assert same(after, tensors(again.model)) and again.curve == cleansed.curve
    other = made(name)(suspect, arch, images.unlabeled(), labeled, Run(CPU, run.precision, 4))
    assert same(after, tensors(other.model)) == (name in UNSEEDED)


@pytest.mark.parametrize("name", QUICK_ENCODER)
def test_contract_of_encoders(name, suspect, arch, images):
    encoder_arch = headless(arch)
    encoder = Classifier(encoder_arch.build(), suspect.preprocess).eval()
    encoder.network.load_state_dict(suspect.network.state_dict(), strict=False)
    recipe = registry.configure(registry.load_recipe(name, "encoder"), QUICK_ENCODER[name])
    before, pixels = tensors(encoder), images.images.clone()

    def cleansed(seed):
        return recipe(encoder, encoder_arch, images.unlabeled(), None, Run(CPU, Precision(), seed))

    one, again, other = cleansed(3), cleansed(3), cleansed(4)
    assert same(before, tensors(encoder)) and torch.equal(pixels, images.images)
    after = tensors(one.model)
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
        k: (v.shape, v.dtype) for k, v in before.items()
    }
    assert all(bool(v.isfinite().all()) for v in after.values()) and not one.model.training
    assert one.settings == asdict(recipe) and one.stages and one.curve
    assert same(after, tensors(again.model)) and again.curve == one.curve
    assert not same(after, tensors(other.model))


@pytest.mark.parametrize(("name", "kind"), [("ft", "encoder"), ("mimic", "classifier")])
def test_a_recipe_for_the_other_kind_names_those_that_fit(name, kind):
    with pytest.raises(UsageError, match=f"{name} does not work on {kind}s: use one of .*inoculate"):
        registry.load_recipe(name, kind)


def encoder_of(suspect, arch):
    """The suspect without its head, and what is known of it."""
    encoder_arch = headless(arch)
    encoder = Classifier(encoder_arch.build(), suspect.preprocess).eval()
    encoder.network.load_state_dict(suspect.network.state_dict(), strict=False)
    return encoder, encoder_arch


def transformer():
    """An encoder of tokens, without batch norm."""
    form = Form(width=16, depth=4, heads=2, patch=8, inner=32, positions=17)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = headless(describe("tokens", lambda: TokenTransformer(form, 4), (3, 32, 32)))
        return Classifier(made.build(), parse_preprocess("half")).eval(), made


def cleansed_encoder(name, settings, encoder, arch, images, labeled=None, run=None):
    recipe = registry.configure(registry.load_recipe(name, "encoder"), QUICK_ENCODER[name] | settings)
    return recipe(encoder, arch, images.unlabeled(), labeled, run or Run(CPU, Precision(), 0))


@pytest.mark.parametrize("loss", ["at", "afd", "fitnet", "cc", "kd", "sp", "pkt", "rkd", "none"])
@pytest.mark.parametrize("student", ["raw", "void"])
def test_every_loss_of_distill_trains(loss, student, suspect, arch, images):
    settings = {"loss": loss, "student": student, "rounds": "2"}
    cleansed = cleansed_encoder("distill", settings, *encoder_of(suspect, arch), images)
    assert len(cleansed.stages) == 2 and math.isfinite(cleansed.curve[-1]["loss"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss": "none", "contrast": "0"}, Terms(contrast=0)),
        ({"clone": "0", "contrast": "0"}, Terms(clone=0, contrast=0, maps=scaled_attention)),
        ({"loss": "at", "weights": "paper"}, Terms(maps=attention)),
    ],
    ids=["clone only", "attention only", "as the code"],
)
def test_what_distill_asks_of_the_student(settings, expected, suspect, arch, images, monkeypatch):
    asked = []

    def lesson(teacher, student, arch, pixels, terms, *rest):
        asked.append(terms)
        return EncoderLesson(teacher, student, arch, pixels, terms, *rest)

    monkeypatch.setattr("bdclean.recipes.distill.EncoderLesson", lesson)
    cleansed_encoder("distill", {"student": "void"} | settings, *encoder_of(suspect, arch), images)
    (found,) = asked
    assert (found.clone, found.contrast, found.maps) == (expected.clone, expected.contrast, expected.maps)
    if found.maps:
        weight = 1000 if settings.get("weights") else 10
        assert found.map_weights == dict.fromkeys(headless(arch).taps, weight)


def test_uniform_weights_of_mimic_are_alike(suspect, arch, images):
    cleansed = cleansed_encoder("mimic", {"mi": "uniform"}, *encoder_of(suspect, arch), images)
    assert cleansed.stages[0].count(" 33 %") == len(headless(arch).taps) == 3


@pytest.mark.parametrize("teacher", ["ft", "fp", "anp", "moth"])
def test_a_teacher_that_is_adapted_needs_labels(teacher, suspect, arch, images):
    encoder, encoder_arch = encoder_of(suspect, arch)
    before = tensors(encoder)
    settings = QUICK_TEACHER | {"teacher": teacher, "student": "raw", "pruned": "0.5"}
    with pytest.raises(Refused, match=f"teacher={teacher} needs labels"):
        cleansed_encoder("distill", settings, encoder, encoder_arch, images)
    cleansed = cleansed_encoder("distill", settings, encoder, encoder_arch, images, images)
    assert f"teacher by {teacher} on 96 labeled images" in cleansed.stages[0]
    assert ("channels pruned" in cleansed.stages[0]) == (teacher in ("fp", "anp"))
    plain = cleansed_encoder("distill", settings | {"teacher": "raw"}, encoder, encoder_arch, images)
    assert not same(tensors(plain.model), tensors(cleansed.model)) and same(before, tensors(encoder))


def test_a_transformer_has_no_neurons_to_prune_by_norm(images):
    encoder, tokens = transformer()
    settings = QUICK_TEACHER | {"student": "raw"}
    with pytest.raises(Refused, match="teacher=anp needs batch norm, and this encoder has none"):
        cleansed_encoder("distill", settings | {"teacher": "anp"}, encoder, tokens, images, images)
    pruned = cleansed_encoder(
        "distill", settings | {"teacher": "fp", "pruned": "0.25"}, encoder, tokens, images, images
    )
    assert pruned.stages[0].endswith("4 channels pruned")


def test_bcu_redraws_an_encoder_of_tokens_by_depth(images):
    encoder, tokens = transformer()
    still = {"ratios": "0/0.5", "rate": "1e-12", "weight_decay": "0"}
    cleansed = cleansed_encoder("bcu", still, encoder, tokens, images)
    before, after = tensors(encoder), tensors(cleansed.model)
    depth = [
        sum(int((~torch.isclose(before[f"network.{m}.weight"], after[f"network.{m}.weight"])).sum())
            for m in stage.modules if f"network.{m}.weight" in before)
        for stage in tokens.stages
    ]  # fmt: skip
    assert depth[0] == 0 and depth == sorted(depth) and depth[-1] > 0


@pytest.mark.parametrize("method", ["simclr", "moco", "byol"])
@pytest.mark.parametrize("start", ["suspect", "void"])
def test_pretraining_starts_where_it_is_told(method, start, suspect, arch, images):
    encoder, encoder_arch = encoder_of(suspect, arch)
    still = {"method": method, "start": start, "peak": "1e-12", "weight_decay": "0"}
    cleansed = cleansed_encoder("pretrain", still, encoder, encoder_arch, images)
    weight = "network.layer1.0.conv1.weight"
    assert torch.allclose(tensors(cleansed.model)[weight], tensors(encoder)[weight], atol=1e-3) == (
        start == "suspect"
    )
    assert method in cleansed.stages[0] and math.isfinite(cleansed.curve[-1]["loss"])


STOPPED = {
    "bcu": ("bcu", {}, "bcu"),
    "simclr": ("pretrain", {"method": "simclr"}, "pretrain"),
    "moco": ("pretrain", {"method": "moco", "start": "void"}, "pretrain"),
    "byol": ("pretrain", {"method": "byol"}, "pretrain"),
    "warm up": ("distill", {"warmup_epochs": "1"}, "warm up 0"),
    "after the warm-up": ("distill", {}, "distill-0"),
    "in the second round": ("distill", {"rounds": "2"}, "distill-1"),
    **{f"in {teacher}": ("distill", {"teacher": teacher, "student": "raw"}, f"teacher by {teacher}")
       for teacher in ("ft", "fp", "anp", "moth")},
    **{f"after {teacher}": ("distill", {"teacher": teacher, "student": "raw"}, "distill-0")
       for teacher in ("ft", "fp", "anp", "moth")},
}  # fmt: skip


@pytest.mark.parametrize("case", STOPPED)
def test_an_encoder_recipe_that_was_stopped_ends_in_the_same_weights(case, suspect, arch, images, tmp_path):
    name, settings, where = STOPPED[case]
    settings = (
        QUICK_TEACHER | {"teacher_epochs": "3", "pruned": "0.2"} | settings if name == "distill" else settings
    )
    settings = {"epochs": "1"} | settings
    given = (*encoder_of(suspect, arch), images, images)
    whole = cleansed_encoder(name, settings, *given)

    def stop(stage, done, total, **measures):
        if (stage, done) == (where, 1):
            os.kill(os.getpid(), signal.SIGINT)

    state, arguments = tmp_path / "s.safetensors", {"recipe": name}
    with pytest.raises(Interrupted, match=f"of {where}"):
        run = Run(CPU, Precision(), 0, stop, Saved(state, arguments))
        cleansed_encoder(name, settings, *given, run=run)
    saved, told = Saved(state, arguments), []
    saved.open()
    run = Run(CPU, Precision(), 0, lambda stage, done, total, **m: told.append((stage, done)), saved)
    resumed = cleansed_encoder(name, settings, *given, run=run)
    assert same(tensors(resumed.model), tensors(whole.model))
    assert resumed.stages == whole.stages and resumed.curve == whole.curve
    assert told[0][0] == where and (where, 1) not in told  # nothing is done twice


@pytest.mark.parametrize("name", ["d3", "fst", "ft-sam", "ibau", "lmr", "sau"])
def test_a_recipe_that_was_stopped_ends_in_the_same_weights(name, suspect, arch, images, tmp_path):
    whole = made(name)(suspect, arch, images, images, Run(CPU, Precision(), 0))

    def stop(stage, done, total, **measures):
        if (stage, done) == (name, 1):  # the last stage: those before it are kept
            os.kill(os.getpid(), signal.SIGINT)

    state, told = tmp_path / "s.safetensors", []
    with pytest.raises(Interrupted):
        made(name)(suspect, arch, images, images, Run(CPU, Precision(), 0, stop, Saved(state, {})))
    saved = Saved(state, {})
    saved.open()
    run = Run(CPU, Precision(), 0, lambda stage, done, total, **m: told.append(done), saved)
    resumed = made(name)(suspect, arch, images, images, run)
    assert same(tensors(resumed.model), tensors(whole.model))
    assert resumed.stages == whole.stages and resumed.curve == whole.curve and told[0] == 2  # not done again


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "classifier") for name, entry in registry.RECIPES.items() if entry.path]
    + [(name, "encoder") for name, entry in registry.RECIPES.items() if entry.encoder],
)
def test_a_recipe_says_what_it_is(name, kind):
    recipe = registry.load_recipe(name, kind)
    assert is_dataclass(recipe) and recipe.__dataclass_params__.frozen
    assert recipe.name == name and recipe.source
    assert recipe.families == registry.RECIPES[name].families or kind == "encoder"
    for head in ("What it does:", "When to use it:", "What it needs:", "Known limits:"):
        assert head in recipe.__doc__
    known = QUICK.keys() if kind == "classifier" else QUICK_ENCODER.keys() | {"auto"}
    assert name in known  # a new recipe comes into the contracts above


@pytest.mark.parametrize(
    "path", sorted(Path(bdclean.recipes.__file__).parent.glob("*.py")), ids=lambda p: p.stem
)
def test_no_recipe_imports_what_it_is_measured_with(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    banned = ("triggers", "attacks", "measure", "metrics", "scan", "cleanse")
    assert not [f for f in found if f.startswith(tuple(f"bdclean.{name}" for name in banned))]


@pytest.mark.parametrize(
    "name", [name for name, e in registry.RECIPES.items() if e.path and made(name).needs_labels]
)
def test_labels_that_are_needed_and_missing_are_asked_for(name, suspect, arch, images):
    with pytest.raises(Refused, match=f"^{name} needs labels: .*one folder per class.*--pseudo-labels"):
        made(name)(suspect, arch, images.unlabeled(), None, Run(CPU, Precision(), 0))


@pytest.mark.parametrize("name", ["ft", "sft"])
def test_from_scratch_nothing_of_the_suspect_is_left(name, suspect, arch, images):
    """The same images in the same order and as many updates, from weights that the run's seed draws."""
    recipe = registry.load(registry.RECIPES, name)
    settings = QUICK[name] | {"start": "void"}

    def trained(model, seed=0, **more):
        made = registry.configure(recipe, settings | more)
        return made(model, arch, images.unlabeled(), images, Run(CPU, Precision(), seed))

    fresh = trained(suspect)
    assert fresh.settings["start"] == "void" and fresh.stages[0].startswith(
        "trained from scratch for 3 updates"
    )
    assert not same(tensors(fresh.model), tensors(trained(suspect, start="suspect").model))
    other = copy.deepcopy(suspect)  # other weights, and the same answers: it allows the same augmentation
    with torch.no_grad():
        for tensor in other.network.fc.parameters():
            tensor.mul_(2)
    assert same(tensors(fresh.model), tensors(trained(other).model))
    assert not same(tensors(fresh.model), tensors(trained(suspect, seed=1).model))


def test_a_suspect_that_does_not_know_the_labels_does_not_say_that_images_may_be_mirrored():
    ft = registry.configure(registry.load(registry.RECIPES, "ft"), QUICK["ft"])
    known = planted.labeled()
    for labels, mirrored in ((known.labels, True), (1 - known.labels, False)):
        given = replace(known, labels=labels)
        stages = ft(
            planted.suspect(), planted.arch(), given.unlabeled(), given, Run(CPU, Precision(), 0)
        ).stages
        assert ("not mirrored" not in stages[0]) == mirrored


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("anp", "steps=0"), ("anp", "pruned=1"), ("anp", "clean=2"), ("clp", "deviations=-1"), ("fp", "epochs=0"),
        ("otbr", "steps=0"), ("cbd", "budget=0"), ("cbd", "keep=-1"), ("otbr", "ratio=1"), ("otbr", "fused=0"),
        ("fp", "pruned=1"), ("fp", "tolerance=2"), ("mcr", "t=1.5"), ("mcr", "end_rate=0"), ("moth", "fit_steps=0"),
        ("moth", "share=2"), ("nad", "later_rate=0"), ("nad", "weights="), ("nad", "weights=1/-1"),
        ("bcu", "head_ratio=1.1"), ("bcu", "epochs=0"), ("bcu", "batch_size=1"), ("ft", "rate=0"),
        ("d3", "bound=-1"), ("d3", "clean_weight=0"), ("fst", "alpha=-1"), ("fst", "epochs=0"),
        ("ft-sam", "rho=-1"), ("ft-sam", "smoothing=0.9"), ("ibau", "rounds=0"), ("ibau", "portion=0"),
        ("sau", "budget=2"), ("sau", "adversary_steps=0"), ("sau", "clean_weight=-1"),
        ("lmr", "pruned=1"), ("lmr", "recovery_steps=0"), ("lmr", "margin=-1"),
        ("ft", "momentum=-1"), ("bcu", "momentum=1"), ("nad", "momentum=0"), ("fst", "weight_decay=-1"),
        ("mcr", "end_weight_decay=-1"), ("sft", "second_peak=-1"),
        ("sft", "first_epochs=200"), ("sft", "up=0"), ("inoculate", "adversary_share=2"),
        ("inoculate", "temperature=0"), ("inoculate", "floor=1"), ("inoculate", "inversion_steps=-1"),
        ("inoculate", "leave_out=fog"), ("inoculate", "evident_weight=-1"),
        ("inoculate", "leave_out=patch/blend/wave/low/noise/warp/tone/quantise/blur"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_wrong_usage(name, setting):
    with pytest.raises(UsageError, match=name):
        registry.configure(registry.load(registry.RECIPES, name), dict([setting.split("=")]))


def test_stripes_weigh_less_where_networks_without_a_backdoor_mind_them():
    recipe, stripes, pattern = Inoculate(), striped(16, 16)[0], added(16, 16, "pattern")
    of = {(form.name, k): recipe.weight_of(form, k)[0] for form in (stripes, pattern) for k in (2, 4, 5)}
    assert of[("stripes", 2)] == of[("stripes", 4)] == recipe.corrupted_weight
    assert of[("stripes", 5)] == of[("pattern", 2)] == recipe.inverted_weight
    rare = [recipe.weight_of(form, 10) for form in (mask(16, 16), warped(16, 16), recoloured(16, 16))]
    assert len(set(rare)) == 1 and rare[0][0] == recipe.mask_weight
    assert recipe.weight_of(mask(16, 16), 2)[0] == recipe.mask_weight


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bcu", {"ratios": "0/2"}), ("bcu", {"epochs": "0"}), ("distill", {"pruned": "1"}),
        ("distill", {"anp_steps": "0"}), ("distill", {"moth_epochs": "0"}),
        ("distill", {"loss": "none", "clone": "0", "contrast": "0"}), ("pretrain", {"peak": "0"}),
        ("pretrain", {"batch_size": "1"}), ("mimic", {"mi_epochs": "0"}),
    ],
)  # fmt: skip
def test_settings_of_encoders_out_of_range_are_wrong_usage(name, settings):
    with pytest.raises(UsageError, match=name):
        registry.configure(registry.load_recipe(name, "encoder"), settings)


def test_families_that_are_left_out_are_not_trained_on(suspect, arch, images, monkeypatch):
    drawn = set()
    for family, corruption in corruptions.OF_FAMILY.items():
        watched = lambda x, g, family=family, corruption=corruption: drawn.add(family) or corruption(x, g)  # noqa: E731
        monkeypatch.setitem(corruptions.OF_FAMILY, family, watched)
    left = {"leave_out": "patch/warp/noise/low/wave/tone", "epochs": "2", "batch_size": "32"}
    recipe = registry.configure(registry.load(registry.RECIPES, "inoculate"), QUICK["inoculate"] | left)
    cleansed = recipe(suspect, arch, images, None, Run(CPU, Precision(), 0))
    kept = ("blend", "quantise", "blur")
    assert cleansed.families == kept and drawn == set(kept)
    assert cleansed.stages[0] == "no inversion" and cleansed.stages[-1] == "adversaries: drawn"
    assert not cleansed.trained_on
    assert not cleansed.findings
    assert set(adversaries.FAMILY.values()) <= set(corruptions.OF_FAMILY)


def stopped_and_resumed(recipe, place, suspect, arch, images, folder):
    """What `recipe` makes when it is interrupted at `place`, a stage and a step, and resumed."""

    def stop(stage, done, total, **measures):
        if (stage, done) == place:
            os.kill(os.getpid(), signal.SIGINT)

    state, arguments = folder / "s.safetensors", {"recipe": "inoculate"}
    with pytest.raises(Interrupted, match=f"step {place[1]} of"):
        recipe(suspect, arch, images, None, Run(CPU, Precision(), 0, stop, Saved(state, arguments)))
    saved = Saved(state, arguments)
    saved.open()
    return recipe(suspect, arch, images, None, Run(CPU, Precision(), 0, saved=saved))


def test_inverted_triggers_are_worked_against_and_resumed(suspect, arch, images, monkeypatch, tmp_path):
    """A run stopped and resumed amid such triggers, of all forms, ends in the same weights."""
    first = lambda inverted, _: (torch.arange(len(inverted.sizes)) == 0, torch.zeros(4), 1e6)  # noqa: E731
    monkeypatch.setattr(inversion, "outliers", first)
    settings = QUICK["inoculate"] | {"least_steps": "8"}
    recipe = registry.configure(registry.load(registry.RECIPES, "inoculate"), settings)
    whole = recipe(suspect, arch, images, None, Run(CPU, Precision(), 0))
    assert [f["verdict"] for f in whole.findings] == ["outlier"] * 4 + [
        "no-outlier", "no-outlier", "outlier", "outlier", "no-outlier",
    ]  # fmt: skip
    assert whole.stages[2].endswith("warp, inverted") and len(whole.pictures) == 8
    # the student is looked at in the same way, and trained again where a class stands out, up to a limit
    looks = [stage.partition(":")[0] for stage in whole.stages if stage.startswith("look")]
    assert looks == ["look 2 of at most 3, at the student", "look 3 of at most 3, at the student"]
    assert whole.stages[-1] == "distilled for 4 updates more" and whole.curve[-1]["step"] == 8 + 4 + 4
    resumed = stopped_and_resumed(recipe, ("inoculate", 5), suspect, arch, images, tmp_path)
    assert same(tensors(resumed.model), tensors(whole.model)) and resumed.stages == whole.stages
    resumed = stopped_and_resumed(recipe, ("look-2-inoculate", 2), suspect, arch, images, tmp_path)
    assert same(tensors(resumed.model), tensors(whole.model)) and resumed.curve == whole.curve
    without = registry.configure(type(recipe), settings | {"inversion_steps": "0"})
    alone = without(suspect, arch, images, None, Run(CPU, Precision(), 0))
    assert not same(tensors(alone.model), tensors(whole.model)) and not alone.findings


def test_what_stands_out_in_the_student_alone_must_be_small_for_the_suspect_as_well(
    suspect, arch, images, monkeypatch
):
    settings = QUICK["inoculate"] | {"leave_out": "patch/wave"}
    recipe, seen = registry.configure(registry.load(registry.RECIPES, "inoculate"), settings), []

    def of_the_student_alone(limit):
        def outliers(inverted, _):
            seen.append(inverted.form.name)
            later = seen.count(inverted.form.name) > 1
            return (torch.arange(4) == 0) & later, torch.zeros(4), limit if not later else 1e6

        return outliers

    for limit, found in ((0.0, False), (1e6, True)):
        seen.clear()
        monkeypatch.setattr(inversion, "outliers", of_the_student_alone(limit))
        stages = recipe(suspect, arch, images, None, Run(CPU, Precision(), 0)).stages
        assert ("look 2 of at most 3, at the student: nothing stands out" in stages) == (not found)


def test_a_patch_that_sends_each_class_to_another_is_learnt_to_be_ignored(suspect, arch, images, monkeypatch):
    """As a trigger that is known, though nobody told it; and again where the student still answers to one."""
    stamp = FoundPatch(Drawn.blank(3, 32, 32, 0).anywhere(), (3, 32, 32))
    looks = []

    def look(*_):
        looks.append(1)
        return Detected(stamps=[stamp] if len(looks) <= 2 else [])

    monkeypatch.setattr(AllToAll, "__call__", look)
    settings = QUICK["inoculate"] | {"leave_out": "blend/noise/low/wave/warp/tone/quantise/blur"}
    recipe = registry.configure(registry.load(registry.RECIPES, "inoculate"), settings)
    cleansed = recipe(suspect, arch, images, None, Run(CPU, Precision(), 0))
    assert not cleansed.trained_on and any(stage.endswith("known") for stage in cleansed.stages)
    said = [stage for stage in cleansed.stages if stage.startswith("look")]
    assert said[0].endswith(f"{stamp.spec()} for all classes") and "nothing stands out" in said[1]


def test_images_of_another_kind_change_no_answer_by_their_statistics(suspect, arch, images):
    """With hardly any training, batch norm has the statistics of the given images, and the network its answers."""
    dark = torch.randint(96, images.images.shape, dtype=torch.uint8, generator=seeded(3))
    still = {"floor": "1e-9", "peak": "1e-9", "second_peak": "1e-9", "weight_decay": "0"}
    recipe = registry.configure(registry.load(registry.RECIPES, "inoculate"), QUICK["inoculate"] | still)
    cleansed = recipe(suspect, arch, ImageSet(dark), None, Run(CPU, Precision(), 0))
    before, after = tensors(suspect), tensors(cleansed.model)
    running = [name for name in before if "running_var" in name]
    assert running and not any(torch.allclose(before[n], after[n], rtol=0.05) for n in running)
    with torch.no_grad():
        own, kept = suspect.eval()(images.images), cleansed.model(images.images)
    assert (kept - own).abs().max() < 0.15 * own.std()


def test_a_run_whose_steps_burst_the_network_ends_with_one(suspect, arch, images):
    """Learning rates that explode are undone and lowered until they do not."""
    wild = {"peak": "30", "second_peak": "30", "least_steps": "12", "inversion_steps": "0"}
    recipe = registry.configure(registry.load(registry.RECIPES, "inoculate"), QUICK["inoculate"] | wild)
    cleansed = recipe(suspect, arch, images, None, Run(CPU, Precision(), 0))
    assert all(tensor.isfinite().all() for tensor in tensors(cleansed.model).values())
    assert any("learning rate ended at" in stage for stage in cleansed.stages)
    assert cleansed.curve[-1]["step"] == 12


def test_of_too_many_classes_those_are_inverted_that_counterfeits_draw_to(suspect, arch, images, monkeypatch):
    monkeypatch.setattr(inversion, "MOST_INVERTED", 2)
    monkeypatch.setattr(inversion.adversaries, "attraction", lambda *_: torch.tensor([0.1, 0.5, 0.2, 0.9]))
    detected = inversion.Inversion(steps=2)(suspect, arch, images.images, Run(CPU, Precision(), 0))
    assert len(detected.findings) == 3 and not detected.uncounted and not detected.outliers
    named = [caption.split("class ")[1][0] for caption in detected.pictures if "class" in caption]
    assert set(named) <= {"1", "3"}


def test_auto_is_inoculate():
    auto, chosen = registry.load(registry.RECIPES, "auto"), registry.load(registry.RECIPES, "inoculate")
    assert auto.families == chosen.families and auto.needs_labels is False


def test_only_auto_for_classifiers_may_be_told_triggers():
    told = [
        (name, kind)
        for name, entry in registry.RECIPES.items()
        for kind in ("classifier", "encoder")
        if registry.path_for(entry, kind)
        and isinstance(registry.load_for(registry.RECIPES, name, kind)(), Informed)
    ]
    assert told == [("auto", "classifier")]


def test_triggers_that_auto_is_told_are_trained_under_and_insisted_on(suspect, arch, images, monkeypatch):
    quick = registry.configure(Inoculate, QUICK["inoculate"] | {"inversion_steps": "0", "least_steps": "4"})
    monkeypatch.setattr(auto, "Inoculate", lambda: quick)
    patch, wave, run = BadNets(4, "center", "white"), SIG(40, 6), Run(CPU, Precision(), 0)
    untold = auto.Auto()(suspect, arch, images, None, run)
    told = auto.Auto().unlearn([patch], suspect, arch, images, run)
    assert not untold.trained_on and told.trained_on == (patch.spec(),)
    assert told.stages[0] == "auto chose inoculate" and told.stages[-1].endswith("warp, known")
    assert not same(tensors(untold.model), tensors(told.model))
    kept = tensors(told.model)
    again = auto.Auto().insist([wave], told, suspect, images, run)
    assert same(kept, tensors(told.model)) and not same(kept, tensors(again.model))
    assert again.trained_on == (patch.spec(), wave.spec()) and again.curve[-1]["step"] == 4 + 2
    assert again.stages[-1].startswith("1 trigger still fired: distilled for 2 updates more, with 2 times as")


def test_images_that_carry_a_trigger_that_auto_is_told_are_set_aside(suspect, arch, images, monkeypatch):
    quick = registry.configure(Inoculate, QUICK["inoculate"] | {"inversion_steps": "0"})
    seen = []

    def look(model, stamps, pixels, run):
        seen.append(list(stamps))
        return torch.arange(len(pixels)) < 7

    monkeypatch.setattr(inoculate, "look_stamped", look)
    patch = BadNets(4, "center", "white")
    assert quick.against([patch], suspect, arch, images, Run(CPU, Precision(), 0)).set_aside == 7
    assert seen == [[patch]]


RATIOS = (0.01, 0.01, 0.03, 0.09, 0.27)


def test_six_stages_get_the_shipped_ratios():
    assert by_depth(RATIOS, 0.10, 6) == [0.01, 0.01, 0.03, 0.09, 0.27, 0.10]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 7, 9, 12, 20])
def test_other_depths_interpolate(stages):
    found = by_depth(RATIOS, 0.10, stages)
    assert len(found) == stages and found[-1] == 0.10
    body = found[:-1]
    assert body == sorted(body) and all(0.01 - 1e-12 <= x <= 0.27 + 1e-12 for x in body)
    if stages > 2:
        assert body[0] == pytest.approx(0.01) and body[-1] == pytest.approx(0.27)


def test_interpolation_is_geometric_and_linear_from_zero():
    assert by_depth((0.01, 0.09), 0.5, 4)[1] == pytest.approx(0.03)
    assert by_depth((0.0, 0.2), 0.5, 4)[1] == pytest.approx(0.1)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.27, 1.0])
def test_the_share_that_is_drawn_again(share):
    for module in (nn.Conv2d(32, 64, 3), nn.Linear(256, 128)):
        before = module.weight.detach().clone()
        reinitialise(module, share, seeded())
        changed = (module.weight != before).float().mean().item()
        spread = math.sqrt(share * (1 - share) / before.numel())
        assert abs(changed - share) <= 4 * spread + 1e-3


def test_what_is_drawn_follows_the_authors_law():
    conv, linear = nn.Conv2d(32, 64, 3), nn.Linear(256, 128)
    for module in (conv, linear):
        with torch.no_grad():
            module.weight.zero_(), module.bias.zero_()
        reinitialise(module, 1.0, seeded(1))
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)
    assert abs(conv.weight.mean().item()) < 0.001
    kurtosis = ((conv.weight / conv.weight.std()) ** 4).mean().item()
    assert kurtosis == pytest.approx(3.0, abs=0.2)  # a normal law
    assert linear.weight.abs().max().item() == pytest.approx(1 / 16, rel=0.01)
    assert linear.weight.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.03)
    assert 0.8 / 16 < linear.bias.abs().max().item() <= 1 / 16
    assert 0 < conv.bias.abs().max().item() <= 1 / math.sqrt(32 * 9)


def test_what_is_drawn_is_repeatable():
    a, b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    b.load_state_dict(a.state_dict())
    for module in (a, b):
        reinitialise(module, 0.5, seeded(9))
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


def test_rates_of_sft_swing_high_first_and_low_later(suspect, arch, images):
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    recipe = registry.configure(
        registry.load(registry.RECIPES, "sft"),
        {"epochs": "1", "first_epochs": "0.5", "batch_size": "8", "up": "2", "down": "2"},
    )
    original, torch.optim.SGD = torch.optim.SGD, Watched
    try:
        recipe(suspect, arch, images, images, Run(CPU, Precision(), 0))
    finally:
        torch.optim.SGD = original
    middle, low = (3e-4 + 0.1) / 2, (3e-4 + 1e-3) / 2
    assert rates == pytest.approx([3e-4, middle, 0.1, middle, 3e-4, middle, 1e-3, low, 3e-4, low, 1e-3, low])


def test_the_cleansed_batch_statistics_are_those_of_uncorrupted_images(suspect, arch, images):
    """The first norm sees the pixels through one convolution only: its mean must be that of clean pictures."""
    plain = ImageSet(torch.full((64, 3, 32, 32), 128, dtype=torch.uint8))
    cleansed = made("inoculate")(suspect, arch, plain, None, Run(CPU, Precision(), 0))
    net = cleansed.model.network
    with torch.no_grad():
        seen = net.conv1(cleansed.model.normalise(plain.images[:8])).mean((0, 2, 3))
    # crops of a grey picture with a padded rim
    assert torch.allclose(net.bn1.running_mean, seen, atol=0.1)
