import json
import math
import os
import re
import signal
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from bdclean.errors import Interrupted, Refused
from bdclean.files.tensorfile import read_header, read_tensors
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.training.loop import State, fit, halvings, order, updates
from bdclean.training.resume import Position, Saved
from bdclean.training.run import Precision, Run, probe_precision, seed_for
from bdclean.training.students import (
    Augmentation,
    choose_augmentation,
    frozen,
    recentre,
    set_batch_statistics,
    triangular,
)

CPU = torch.device("cpu")
ARGUMENTS = {"source_sha256": "ab" * 32, "seed": 5, "threads": 1, "settings": {"rate": "0.1"}}


class Tiny(nn.Module):
    """A convolution, batch norm, dropout and a head: everything that has state, or draws at random."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6)
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.dropout(F.relu(self.norm(self.conv(x))).mean((2, 3))))


def tiny(seed=0, precision=None):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Classifier(Tiny(), parse_preprocess("half"))
    return network.to(memory_format=torch.channels_last) if precision and precision.channels_last else network


def pictures(n=22):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)


def job(run, steps=6, optimiser="sgd", rate=0.05, seen=None):
    """A model, trained for `steps`, with the schedule, averages and extra state that recipes use."""
    model = tiny(precision=run.precision).train()
    made = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-3),
        "adam": lambda: torch.optim.Adam(model.parameters(), rate),
    }[optimiser]()
    extra = {"mask": torch.zeros(3)}
    images = pictures()
    labels = torch.arange(len(images)) % 4

    def step(batch):
        if seen is not None:
            seen.append(batch)
        extra["mask"] += torch.rand(3, generator=batch.generator)
        noise = torch.rand(batch.images.shape, generator=batch.generator) * extra["mask"].mean()
        with run.precision.autocast(run.device):
            logits = model(run.precision.layout(batch.images.float() / 255 + 0.1 * noise))
        loss = F.cross_entropy(logits.float(), batch.labels)
        return loss, {"accuracy": (logits.argmax(1) == batch.labels).float().mean().item()}

    state = State("job", model, made, images, labels, 8, steps, lambda s: rate / (1 + s), extra)
    return state, step


def result(run, **how):
    state, step = job(run, **how)
    curve = fit(step, state, run)
    return {**state.model.state_dict(), **state.extra}, curve


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_image_is_seen_equally_often():
    for images, batch in ((20, 6), (7, 3), (5, 5), (9, 2)):
        seen = Counter()
        for step in range(images):
            chosen = order(images, batch, step, 3, "x")
            assert len(chosen) == batch
            seen.update(chosen.tolist())
        assert set(seen.values()) == {batch} and len(seen) == images


def test_an_epoch_is_one_batch_at_least():
    assert [updates(100, 50, 256), updates(0.5, 50, 256), updates(2, 100, 32)] == [100, 1, 7]


def test_order_depends_on_seed_stage_and_epoch_only():
    assert torch.equal(order(20, 6, 2, 3, "x"), order(20, 6, 2, 3, "x"))
    for other in (order(20, 6, 2, 4, "x"), order(20, 6, 2, 3, "y"), order(20, 6, 12, 3, "x")):
        assert not torch.equal(order(20, 6, 2, 3, "x"), other)


def test_seeds_are_the_same_on_every_machine():
    assert seed_for(0, "bcu", 3) == 7_144_088_060_767_594_178
    assert len({seed_for(0, "a", k) for k in range(100)}) == 100


def test_triangular_rises_and_falls():
    rates = [triangular(step, 4, 2, 0.1, 0.9) for step in range(7)]
    assert rates == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9, 0.5, 0.1])


def test_the_schedule_sets_the_rate_and_progress_is_told():
    seen, rates, told = [], [], []
    run = Run(CPU, Precision(), 0, lambda stage, done, total, **m: told.append((stage, done, total, m)))
    state, step = job(run, seen=seen)

    def noting(batch):
        rates.append(state.optimiser.param_groups[0]["lr"])
        return step(batch)

    fit(noting, state, run)
    assert rates == pytest.approx([0.05 / (1 + k) for k in range(6)])
    assert [t[:3] for t in told] == [("job", k + 1, 6) for k in range(6)]
    assert all(math.isfinite(m["loss"]) and "images_per_second" in m for *_, m in told)
    assert [b.step for b in seen] == list(range(6)) and [b.progress for b in seen] == [
        k / 6 for k in range(6)
    ]


def test_it_learns():
    images, model = pictures(), nn.Linear(3 * 64, 4)
    labels = torch.arange(len(images)) % 4
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    state = State("x", model, optimiser, images, labels, 8, 120)

    def step(batch):
        return F.cross_entropy(model(batch.images.flatten(1) / 255), batch.labels), {}

    curve = fit(step, state, Run(CPU, Precision(), 0))
    assert len(curve) == 120 and curve[-1]["loss"] < 0.2 * curve[0]["loss"]


def test_rows_of_the_curve_are_means_also_the_last():
    run = Run(CPU, Precision(), 0)
    model = nn.Linear(1, 1)
    state = State("x", model, torch.optim.SGD(model.parameters(), 0.1), pictures(), None, 8, 205)
    curve = fit(lambda batch: (None, {"step_number": float(batch.step + 1)}), state, run)
    assert curve[0] == {"step": 2, "step_number": 1.5} and curve[-1] == {"step": 205, "step_number": 205}


PRECISIONS = [Precision(), Precision(channels_last=True), Precision(True, True)]


@pytest.mark.parametrize(
    ("optimiser", "precision"),
    [("sgd", PRECISIONS[0]), ("sgd", PRECISIONS[1]), ("adam", PRECISIONS[0]), ("adam", PRECISIONS[2])],
)
def test_a_run_stopped_after_any_step_ends_in_the_same_bits(tmp_path, optimiser, precision):
    expected, expected_curve = result(Run(CPU, precision, 7), optimiser=optimiser)
    for stop in range(1, 7):
        path = tmp_path / f"{stop}.resume.safetensors"

        def tell(stage, done, total, stop=stop, **measures):
            if done == stop:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted, match=f"step {stop} of 6.*--resume") as caught:
            result(Run(CPU, precision, 7, tell, Saved(path, ARGUMENTS)), optimiser=optimiser)
        assert caught.value.exit_code == 130
        torch.rand(stop)  # whatever else drew random numbers meanwhile
        saved = Saved(path, ARGUMENTS)
        assert saved.open() and saved.position.done == stop
        found, curve = result(Run(CPU, precision, 7, saved=saved), optimiser=optimiser)
        assert same(found, expected) and curve == expected_curve


def test_the_curve_goes_on_in_the_middle_of_a_row(tmp_path, monkeypatch):
    def go(saved=None, stop=0):
        run = Run(CPU, Precision(), 0, saved=saved)
        if stop:
            run.tell = lambda s, done, t, **m: os.kill(os.getpid(), signal.SIGTERM) if done == stop else None
        model = nn.Linear(1, 1)
        state = State("x", model, torch.optim.SGD(model.parameters(), 0.1), pictures(), None, 8, 405)
        return fit(lambda batch: (None, {"value": math.sin(batch.step)}), state, run)

    saved = Saved(tmp_path / "s.safetensors", ARGUMENTS)
    with pytest.raises(Interrupted) as caught:
        go(saved, 203)
    assert caught.value.exit_code == 143
    again = Saved(tmp_path / "s.safetensors", ARGUMENTS)
    assert again.open() and go(again) == go()


def test_a_second_signal_ends_at_once_and_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run, steps = Run(CPU, Precision(), 0), []
    state, step = job(run)

    def interrupted(batch):
        steps.append(batch.step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return step(batch)

    with pytest.raises(Interrupted, match="twice"):
        fit(interrupted, state, run)
    assert steps == [0] and signal.getsignal(signal.SIGINT) is before


def test_divergence_is_refused_and_leaves_nothing_to_go_on_from(tmp_path):
    saved = Saved(tmp_path / "s.safetensors", ARGUMENTS)
    saved.save(saved.position, {})
    run = Run(CPU, Precision(), 0, saved=saved)
    state, step = job(run, steps=60, rate=1e30)
    with pytest.raises(Refused, match=r"job diverged at step \d+ of 60 .*lower the learning rate"):
        fit(step, state, run)
    assert not any(tmp_path.iterdir())


def lowered(run, at, worth=math.inf, steps=300):
    """A run in which the loss is `worth` once step `at` is reached at more than a quarter of the learning rate."""
    state, step = job(run, steps=steps)
    state.most = 1e3

    def bursting(batch):
        loss, measures = step(batch)
        high = state.optimiser.param_groups[0]["lr"] > 0.05 / (1 + batch.step) / 4
        return (loss * worth if batch.step == at and high else loss), measures

    curve = fit(bursting, state, run)
    return {**state.model.state_dict(), **state.extra}, curve


@pytest.mark.parametrize("worth", [math.inf, math.nan, 1e6])
def test_steps_that_burst_are_undone_and_the_rate_is_lowered(worth):
    _, curve = lowered(Run(CPU, Precision(), 0), 50, worth)
    assert [row["step"] for row in curve] == list(range(3, 301, 3))
    assert all(math.isfinite(value) for row in curve for value in row.values())
    shares = [row.get("rate_share", 1.0) for row in curve]
    assert shares == [1.0] * 15 + [0.25] * 85, "row 17 burst: rows 16 and 17 were done again, twice"
    assert "ended at 0.25" in halvings(curve)[0] and halvings(curve[:10]) == []


def test_a_burst_in_the_first_step_goes_back_to_the_start():
    weights, curve = lowered(Run(CPU, Precision(), 0), 0)
    assert curve[0]["step"] == 3 and {row["rate_share"] for row in curve} == {0.25}
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_run_stopped_between_bursts_ends_in_the_same_bits(tmp_path):
    expected = lowered(Run(CPU, Precision(), 0), 20, steps=30)
    for stop in (18, 20, 25):
        told = []

        def tell(stage, done, total, stop=stop, told=told, **measures):
            told.append(done)
            if told.count(stop) == (2 if stop == 20 else 1):
                os.kill(os.getpid(), signal.SIGINT)

        path = tmp_path / f"{stop}.resume.safetensors"
        with pytest.raises(Interrupted):
            lowered(Run(CPU, Precision(), 0, tell, Saved(path, ARGUMENTS)), 20, steps=30)
        saved = Saved(path, ARGUMENTS)
        assert saved.open()
        weights, curve = lowered(Run(CPU, Precision(), 0, saved=saved), 20, steps=30)
        assert same(weights, expected[0]) and curve == expected[1]


def test_recentring_changes_statistics_and_no_answer():
    model, images = tiny().eval(), pictures(24).float() / 255
    norm = model.network.norm
    with torch.no_grad():
        norm.running_mean.copy_(torch.linspace(-2, 2, 6))
        norm.running_var.copy_(torch.tensor([1e-3, 1e-6, 0.5, 1.0, 2.0, 9.0]))
        norm.weight.copy_(torch.linspace(-1, 1.5, 6))
    with torch.no_grad():
        before = model(images)
    recentre(model, lambda: iter(images.split([16, 8])))
    with torch.no_grad():
        inputs = model.network.conv(model.normalise(images))
        assert torch.allclose(model(images), before, rtol=1e-4, atol=1e-4)
    variance, mean = torch.var_mean(inputs, (0, 2, 3), correction=0)
    assert torch.allclose(norm.running_mean, mean, atol=1e-6) and torch.allclose(
        norm.running_var, variance, rtol=1e-4
    )
    model.train()
    model.network.dropout.eval()
    assert torch.allclose(model(images), before, rtol=1e-3, atol=1e-3), (
        "what batches see is what it was given"
    )


def saved_run(tmp_path):
    path = tmp_path / "out.resume.safetensors"
    result(Run(CPU, Precision(), 7, saved=Saved(path, ARGUMENTS)))
    return path


def test_a_state_of_a_finished_run_is_the_result(tmp_path):
    saved = Saved(saved_run(tmp_path), ARGUMENTS)
    assert saved.open() and saved.position.done == 6
    assert same(result(Run(CPU, Precision(), 7, saved=saved))[0], result(Run(CPU, Precision(), 7))[0])
    copy = json.loads(saved.json_path.read_text())
    assert copy["done"] == 6 and copy["arguments"] == ARGUMENTS


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 6}, "with seed 5, this run has 6"),
        ({"settings": {"rate": "0.2"}}, "with rate 0.1, this run has 0.2"),
        ({"threads": 2}, "with threads 1, this run has 2"),
        ({"new": True}, "with new none, this run has True"),
    ],
)
def test_other_arguments_are_refused_by_name(tmp_path, changed, words):
    with pytest.raises(Refused, match=f"{words}.*--resume"):
        Saved(saved_run(tmp_path), {**ARGUMENTS, **changed}).open()


def test_a_difference_names_what_was_typed_before_what_follows_from_it(tmp_path):
    typed = {"data": "a", "labeled": None, "seed": 0, "settings": {"epochs": "1", "peak": "2"}}
    Saved(path := tmp_path / "s.safetensors", typed).save(Position("x"), {"w": torch.zeros(1)})
    with pytest.raises(Refused, match=r"made with seed 0, this run has 1:"):
        Saved(path, {**typed, "data": "b", "seed": 1}).open()
    with pytest.raises(Refused, match=r"made with peak 2, this run has 3:"):
        Saved(path, {**typed, "data": "b", "settings": {"epochs": "1", "peak": "3"}}).open()


@pytest.mark.parametrize("key", ["data", "labeled", "source_sha256"])
def test_a_state_of_other_files_is_refused_in_words_and_not_in_digests(tmp_path, key):
    Saved(path := tmp_path / "s.safetensors", {key: "ab" * 32}).save(Position("x"), {"w": torch.zeros(1)})
    with pytest.raises(Refused, match="was made (with other|from another) ") as refused:
        Saved(path, {key: "cd" * 32}).open()
    assert not re.search("[0-9a-f]{16}", str(refused.value).replace(str(path), ""))


def test_a_state_of_another_network_is_refused(tmp_path):
    saved = Saved(saved_run(tmp_path), ARGUMENTS)
    saved.open()
    saved.tensors["now.model.network.head.weight"] = torch.zeros(9, 9)
    with pytest.raises(Refused, match="does not fit this network"):
        result(Run(CPU, Precision(), 7, saved=saved))


def hostile(path, how):
    raw = path.read_bytes()
    if how == "truncated":
        path.write_bytes(raw[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickle":
        torch.save({"model": torch.zeros(2)}, path)
    elif how == "no metadata":
        save_file({"x": torch.zeros(2)}, path)
    else:
        save_file({"x": torch.zeros(2)}, path, {"bdclean.resume": how})


POSITION = {"stage": "x", "done": 1, "curve": [], "sums": {}, "share": 1.0, "good": 0, "newest": 0}
ANSWERS = [json.dumps({"arguments": 5, **POSITION, "notes": {}}), "[]", "{}", "{"]


@pytest.mark.parametrize("how", ["truncated", "empty", "pickle", "no metadata", *ANSWERS])
def test_an_unreadable_state_is_refused(tmp_path, how):
    path = saved_run(tmp_path)
    hostile(path, how)
    with pytest.raises(Refused, match="cannot be read.*delete it"):
        Saved(path, ARGUMENTS).open()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"done": -1}, "says step -1"),
        ({"done": 6.0}, "says step 6.0"),
        ({"done": True}, "says step True"),
        ({"stage": 5}, "of stage 5"),
        ({"curve": [{"step": 7, "loss": 1.0}]}, "steps \\[7\\] and 6 are done"),
        ({"curve": [{"step": 2}, {"step": 2}]}, "goes through steps"),
        ({"curve": [{"loss": 1.0}]}, "goes through steps"),
        ({"curve": [[1]]}, "not a list of tables"),
        ({"sums": {"loss": "1"}}, "not a list of tables"),
        ({"share": 0.0}, "says 0.0 of the learning rate"),
        ({"share": "1"}, "says '1' of the learning rate"),
        ({"good": 99}, "goes back to steps 99"),
        ({"newest": -1}, "goes back to steps 5 and -1"),
        ({"check": 5}, "not those that were written"),
        ({"arguments": 5}, "cannot be read"),
    ],
)
def test_a_state_that_no_run_can_have_written_is_refused(tmp_path, changed, words):
    path = saved_run(tmp_path)
    header = read_header(path)
    tensors, _ = read_tensors(path, header)
    found = {**json.loads(header.metadata["bdclean.resume"]), **changed}
    save_file(tensors, path, {"bdclean.resume": json.dumps(found)})
    with pytest.raises(Refused, match=f"cannot be read.*{words}" if words != "cannot be read" else words):
        Saved(path, ARGUMENTS).open()


def test_a_bit_that_flipped_in_a_state_is_noticed(tmp_path):
    path = saved_run(tmp_path)
    raw = bytearray(path.read_bytes())
    for place in (len(raw) - 1, len(raw) - 500):
        raw[place] ^= 1
        path.write_bytes(raw)
        with pytest.raises(Refused, match="cannot be read.*not those that were written.*delete it"):
            Saved(path, ARGUMENTS).open()
        raw[place] ^= 1
    path.write_bytes(raw)
    assert Saved(path, ARGUMENTS).open()


def test_a_state_with_more_steps_than_the_run_has_skips_no_training(tmp_path):
    saved = Saved(saved_run(tmp_path), ARGUMENTS)
    assert saved.open()
    with pytest.raises(Refused, match="says that 6 steps of job are done, and it has 5"):
        result(Run(CPU, Precision(), 7, saved=saved), steps=5)


def test_keep_makes_a_tensor_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return torch.arange(3.0)

    saved = Saved(tmp_path / "s.safetensors", ARGUMENTS)
    run = Run(CPU, Precision(), 0, saved=saved)
    assert torch.equal(run.keep("x", make), run.keep("x", make)) and len(made) == 1
    saved.save(Position("stage", 1), {})
    again = Saved(tmp_path / "s.safetensors", ARGUMENTS)
    again.open()
    assert torch.equal(Run(CPU, Precision(), 0, saved=again).keep("x", make), torch.arange(3.0))
    assert len(made) == 1


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: p.name)
def test_precision_is_named_and_parsed_back(precision):
    assert Precision.parse(precision.name) == precision
    images = precision.layout(torch.zeros(2, 3, 4, 4))
    assert images.is_contiguous(memory_format=torch.channels_last) is precision.channels_last


@pytest.mark.parametrize("wanted", ["fp32", "bf16", "auto"])
def test_probing_obeys_and_leaves_the_model_alone(wanted):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = probe_precision(model, pictures(), CPU, wanted)
    assert wanted == "auto" or found.bf16 is (wanted == "bf16")
    assert same(before, model.state_dict()) and all(p.grad is None for p in model.parameters())


def test_a_frozen_teacher_is_a_copy():
    model = tiny().train()
    teacher = frozen(model, Run(CPU, Precision(), 0))
    assert not teacher.training and model.training
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        teacher.network.head.weight.zero_()
    assert model.network.head.weight.any()


def test_batch_statistics_are_the_plain_mean():
    model, images = tiny().eval(), pictures(24).float() / 255
    parts = images.split(8)
    norm, weights = model.network.norm, model.network.head.weight.clone()
    norm.running_mean.fill_(9.0)
    set_batch_statistics(model, lambda: iter(parts))
    with torch.no_grad():
        inputs = [model.network.conv(model.normalise(part)) for part in parts]
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    assert torch.allclose(norm.running_mean, means, atol=1e-5)
    assert torch.allclose(norm.running_var, variances, atol=1e-5)
    assert norm.momentum == 0.1 and not model.training and torch.equal(weights, model.network.head.weight)
    plain = nn.Linear(2, 2)
    set_batch_statistics(plain, lambda: pytest.fail("nothing to set"))


class Sided(nn.Module):
    """Answers by comparing the left half's brightness with the right's (or, not sided, the top's with the bottom's)."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, images):
        first, second = images.float().mean((1, 5 - self.axis)).chunk(2, 1)
        return torch.stack([first.mean(1), second.mean(1)], 1)


