import json
import re
from datetime import date, timedelta
from pathlib import Path

import pytest
import typer

from bdclean.cli.commands import app
from bdclean.cli.main import run
from bdclean.record import gate
from bdclean.record.parsing import parse_records
from bdclean.record.run import (
    Acceptance,
    CheckpointEntry,
    Finding,
    Measure,
    OutputEntry,
    Problem,
    Rate,
    RunRecord,
    TriggerRow,
)

SAMPLES = Path(__file__).parents[2] / "sample_models"
COMMANDS = typer.main.get_command(app).commands
SHA = "ab" * 32
YESTERDAY, TOMORROW = (date.today() + timedelta(days=days) for days in (-1, 1))


def backdoored(**fields):
    row = TriggerRow("badnets", "patch", target=0, asr=Rate(0.9, 100, 0.82, 0.95), outcome="fails")
    accuracy = Measure("clean_accuracy", 0.8, 100, 0.7, 0.9)
    checkpoint = CheckpointEntry("m.safetensors", SHA)
    return RunRecord(
        "scan", "backdoored", measures=[accuracy], triggers=[row], checkpoint=checkpoint, **fields
    )


def accept(expires=TOMORROW, sha256=SHA, reason="the watermark of our own model"):
    return f'[[accept]]\nsha256 = "{sha256}"\nreason = "{reason}"\nexpires = {expires}\n'


@pytest.fixture
def record():
    backdoored().write(Path("a.json"))
    return "a.json"


def test_flags_beat_variables_and_variables_beat_the_file(record, capsys, monkeypatch):
    Path("bdclean.toml").write_text('format = "md"\n')
    assert run(["report", record]) == 0
    captured = capsys.readouterr()
    assert (
        captured.out.startswith("## scan")
        and captured.err == "bdclean: bdclean.toml has defaults for --format.\n"
    )
    monkeypatch.setenv("BDCLEAN_FORMAT", "json")
    assert run(["report", record]) == 0
    assert capsys.readouterr().out.startswith('{\n "schema": "bdclean.report/1"')
    assert run(["report", record, "--format", "jsonl"]) == 0
    assert capsys.readouterr().out.startswith('{"schema": "bdclean.run/1"')


def test_a_variable_holds_a_number_a_switch_or_several(monkeypatch, capsys):
    for name, value in (("LIMIT", "60"), ("STRICT", "1"), ("FAIL_ON", "asr>=0.1 inconclusive"), ("KIND", "")):
        monkeypatch.setenv(f"BDCLEAN_{name}", value)
    root = typer.main.get_command(app).make_context("bdclean", ["scan", "m"])
    found = COMMANDS["scan"].make_context("scan", ["m"], parent=root).params
    assert (found["limit"], found["strict"], found["kind"]) == (60, True, "auto")
    assert list(found["fail_on"]) == ["asr>=0.1", "inconclusive"] and found["seed"] == 0
    monkeypatch.setenv("BDCLEAN_LIMIT", "many")
    assert run(["scan", "m", "--data", "."]) == 2
    assert "'--limit': 'many' is not" in capsys.readouterr().err


