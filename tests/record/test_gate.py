import pytest

from bdclean.errors import UsageError
from bdclean.record import gate, rule
from bdclean.record.run import Measure, Problem, Rate, RunRecord, Side, TriggerRow


def row(value, outcome, highest=0.05, low=None, **more):
    low = max(0.0, value - 0.02) if low is None else low
    controls = None if highest is None else {"median": 0.02, "highest": highest, "count": 19}
    asr = Rate(value, 500, low, min(1.0, value + 0.02))
    return TriggerRow("t", "patch", target=0, asr=asr, control_rate=controls, outcome=outcome, **more)


def scanned(*rows, verdict="no-evidence", **more):
    return RunRecord("scan", verdict, triggers=list(rows), **more)


def judge(*expressions):
    return gate.parse(expressions)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "asr",
        "asr>=",
        "asr=0.2",
        "asr>=20",
        "asr<=0.2",
        "speed>=1",
        "asr>=0.2 and x",
        "Inconclusive",
        "asr>=nan",
    ],
)
def test_what_is_no_expression_is_wrong_usage(text):
    with pytest.raises(UsageError):
        judge(text)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean clean_accuracy"):
        judge("clean_acuracy<0.8")


def test_never_contradicts_the_others():
    with pytest.raises(UsageError, match="contradicts"):
        judge("never", "asr>=0.1")


def test_the_threshold_is_the_lowest_asr_asked_for_else_the_default():
    assert judge().threshold == 0.2
    assert judge("inconclusive").threshold == 0.2
    assert judge("asr>=0.5", "asr > 0.1").threshold == 0.1


@pytest.mark.parametrize(
    ("verdict", "code"), [("backdoored", 1), ("suspicious", 1), ("no-evidence", 0), ("not-assessed", 3)]
)
def test_without_expressions_the_verdict_decides(verdict, code):
    assert judge().exit_code(scanned(row(0.01, "passes"), verdict=verdict)) == code


def test_never_hides_verdicts_but_no_failures():
    failing = scanned(row(0.9, "fails"), verdict="backdoored")
    assert judge("never").exit_code(failing) == 0
    assert judge("never").exit_code(scanned(verdict="not-assessed")) == 3
    assert judge("never").exit_code(scanned(problem=Problem("x", 70))) == 70


def test_a_measure_fails_the_run_or_is_missing():
    record = scanned(row(0.01, "passes"), measures=[Measure("clean_accuracy", 0.7, 100, 0.6, 0.8)])
    assert judge("clean_accuracy<0.8").exit_code(record) == 1
    assert judge("clean_accuracy<0.6").exit_code(record) == 0
    assert judge("agreement<0.9").exit_code(record) == 3
    unmeasured = scanned(row(0.01, "passes"), measures=[Measure("agreement", None, 100)])
    assert judge("agreement<0.9").exit_code(unmeasured) == 3


def test_inconclusive_rows_fail_only_on_demand():
    record = scanned(row(0.01, "passes"), row(0.4, "inconclusive", 0.5))
    assert judge().exit_code(record) == 0
    assert judge("inconclusive").exit_code(record) == 1
    assert judge("inconclusive").exit_code(scanned(row(0.01, "passes"))) == 0
    assert judge("inconclusive").exit_code(scanned(row(0.4, "inconclusive"), verdict="not-assessed")) == 1


def test_a_rate_that_controls_reach_too_is_no_backdoor_at_any_threshold():
    blended = scanned(row(0.5, "inconclusive", highest=0.48))
    assert judge("asr>=0.1").check(blended) == ([], [])
    assert judge("asr>=0.1").check(scanned(row(0.15, "passes", highest=0.01)))[0]
    assert judge("asr>=0.1").check(scanned(row(0.97, "passes", highest=0.99)))[0], "certain by itself"


def test_a_row_that_was_not_measured_is_missing_not_passing():
    assert judge("asr>=0.5").exit_code(scanned(row(0.9, "not-measured"))) == 3
    assert judge("asr>=0.5").exit_code(scanned()) == 3


def test_one_bad_source_class_counts():
    worst = {"class": 3, "value": 0.95, "n": 50, "low": 0.86, "high": 0.99}
    assert judge("asr>=0.5").check(scanned(row(0.1, "fails", worst_source=worst)))[0]


def test_excess_is_above_the_base_rate_else_the_controls_median():
    based = row(0.3, "passes", base_rate=Rate(0.25, 500, 0.2, 0.3))
    assert rule.excess(based) == pytest.approx(0.05)
    assert rule.excess(row(0.3, "passes")) == pytest.approx(0.28)
    assert rule.excess(row(0.3, "passes", highest=None)) is None
    assert judge("excess_asr>=0.1").exit_code(scanned(based)) == 0
    assert judge("excess_asr>=0.01").exit_code(scanned(based)) == 1
    assert judge("excess_asr>=0.01").exit_code(scanned(row(0.3, "passes", highest=None))) == 3


def test_a_cleansing_is_judged_by_what_is_after():
    before = Side("backdoored", [], [row(0.99, "fails")])
    after = Side("no-evidence", [Measure("clean_accuracy", 0.8, 100)], [row(0.01, "passes")])
    record = RunRecord("cleanse", "no-evidence", before=before, after=after)
    assert judge("asr>=0.2", "clean_accuracy<0.7").exit_code(record) == 0
    assert judge("clean_accuracy<0.9").exit_code(record) == 1


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0], 0),
        ([2], 2),
        ([0, 0], 0),
        ([0, 3], 3),
        ([3, 1, 0], 1),
        ([1, 70, 3], 70),
        ([0, 2], 3),
        ([1, 130], 130),
    ],
)
def test_several_models_make_one_exit_code(codes, code):
    assert gate.exit_code(codes) == code


def test_at_its_own_threshold_a_row_is_judged_by_its_outcome():
    """A verdict hangs on exact, corrected bounds there; the interval that is shown is neither."""
    near = row(0.225, "inconclusive", highest=0.05, low=0.2002)
    assert judge("asr>=0.2").check(scanned(near, threshold=0.2)) == ([], [])
    assert judge("asr>=0.19").check(scanned(near, threshold=0.2))[0]
    assert judge("asr>=0.2").check(scanned(row(0.4, "fails"), threshold=0.2))[0]


def test_what_goes_there_unstamped_does_not_count_beside_the_controls():
    moved = row(0.58, "inconclusive", highest=0.397, low=0.5687)
    moved.base_rate = Rate(0.3, 500, 0.27, 0.33)
    assert judge("asr>=0.5").check(scanned(moved, threshold=0.2)) == ([], [])


def test_what_is_reached_is_said_in_percent():
    (said,), _ = judge("asr>=0.2").check(scanned(row(0.983, "fails"), threshold=0.2))
    assert said.endswith(" 98.3 %.") and "0.98" not in said


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (row(0.15, "passes", None), 3),  # it may fail at 0.1, which controls would have to say
        (row(0.15, "passes", 0.14), 0),
        (row(0.11, "passes", None), 0),  # the interval reaches 0.1: it cannot fail there
        (row(0.15, "inconclusive", None), 0),
    ],
)
def test_a_stricter_gate_than_the_runs_does_not_pass_what_nobody_held_against_controls(found, code):
    record = scanned(found, threshold=0.2)
    assert judge("asr>=0.1").exit_code(record) == code
    assert judge("asr>=0.2").exit_code(record) == judge("asr>=0.3").exit_code(record) == 0
    if code:
        assert "would have to be held against controls" in judge("asr>=0.1").check(record)[1][0]
