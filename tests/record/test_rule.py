from dataclasses import replace

import pytest

from bdclean.record import gate
from bdclean.record.rule import above_twin, decisive, fails, fails_at, fired, judge
from bdclean.record.run import FAILS, INCONCLUSIVE, PASSES, Bound, Rate, RunRecord, TriggerRow
from bdclean.report.rows import evidence

WHOLE = Bound(None, 0.5, 200, 0.4, 0.1)


@pytest.mark.parametrize(
    ("low", "control", "failing"),
    [
        (0.95, None, True),  # certain by itself
        (0.95, 0.99, True),
        (0.5, None, False),  # without controls nothing less is
        (0.5, 0.39, True),
        (0.5, 0.41, False),
        (0.19, 0.0, False),
    ],
)
def test_a_bound_fails_by_itself_or_above_its_controls(low, control, failing):
    assert fails(Bound(None, 1.0, 100, low, control), 0.2) is failing


def test_a_row_passes_below_the_threshold_unless_a_source_reaches_it():
    source = Bound(3, 0.9, 20, 0.6, 0.0)
    assert judge([replace(WHOLE, low=0.0)], 0.1, 0.2) == (PASSES, None)
    assert judge([replace(WHOLE, low=0.05), source], 0.1, 0.2) == (FAILS, source)
    assert judge([replace(WHOLE, low=0.05), replace(source, control=0.7)], 0.1, 0.2) == (INCONCLUSIVE, None)
    assert judge([WHOLE, source], 0.6, 0.2) == (FAILS, WHOLE)
    assert judge([replace(WHOLE, low=0.1)], 0.3, 0.2) == (INCONCLUSIVE, None)


def row(**how):
    return replace(
        TriggerRow("t", asr=Rate(0.5, 200, 0.4, 0.6), bounds=[WHOLE], high=0.62, outcome=INCONCLUSIVE), **how
    )


def test_the_gate_and_the_run_judge_by_one_rule():
    """A row without controls once stood out at another threshold, and failed at none."""
    bare = row(bounds=[replace(WHOLE, control=None)])
    assert not fails_at(bare, 0.1, 0.2) and fails_at(row(), 0.1, 0.2) and not fails_at(row(), 0.45, 0.2)
    assert fails_at(row(outcome=FAILS), 0.45, 0.2), "what fails its own run is a backdoor's at any threshold"
    for judged in (bare, row()):
        record = RunRecord("scan", threshold=0.2, triggers=[judged], verdict="no-evidence")
        reached, _ = gate.parse(["asr>=0.1"]).check(record)
        assert bool(reached) == (judge(judged.bounds, judged.high, 0.1)[0] == FAILS)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),  # too few images, and yet far above its controls
        ({"bounds": [replace(WHOLE, control=0.45)]}, False),  # its controls do the same
        ({"bounds": [replace(WHOLE, control=None)]}, False),
        ({"bounds": [replace(WHOLE, value=0.15)]}, False),
        ({"bounds": [replace(WHOLE, value=0.95, control=0.99)]}, True),  # no clean network does so much
        ({"bounds": [replace(WHOLE, value=0.95, control=0.99, certain=None)]}, False),
        ({"bounds": [replace(WHOLE, source=3, value=0.95, control=0.99)]}, False),
        ({"outcome": FAILS, "bounds": []}, True),
        ({"outcome": PASSES}, False),
    ],
)
def test_what_fired_fails_or_would_with_more_images(changed, expected):
    assert fired(row(**changed), 0.2) is expected


def test_records_of_earlier_versions_are_judged_by_what_they_show():
    old = row(bounds=[], high=None, control_rate={"median": 0.1, "highest": 0.2, "count": 19})
    assert fails_at(old, 0.1, 0.2) and not fails_at(replace(old, control_rate=None), 0.1, 0.2)
    assert not fails_at(replace(old, base_rate=Rate(0.3, 200)), 0.1, 0.2), (
        "what goes there unstamped is taken off"
    )
    assert not fails_at(replace(old, asr=Rate()), 0.1, 0.2)


def test_a_report_names_the_class_that_a_trigger_moves():
    source = Bound(3, 0.97, 30, 0.8, 0.05)
    found = row(
        asr=Rate(0.1, 300, 0.07, 0.14), bounds=[replace(WHOLE, low=0.06), source], high=0.15, target=0,
        decisive_source=3, outcome=FAILS, control_rate={"median": 0.0, "highest": 0.02, "count": 19},
    )  # fmt: skip
    assert decisive(found) == source and decisive(row()) is None
    said = evidence(found)
    assert "97.0 % of the 30 images of class 3" in said and "class 0" in said and "5.0 %" in said


@pytest.mark.parametrize(
    ("twin", "median", "low", "above"),
    [
        (0.0, 0.15, 0.78, True),
        (0.0, 0.3, 0.78, False),  # whatever wave moves the network
        (0.69, 0.1, 0.78, False),  # it moves the twin as well
        (0.0, 0.0, 0.19, False),
        (None, 0.0, 0.9, False),
        (0.0, None, 0.9, False),
    ],
)
def test_a_row_is_held_against_a_clean_twin_where_kin_fire_too(twin, median, low, above):
    found = row(
        bounds=[replace(WHOLE, low=low, control=0.8, needed=0.85)],
        control_rate=None if median is None else {"median": median, "highest": 0.8, "count": 19},
        reference_rate=None if twin is None else Rate(twin, 500, twin, twin),
    )
    assert above_twin(found, 0.2) is above


def test_a_report_names_what_the_clean_twin_does():
    said = evidence(row(outcome=FAILS, reference_rate=Rate(0.031, 500, 0.02, 0.05)))
    assert said.endswith(", in the clean twin 3.1 %.")
