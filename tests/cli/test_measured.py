from pathlib import Path

import pytest

from bdclean.cli.main import run
from bdclean.cli.measured import measured
from bdclean.registry import RECIPES

TABLES = Path(__file__).resolve().parents[2] / "sample_models" / "tables"


@pytest.mark.parametrize("recipe", [name for name in RECIPES if measured(name)])
def test_every_row_stands_in_the_table_that_it_is_said_to_be_of(recipe):
    for source, (head, *rows) in measured(recipe):
        file, _, commit = source.partition(", commit ")
        written = (TABLES / file).read_text(encoding="utf-8")
        assert f"* Commit: {commit}\n" in written
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.splitlines()]
        assert head in lines and rows and all(row in lines for row in rows)
        assert {row[head.index("recipe")] for row in rows} - {"none", "(scan)"} == {recipe}


def test_a_recipe_shows_what_was_measured_of_it_and_no_other_does(capsys):
    assert run(["ls", "recipe", "bcu"]) == 0
    shown = capsys.readouterr().out
    assert "measured, in percent (sample_models/tables/cifar10.md, commit " in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith("  badnets ")]
    assert [row[1] for row in rows] == ["(scan)", "bcu"]
    assert measured("nothing") == [] and measured("inoculate") != []
    assert run(["ls", "trigger", "badnets"]) == 0
    assert "measured, in percent" not in capsys.readouterr().out
