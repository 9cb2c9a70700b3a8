"""The simulated rule: what it must not miss, and where it must not cry wolf."""

import pytest
import torch
from safetensors import safe_open

from bdclean.bench import __main__ as bench
from bdclean.bench.rule_simulation import ALL_TO_ALL, ALL_TO_ONE, NONE, ONE_SOURCE, Case, outcomes
from bdclean.bench.small_networks import Plan, plans
from bdclean.record.run import BACKDOORED, NO_EVIDENCE, NOT_ASSESSED


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        (Case(10, 2000, NONE), NO_EVIDENCE),
        (Case(200, 2000, NONE), NO_EVIDENCE),
        (Case(10, 2000, NONE, drift=0.25), NOT_ASSESSED),
        (Case(10, 2000, NONE, unstable=0.6), NOT_ASSESSED),
        (Case(2, 2000, NONE, drift=0.99, whole=True), NOT_ASSESSED),
        (Case(10, 2000, ALL_TO_ONE, 0.4), BACKDOORED),
        (Case(10, 2000, ALL_TO_ONE, 0.83, drift=0.7), BACKDOORED),
        (Case(10, 2000, ONE_SOURCE, 0.5), NOT_ASSESSED),
        (Case(10, 2000, ONE_SOURCE, 1.0, drift=0.25), BACKDOORED),
        (Case(200, 2000, ALL_TO_ALL, 0.5), BACKDOORED),
    ],
)
def test_simulated_networks_get_the_verdict_that_is_true(case, verdict):
    assert outcomes(case, range(4)) == {verdict: 4}


def test_the_bench_prints_a_row_for_each_case(capsys):
    assert bench.main.__module__ == "bdclean.bench.__main__"
    assert bench.DRIVERS["rule"](["--seeds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 60 and {line.count("|") for line in lines} == {12}


def test_small_networks_differ_and_are_the_same_again():
    cifar, signs = [f"class{k}" for k in range(10)], [f"{k:02d}" for k in range(43)]
    made = plans(24, 8, cifar, signs, seed=0)
    assert made == plans(24, 8, cifar, signs, seed=0) != plans(24, 8, cifar, signs, seed=1)
    assert {plan.family for plan in made} == {"resnet", "preact", "vgg"}
    assert {len(plan.classes) for plan in made} >= {2, 3, 4, 10, 43}
    assert [plan.attack is None for plan in made] == [True] * 24 + [False] * 8
    for plan in made:
        logits = plan.build().eval()(torch.zeros(2, 3, 32, 32))
        assert logits.shape == (2, len(plan.classes))


@pytest.mark.slow
def test_a_small_network_is_trained_and_can_be_read(tmp_path):
    from PIL import Image

    from bdclean.bench.small_networks import Source, train
    from bdclean.networks.checkpoint.checkpoint import Checkpoint

    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for k, name in enumerate(("dark", "light")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(40):
                pixels = torch.randint(
                    90 * k, 90 * k + 90, (32, 32, 3), generator=generator, dtype=torch.uint8
                )
                Image.fromarray(pixels.numpy()).save(tmp_path / split / name / f"{number}.png")
    plan = Plan(
        "t", ("dark", "light"), "resnet", (8, 16, 32), 1, "none", 0.1, 5e-4, 2, True, 64, None, None, None
    )
    train(plan, Source(tmp_path), 0, tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata() == {"bdclean.preprocess": "none"}
    assert Checkpoint.read(tmp_path / "t.safetensors").arch.classes == 2
