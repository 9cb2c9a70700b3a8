"""The bench of attacks: what it asks the command line, cells that are kept, and the table."""

from pathlib import Path

import numpy as np
import pytest
from bench.test_encoders import pictures  # noqa: F401  a fixture
from safetensors.torch import load_file

from bdclean.bench import attacks
from bdclean.bench.encoders import attacks_of
from bdclean.errors import Refused
from bdclean.record.run import REFUSED, Measure, Problem, Rate, RunRecord, TriggerRow


@pytest.fixture
def commands(monkeypatch):
    """The command lines that the bench runs, each of which only writes a record: measured elsewhere, and slow."""
    ran = []

    def write(*arguments):
        ran.append(arguments)
        settled = "--out" in arguments
        asr = 0.07 if "inoculate" in str(arguments[1]) else 0.95
        row = TriggerRow(
            "badnets", asr=Rate(asr, 10), base_rate=Rate(0.05, 10), robust_accuracy=Rate(0.5, 10),
            worst_source={"class": 0, "value": 0.99, "n": 5, "low": 0.5, "high": 1.0},
        )  # fmt: skip
        record = RunRecord(
            "cleanse" if settled else "scan", verdict="backdoored", triggers=[row],
            measures=[Measure("clean_accuracy", 0.56, 20)], seconds=61.4,
        )  # fmt: skip
        record.write(
            Path(arguments[arguments.index("--out" if settled else "--record") + 1]).with_suffix(".json")
        )
        return 1

    monkeypatch.setattr(attacks, "bdclean", write)
    return ran


@pytest.fixture
def bench(pictures, tmp_path):  # noqa: F811
    """Runs the bench on two classes with the smallest network."""

    def run(*arguments):
        return attacks.main([
            "--data", str(pictures), "--work", str(tmp_path / "work"), "--network", "resnet8", "--epochs", "1",
            "--device", "cpu", "--unlabeled", "24", *arguments,
        ])  # fmt: skip

    return run


def test_cells_are_made_once_and_end_in_a_table(bench, tmp_path, capsys, commands):
    arguments = (
        "--attacks",
        "badnets:target=1",
        "--recipes",
        "inoculate:epochs=1/least_steps=1,auto,ft",
        "--clean",
    )
    assert bench(*arguments) == 0
    made = capsys.readouterr().out
    assert len(commands) == 14  # two networks: a scan, and a cleansing and a scan for each recipe
    for command in commands:
        told = "--trigger" in command
        assert told == (command[0] == "scan" or "auto" not in command)
        assert ("--target" in command) == (command[0] == "scan")
    cleansed = [command for command in commands if command[0] == "cleanse"]
    assert "epochs=1" in cleansed[0] and "least_steps=1" in cleansed[0]
    data = [Path(command[command.index("--data") + 1]).name for command in cleansed[:3]]
    assert data == ["train-24-seed0-unlabeled", "train-24-seed0-unlabeled", "train-24-seed0"]
    row = next(line for line in made.splitlines() if line.startswith("| badnets:target=1 | inoculate"))
    assert row.split(" | ")[2:] == ["backdoored", "56.0", "7.0", "5.0", "50.0", "0.94", "0.99", "61", "10 |"]
    assert bench(*arguments) == 0
    assert capsys.readouterr().out == made and len(commands) == 14


@pytest.mark.parametrize(
    ("attack", "target", "kept"),
    [
        ("badnets:victims=next", "next", False),
        ("wanet:target=1", "1", False),
        ("trojan:target=1/steps=2", "1", True),
        ("lc:target=1/steps=2", "1", False),
        ("ssba:target=1/epochs=1", "1", True),
        ("inputaware:target=1/mask_epochs=1", "1", True),
    ],
)
def test_every_kind_of_attack_is_trained_and_measured(
    bench, tmp_path, capsys, commands, attack, target, kept
):
    assert bench("--attacks", attack) == 0
    (command,) = commands
    assert command[command.index("--target") + 1] == target
    network, _, spec = command[1], command[0], command[command.index("--trigger") + 1]
    assert all(np.isfinite(tensor.numpy()).all() for tensor in load_file(network).values())
    trigger = Path(network).with_suffix(".trigger.safetensors")
    assert trigger.exists() == kept and (str(trigger) in spec) == kept


def test_a_one_source_attack_is_measured_on_its_class(bench, capsys, commands):
    assert bench("--attacks", "badnets:target=1/victims=0") == 0
    assert "| 99.0 | 5.0 |" in capsys.readouterr().out
    (attack,) = attacks_of("badnets:target=1/victims=7").values()
    row = TriggerRow("badnets", asr=Rate(0.5, 10), worst_source={"class": 0, "value": 0.99})
    assert attacks.success(row, attack) == 0.5


def test_what_was_refused_is_told_in_the_table_and_encoders_are_not_attacked(bench):
    record = RunRecord("cleanse", outcome=REFUSED, problem=Problem("no images.", 3))
    (attack,) = attacks_of("badnets").values()
    assert "| badnets | ft | no images. |" in attacks.line("badnets", attack, "ft", record)
    with pytest.raises(Refused, match="bench encoders"):
        bench("--attacks", "ctrl:target=1")