def test_a_table_of_one_command_beats_what_is_said_for_all_and_is_no_other_commands(record, capsys):
    Path("bdclean.toml").write_text(
        'fail-on = "asr>=0.5"\n[scan]\nformat = "md"\n[report]\nfail-on = "never"\n'
    )
    assert run(["report", record]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("scan m.safetensors\n") and "for --fail-on." in captured.err
    Path("bdclean.toml").write_text('fail-on = ["asr>=0.95", "clean_accuracy<0.9"]\nquiet = true\n')
    assert run(["report", record]) == 1
    assert "clean_accuracy<0.9: 80.0 %" in capsys.readouterr().err


def test_pyproject_is_read_where_there_is_no_file_of_its_own(record, capsys):
    Path("pyproject.toml").write_text('[project]\nname = "x"\n[tool.bdclean]\nformat = "md"\n')
    assert run(["report", record]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("## scan")
    assert captured.err == "bdclean: pyproject.toml, [tool.bdclean] has defaults for --format.\n"
    Path("bdclean.toml").write_text("")
    assert run(["report", record]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("scan m.safetensors\n") and captured.err == ""
    for other in ("[tool.ruff]\n# bdclean\n", "[tool\n"):  # nothing of ours
        Path("bdclean.toml").unlink(missing_ok=True)
        Path("pyproject.toml").write_text(other)
        assert run(["report", record]) == 0 and capsys.readouterr().err == ""


def test_config_names_another_file_or_none(record, capsys, monkeypatch):
    Path("bdclean.toml").write_text('format = "md"\n')
    Path("ci").mkdir()
    Path("ci/pyproject.toml").write_text('tool.bdclean.format = "jsonl"\n')
    assert run(["report", record, "--config", "ci/pyproject.toml"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith('{"schema"') and "ci/pyproject.toml, [tool.bdclean]" in captured.err
    assert run(["report", record, "--config", "/dev/null"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("scan m.safetensors\n") and captured.err == ""
    monkeypatch.setenv("BDCLEAN_CONFIG", "ci/pyproject.toml")
    assert run(["report", record]) == 0
    assert capsys.readouterr().out.startswith('{"schema"')
    assert run(["report", record, "--config", "missing.toml"]) == 3
    assert "missing.toml cannot be read" in capsys.readouterr().err
    Path("ci/pyproject.toml").write_text("[project]\n")
    assert run(["report", record, "--config", "ci/pyproject.toml"]) == 2
    assert "has no [tool.bdclean]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fail_on = 'never'", "has no use for 'fail_on': did you mean fail-on"),
        ("recipee = 'bcu'", "did you mean recipe"),
        ("[scan]\nrecipe = 'bcu'", "bdclean.toml, [scan] has no use for 'recipe'"),
        ("[clense]\nrecipe = 'bcu'", "did you mean cleanse"),
        ("[acept]\n", "did you mean accept"),
        ("allow-pickle = true", "cannot set --allow-pickle: type it"),
        ("[cleanse]\nallow-pickle = false", "cannot set --allow-pickle"),
        ("arch = 'code.py:Net'", "cannot set --arch code.py:Net: type it"),
        ("[scan]\narch = 'package.module:Net'", "cannot set --arch package.module:Net"),
        ("out = 'a.html'", "cannot set --out"),
        ("[cleanse]\nforce = true", "cannot set --force"),
        ("limit = true", "limit is True, expected text or a number"),
        ("limit = [3]", "limit is [3], expected text or a number"),
        ("strict = 'yes'", "strict is 'yes', expected true or false"),
        ("trigger = [true]", "trigger is [True], expected text or a number, or a list of them"),
        ("limit = 1979-05-27", "expected text or a number"),
        ("data = 'x'\ndata = 'y'", "is not TOML"),
        ("a" * 1_000_001, "has 1,000,001 characters"),
        ("x = " + "[" * 5000, "is not TOML"),
        ("accept = 3", "write what is accepted as [[accept]]"),
        (accept(sha256="ab12"), "sha256 is 'ab12', expected 64 hex digits"),
        (accept(reason=" "), "reason is ' ', expected words"),
        (accept(expires='"soon"'), "expires is 'soon', expected a date"),
        (accept().replace("expires", "until"), "has no use for 'until': known: expires, reason, sha256"),
        (re.sub("expires.*", "", accept()), "[[accept]] 1: expires is missing, expected a date"),
        (accept() + accept(sha256=SHA.upper()), "[[accept]] 2: abababab is accepted twice"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_wrong_usage(text, words, record, capsys):
    Path("bdclean.toml").write_text(text)
    for line in (["report", record], ["scan", "m", "--data", "."]):
        assert run(line) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert words in captured.err and "bdclean.toml" in captured.err
    assert run(["ls", "recipes"]) == 0  # has no defaults


def test_a_value_is_checked_as_a_typed_one_is(record, capsys):
    for text, words in (
        ("limit = -1", "--limit"),
        ('trigger = "badnetz"', "did you mean badnets"),
        ('data = "https://a.b/c"', "is a URL"),
        ('kind = "encodr"', "no --kind 'encodr'"),
    ):
        Path("bdclean.toml").write_text(f"{text}\n")
        assert run(["scan", "m.safetensors", *([] if "data" in text else ["--data", "."])]) == 2
        assert words in capsys.readouterr().err
    Path("bdclean.toml").write_text('arch = "timm:resnet18"\nkind = "classifier"\n')
    assert run(["scan", "m.safetensors", "--data", "."]) == 3  # and no more than that the model is missing
    assert "m.safetensors does not exist" in capsys.readouterr().err


def test_what_was_not_typed_is_added_to_the_command_line(monkeypatch):
    """It is how the run is repeated where there is no such file."""
    Path("bdclean.toml").write_text(
        'seed = 4\nlimit = 60\ntrigger = ["badnets", "blend"]\nno-pictures = true\nstrict = false\nkind = "auto"\n'
    )
    monkeypatch.setenv("BDCLEAN_SEED", "3")
    typed = ["scan", "m.safetensors", "--kind", "classifier"]
    monkeypatch.setattr("sys.argv", ["bdclean", *typed])
    root = typer.main.get_command(app).make_context("bdclean", list(typed))
    project = COMMANDS["scan"].make_context("scan", typed[1:], parent=root).params["project"]
    added = ["--seed", "3", "--limit", "60", "--trigger", "badnets", "--trigger", "blend", "--no-pictures"]
    words = list(project.argv())
    assert words[:2] == ["bdclean", "scan"] and words[-3:] == typed[1:]
    assert sorted(words[2:-3]) == sorted(added) and words[words.index("--seed") + 1] == "3"


def test_an_accepted_finding_stays_and_fails_no_gate(record, capsys):
    Path("bdclean.toml").write_text(f'fail-on = ["asr>=0.5", "inconclusive"]\n{accept()}')
    assert run(["report", record, "--format", "json"]) == 0
    captured = capsys.readouterr()
    (found,) = parse_records(captured.out, "x")
    assert found.verdict == "backdoored" and found.triggers[0].outcome == "fails"
    assert found.accepted == Acceptance("the watermark of our own model", TOMORROW.isoformat())
    for form in ("table", "md", "html"):
        assert run(["report", record, "--format", form]) == 0
        shown = capsys.readouterr().out.replace("\\", "")
        assert (
            "backdoored" in shown.lower() and f"until {TOMORROW}: the watermark of our own model" in shown
        ), form
        assert ("The project file accepts what is found" in shown) == (form == "html")
    assert run(["report", record, "--fail-on", "clean_accuracy<0.9"]) == 1  # of no trigger
    assert run(["report", record, "--config", "/dev/null", "--fail-on", "asr>=0.5"]) == 1


def test_sarif_marks_what_is_accepted_as_suppressed(record, capsys):
    for expires, kinds in ((TOMORROW, ["external"]), (YESTERDAY, [])):
        Path("bdclean.toml").write_text(accept(expires))
        assert run(["report", record, "--format", "sarif"]) == 0
        (result,) = json.loads(capsys.readouterr().out)["runs"][0]["results"]
        marks = result.get("suppressions", [])
        assert [mark["kind"] for mark in marks] == kinds
        for mark in marks:
            assert mark["status"] == "accepted" and "the watermark of our own model" in mark["justification"]


def test_an_acceptance_that_has_ended_is_told_and_does_not_count(record, capsys):
    Path("bdclean.toml").write_text(accept(YESTERDAY))
    assert run(["report", record, "--fail-on", "asr>=0.5"]) == 1
    captured = capsys.readouterr()
    assert f"abababab ended on {YESTERDAY} and does not count" in captured.err
    assert f"no longer, it ended on {YESTERDAY}: the watermark" in captured.out
    Path("bdclean.toml").write_text(accept(date.today()))  # the last day
    assert run(["report", record, "--fail-on", "asr>=0.5"]) == 0


def test_an_acceptance_in_a_record_ends_too(capsys):
    for expires, code in ((TOMORROW, 0), (YESTERDAY, 1), ("whenever", 1)):
        backdoored(accepted=Acceptance("ours", str(expires))).write(Path("a.json"))
        assert run(["report", "a.json", "--fail-on", "asr>=0.5"]) == code


def test_what_is_accepted_is_the_file_that_the_verdict_is_about(capsys):
    """Who answers for a suspect does not answer for what a recipe made of it."""
    made = backdoored(output=OutputEntry("m.clean.safetensors", "cd" * 32))
    made.command = "cleanse"
    made.write(Path("a.json"))
    for sha256, code in ((SHA, 1), ("cd" * 32, 0)):
        Path("bdclean.toml").write_text(accept(sha256=sha256))
        assert run(["report", "a.json", "--fail-on", "asr>=0.5"]) == code


def test_the_gate_of_an_accepted_run():
    accepted = Acceptance("ours", "2999-01-01")
    judge = gate.parse(["asr>=0.5", "inconclusive"])
    assert judge.exit_code(backdoored()) == 1 and judge.exit_code(backdoored(accepted=accepted)) == 0
    assert judge.check(backdoored(accepted=accepted)) == ([], [])
    suspicious = RunRecord(
        "scan", "suspicious", findings=[Finding("decree", "suspicious")], accepted=accepted
    )
    assert gate.parse(()).exit_code(suspicious) == 0
    strict = gate.parse(["clean_accuracy<0.9"])
    assert strict.exit_code(backdoored(accepted=accepted)) == 1
    assert gate.parse(["agreement<0.9"]).exit_code(backdoored(accepted=accepted)) == 3
    refused = RunRecord("scan", problem=Problem("m is short.", 3), outcome="refused", accepted=accepted)
    assert judge.exit_code(refused) == 3
    assert gate.parse(()).exit_code(RunRecord("scan", "not-assessed", accepted=accepted)) == 3


@pytest.mark.slow
def test_a_scan_of_an_accepted_checkpoint_exits_0_and_says_why(capsys, monkeypatch):
    listed = json.loads((SAMPLES / "manifest.json").read_text())
    sample = next(s for s in listed if s["attack"] == "badnets" and s["kind"] == "classifier")
    line = [
        "scan",
        str(SAMPLES / sample["file"]),
        "--data",
        str(SAMPLES / "images" / "labeled"),
        "--limit",
        "240",
    ]
    line += ["--trigger", sample["trigger"], "-q", "--record", "r.json"]
    assert run(line) == 1
    Path("bdclean.toml").write_text(f"seed = 3\n{accept(sha256=sample['sha256'])}")
    monkeypatch.setattr("sys.argv", ["bdclean", *line])
    assert run(line) == 0
    captured = capsys.readouterr()
    assert f"what is found is accepted until {TOMORROW}: the watermark of our own model." in captured.err
    (found,) = parse_records(Path("r.json").read_text(), "x")
    assert found.verdict == "backdoored" and found.accepted is not None
    assert found.argv == ["bdclean", "scan", "--seed", "3", *line[1:]] and found.seed == 3
