"""What reports say of what is left behind: what was not reached or not measured never reads as a number."""

import re
from dataclasses import replace

import pytest

from bdclean.record.parsing import parse_records
from bdclean.record.rates import Rate
from bdclean.record.run import RunRecord
from bdclean.record.sequela import (
    CONTROL,
    OUTPUT,
    SUSPECT,
    TRIGGER,
    Injection,
    LowRate,
    Membership,
    PathPoint,
    Reactivation,
    Score,
    Sequela,
)
from bdclean.report.formats import render
from bdclean.report.sequela import sentences, tables


def scores(*rates):
    return [Score(50 * k, Rate(value, 90, 0.0, 1.0), Rate(0.01, 90), Rate(0.99, 100)) for k, value in rates]


LOW = [LowRate(0.01, Rate(0.05, 40, 0.01, 0.1)), LowRate(0.001, Rate(None, 40), "1,000 non-members")]
FOUND = Sequela(
    ["membership", "reinjection", "reactivation", "path"],
    "labels",
    [
        Membership(SUSPECT, "given", 40, 1000, "labels", Rate(0.6, 40, 0.5, 0.7), LOW),
        Membership(OUTPUT, "given", 40, 1000, "labels", Rate(0.5, 40, 0.4, 0.6), LOW, Rate(-0.1, 40, -0.2, 0.0)),
    ],
    [
        Injection("reinjection", OUTPUT, "badnets", 0, TRIGGER, 10, 400, scores((0, 0.0), (2, 0.7)), 100, 100),
        Injection("reinjection", OUTPUT, "badnets", 0, CONTROL, 10, 400, scores((0, 0.0), (2, 0.3)), None, 100),
    ],
    [Reactivation(OUTPUT, "badnets", 0, "amplified 1.5 times", Rate(0.25, 90, 0.2, 0.3), Rate(0.0, 90))],
    [PathPoint(0.5, "badnets", 0, Rate(0.75, 90, 0.7, 0.8), Rate(0.0, 90), Rate(0.9, 100))],
)  # fmt: skip
RECORD = RunRecord("cleanse", sequela=FOUND)


def test_a_record_is_read_back_as_it_was_and_one_without_has_nothing_to_say():
    (again,) = parse_records(RECORD.dump(), "it")
    assert again.sequela == FOUND
    for without in (RunRecord("scan"), parse_records(replace(RECORD, sequela=None).dump(), "it")[0]):
        assert sentences(without) == [] and tables(without) == []


def test_sentences_say_what_was_not_reached_and_what_was_not_measured():
    first, told, injected, active, walked = sentences(RECORD)
    assert (
        "by the suspect's loss on labels: AUC 0.600 (0.500-0.700, n 40), 5.0 (1.0-10.0, n 40) % are" in first
    )
    assert "change -0.100 (-0.200 to 0.000, n 40)" in told and "change" not in first
    assert "at 0.1 % not measured (1,000 non-members)" in told and "told at 1 % false positives" in told
    assert "trigger 0.0 -> 70.0 %, 50 % by step 100" in injected
    assert "control 0.0 -> 30.0 %, 50 % not by step 100" in injected
    assert "amplified 1.5 times 25.0 (20.0-30.0, n 90)" in active and "0.5: 75.0" in walked


@pytest.mark.parametrize("form", ["table", "md", "html"])
def test_every_format_shows_it(form):
    shown = render([RECORD], form)
    assert "What is left behind" in shown and "not by step 100" in shown
    assert "not measured" in shown
    assert "What is left behind" not in render([RunRecord("cleanse")], form)


def test_tables_hold_every_figure_and_nothing_for_what_was_not_taken():
    membership, injections, retuning, reactivation, path = tables(RECORD)
    assert [row[-1] for row in membership.rows] == 2 * ["not measured: 1,000 non-members"]
    assert [row[injections.columns.index("reached")] for row in injections.rows] == [
        "50 % by step 100",
        "50 % not by step 100",
    ]
    assert retuning.rows == [] and len(reactivation.rows) == len(path.rows) == 1


@pytest.mark.parametrize("form", ["md", "html"])
def test_names_of_a_stranger_are_text_alone(form):
    injection = replace(FOUND.injections[0], trigger="<script>x</script>", model="<img src=x>")
    shown = render([replace(RECORD, sequela=replace(FOUND, injections=[injection]))], form)
    assert "script" in shown and not re.search(r"(?<!\\)<(script>x|img src)", shown)