def test_mirroring_only_where_the_network_does_not_mind():
    images = torch.full((64, 3, 16, 16), 60, dtype=torch.uint8)
    for k in range(64):  # a bright block on one of the four sides
        row, column = (k % 2) * 10, (k // 2 % 2) * 10
        images[k, :, row : row + 6, column : column + 6] = 250
    run = Run(CPU, Precision(), 0)
    assert choose_augmentation(Sided(3), images, run) == Augmentation(2, False)
    assert choose_augmentation(Sided(2), images, run) == Augmentation(2, True)


class Placed(nn.Module):
    """Answers by whether the middle of the images is bright: a crop of more than `minds` pixels may change that."""

    def __init__(self, minds):
        super().__init__()
        self.reach = minds + 1

    def forward(self, images):
        middle = images.shape[2] // 2
        spot = images[
            ..., middle - self.reach : middle + self.reach, middle - self.reach : middle + self.reach
        ]
        bright = spot.float().amax((1, 2, 3))
        return torch.stack([bright, 255 - bright], 1)


def test_crops_are_as_large_as_the_network_does_not_mind():
    images = torch.zeros(256, 3, 64, 64, dtype=torch.uint8)
    images[::2, :, 31:33, 31:33] = 255
    run = Run(CPU, Precision(), 0)
    assert choose_augmentation(Placed(9), images, run).padding == 8
    assert choose_augmentation(Placed(4), images, run).padding == 4
    assert choose_augmentation(Placed(1), images, run).padding == 2


def test_augmentation_is_seeded_and_keeps_its_argument():
    images, augment = pictures(), Augmentation(2, True)
    kept = images.clone()
    a, b = (augment(images, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(kept, images) and a.shape == images.shape
    assert augment.describe() == "crops with 2 pixels of padding, mirrored"
