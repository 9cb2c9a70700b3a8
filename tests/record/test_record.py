import dataclasses
import json
import math
import os

import pytest

from bdclean.errors import Refused
from bdclean.record.parsing import parse_records
from bdclean.record.run import (
    CheckpointEntry,
    DataEntry,
    Finding,
    Measure,
    OutputEntry,
    Problem,
    Rate,
    RecipeEntry,
    RunRecord,
    Side,
    Skipped,
    TriggerRow,
    record_path,
    report_document,
    write_text,
)
from bdclean.record.schema import schema

CONTRACT = """command verdict outcome started seconds seed versions device precision argv checkpoint data measures
triggers findings pictures confusion feature_map calibration skipped"""


def full():
    row = TriggerRow(
        "badnets:size=3",
        "patch",
        True,
        True,
        0,
        "screening",
        500,
        Rate(0.5, 500, 0.45, 0.55),
        Rate(0.0, 500, 0.0, 0.01),
        {"median": 0.1, "highest": 0.2, "count": 19},
        Rate(0.4, 500, 0.3, 0.5),
        {"class": 3, "value": 0.9, "n": 50, "low": 0.8, "high": 1.0},
        "fails",
        "why",
    )
    return RunRecord(
        "cleanse",
        "backdoored",
        "ran",
        "2026-01-01T00:00:00+00:00",
        1.5,
        0,
        {"bdclean": "0.1.0"},
        "cpu",
        "fp32",
        ["bdclean", "cleanse", "a\udc80b"],
        CheckpointEntry("m.safetensors", "ab" * 32, "safetensors", "resnet18", unread=["proj.weight"]),
        DataEntry("images", 100, unreadable=[{"path": "x.png", "reason": "empty"}]),
        threshold=0.2,
        measures=[Measure("agreement", 0.9, 100, 0.8, 0.95)],
        triggers=[row],
        findings=[Finding("inversion", "suspicious", 5.0, 2.0, None, "a mask of 5 pixels")],
        skipped=[Skipped("accuracy", "no labels")],
        recipe=RecipeEntry("bcu", "2211.12044", {"ratios": [1, 2.5]}),
        before=Side("backdoored", [], [row]),
        after=Side("no-evidence", [Measure("clean_accuracy", 0.8, 100, 0.7, 0.9)], []),
        curve=[{"step": 1, "loss": 0.5}],
        output=OutputEntry("m.clean.safetensors", "cd" * 32),
        problem=Problem("stopped.", 130, "Interrupted"),
    )


def test_json_both_ways_gives_the_same_record():
    for record in (RunRecord("scan"), full()):
        again = RunRecord.from_json(json.loads(record.dump()))
        assert again == record
        assert again.dump() == record.dump()


def test_the_keys_of_the_contract_are_there():
    scanned = RunRecord("scan").to_json()
    assert scanned["schema"] == "bdclean.run/1"
    assert set(CONTRACT.split()) <= set(scanned)
    assert "recipe" not in scanned and "output" not in scanned
    assert {"recipe", "before", "after", "curve", "output"} <= set(RunRecord("cleanse").to_json())


def test_numbers_that_are_not_finite_become_null():
    record = RunRecord("scan", measures=[Measure("agreement", math.nan, 1, -math.inf, math.inf)])
    (measure,) = record.to_json()["measures"]
    assert measure == {"name": "agreement", "value": None, "n": 1, "low": None, "high": None}


def test_keys_of_a_newer_bdclean_are_kept():
    document = {**RunRecord("scan").to_json(), "novel": {"a": 1}}
    record = RunRecord.from_json(document)
    assert record.extra == {"novel": {"a": 1}}
    assert record.to_json() == document


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "other/1"}, "schema is 'other/1'"),
        ({"verdict": "clean"}, "verdict is 'clean'"),
        ({"verdict": None}, "record.verdict is null"),
        ({"seed": True}, "record.seed"),
        ({"seconds": "long"}, "record.seconds is text"),
        ({"measures": {}}, "record.measures is an object, expected"),
        ({"measures": [3]}, r"record.measures\[0\] is a number"),
        ({"measures": [{}]}, r"record.measures\[0\].name is missing"),
        ({"triggers": [{"trigger": "x", "asr": {"value": math.nan}}]}, r"triggers\[0\].asr.value"),
        ({"command": None}, "record.command is null"),
        (
            {"triggers": [{"trigger": "x", "control_rate": {"highest": 10**400}}]},
            "control_rate.highest is a number, expected",
        ),
        ({"curve": [{"step": 1, "loss": math.inf}]}, r"record.curve\[0\].loss is not a finite"),
        ({"pictures": [{"role": "given"}]}, r"record.pictures\[0\].png_base64 is missing"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, words):
    document = {**RunRecord("scan").to_json(), **change}
    with pytest.raises(Refused, match=words):
        RunRecord.from_json(document)


@pytest.mark.parametrize("document", [None, [], 3, "x", {}])
def test_what_is_no_record_is_refused(document):
    with pytest.raises(Refused):
        RunRecord.from_json(document)


def test_runs_reports_and_lines_are_all_read():
    one, two = RunRecord("scan"), full()
    lines = f"{one.dump()}\n\n{two.dump()}\n"
    report = json.dumps(report_document([one, two]), indent=2)
    assert parse_records(one.dump(), "x") == [one]
    assert parse_records(lines, "x") == [one, two]
    assert parse_records(report, "x") == [one, two]
    assert parse_records(json.dumps(report_document([])), "x") == []


@pytest.mark.parametrize(
    "text", ["", "  \n", "{", "not json", '{"schema": 1}', "[" * 100000, '{"a":' * 60 + "1" + "}" * 60]
)
def test_hostile_text_is_refused_naming_its_source(text):
    with pytest.raises(Refused, match=r"^evil\.json"):
        parse_records(text, "evil.json")


def test_a_record_nested_too_deep_is_refused():
    deep = None
    for _ in range(200):
        deep = [deep]
    with pytest.raises(Refused, match="nested"):
        RunRecord.from_json({**RunRecord("scan").to_json(), "confusion": deep})


def test_writing_replaces_whole_files_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "runs" / "one.json"
    RunRecord("scan").write(path)
    full().write(path)
    assert parse_records(path.read_text(), "x") == [full()]
    assert os.listdir(path.parent) == ["one.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "one.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        RunRecord("scan", confusion=object()).write(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["one.json"]
    with pytest.raises(Refused, match="cannot be written"):
        write_text(path / "below", "x")


def test_the_path_of_a_record_in_a_folder(tmp_path):
    assert record_path(tmp_path, "m", "0123456789abcdef") == tmp_path / "m-01234567.json"


@pytest.mark.parametrize(
    ("verdict", "code"), [("backdoored", 1), ("suspicious", 1), ("no-evidence", 0), ("not-assessed", 3)]
)
def test_exit_codes_of_verdicts(verdict, code):
    assert RunRecord("scan", verdict).exit_code == code
    assert RunRecord("scan", verdict, problem=Problem("x", 70)).exit_code == 70


def test_the_schema_names_every_field():
    found = schema()
    names = {f.name for f in dataclasses.fields(RunRecord)} - {"extra"} | {"schema"}
    assert set(found["properties"]) == names
    assert found["properties"]["schema"] == {"const": "bdclean.run/1"}
    assert found["$defs"]["TriggerRow"]["properties"]["asr"] == {"$ref": "#/$defs/Rate"}
    json.dumps(found)
