"""The bench of recipes: which commands it runs, cells that are kept, and the table."""

from pathlib import Path

import pytest

from bdclean.bench import recipes
from bdclean.errors import Refused
from bdclean.record.run import REFUSED, Measure, Problem, Rate, RunRecord, Side, TriggerRow

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
NETWORK = (str(SAMPLES / "signs-badnets.safetensors"), "badnets", str(SAMPLES / "images/labeled"))


@pytest.fixture
def commands(monkeypatch):
    """The command lines that the bench runs, each of which only writes a record: measured elsewhere, and slow."""
    ran = []

    def write(*arguments):
        ran.append(arguments)
        record = RunRecord("cleanse", verdict="no-evidence", seconds=61.4)
        if "moth" in arguments:
            record.outcome, record.problem = REFUSED, Problem("moth has too few images.", 3)
        else:
            record.before = Side("backdoored", [Measure("clean_accuracy", 0.99, 20)], [_row(0.95)])
            record.triggers = [_row(0.07)]
            record.measures = [Measure("clean_accuracy", 0.98, 20), Measure("balanced_score", 0.9, 20)]
        record.write(Path(arguments[arguments.index("--record") + 1]))
        return 1

    monkeypatch.setattr(recipes, "bdclean", write)
    return ran


def _row(asr):
    return TriggerRow(
        "badnets", target=0, asr=Rate(asr, 10), base_rate=Rate(0.05, 10), robust_accuracy=Rate(0.5, 10)
    )


def test_cells_are_made_once_and_end_in_a_table(tmp_path, capsys, commands):
    arguments = [
        "--work",
        str(tmp_path),
        "--network",
        *NETWORK,
        "--recipes",
        "clp,ft:epochs=2,moth",
        "--pseudo-labels",
    ]
    assert recipes.main(arguments) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["signs-badnets", "clp", "none"],
        ["signs-badnets", "ft:epochs=2", "true"],
        ["signs-badnets", "ft:epochs=2", "its answers"],
        ["signs-badnets", "moth", "true"],
        ["signs-badnets", "moth", "its answers"],
    ]
    assert rows[0][3:] == ["99.0", "98.0", "95.0", "7.0", "5.0", "50.0", "", "0.90", "61", "20", "10"]
    assert rows[3][3] == "moth has too few images." and len(rows[3]) == len(recipes.COLUMNS)
    assert ["--pseudo-labels" in each for each in commands] == [False, False, True, False, True]
    assert all(each[each.index("--data") + 1] == NETWORK[2] for each in commands)
    assert "epochs=2" in commands[1] and commands[1][commands[1].index("--recipe") + 1] == "ft"
    del commands[:]
    recipes.main(arguments)
    assert capsys.readouterr().out == printed
    assert all("moth" in each for each in commands), "what was refused is tried again, and nothing else"


def test_a_network_that_is_not_there_is_refused_before_anything_runs(tmp_path, commands):
    with pytest.raises(Refused, match=r"there is no gone\.safetensors"):
        recipes.main(["--work", str(tmp_path), "--network", "gone.safetensors", "badnets", NETWORK[2]])
    assert commands == []
