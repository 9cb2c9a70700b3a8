"""SARIF by the published schema, what code scanning needs beside that, and what is the same in every run."""

import json
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from jsonschema import Draft4Validator

from bdclean.cli.main import run
from bdclean.record.run import (
    CheckpointEntry,
    Finding,
    OutputEntry,
    Problem,
    Rate,
    RecipeEntry,
    RunRecord,
    Side,
    Skipped,
    TriggerRow,
)
from bdclean.registry import DETECTORS, FAMILIES
from bdclean.report import sarif

PUBLISHED = Draft4Validator(
    json.loads((Path(__file__).parent / "sarif" / "sarif-schema-2.1.0.json").read_text(encoding="utf-8"))
)
SAMPLES = Path(__file__).parents[2] / "sample_models"
HOSTILE = "m\x1b[31m[red](http://x) {0}</td>\u202e\r\nb*a*`d`\udc80\ud800.safetensors"


def row(trigger, value, outcome, family="patch", target=0):
    rate = Rate(value, 500, max(0.0, value - 0.02), min(1.0, value + 0.02))
    controls = {"median": 0.02, "highest": 0.04, "count": 19}
    return TriggerRow(
        trigger, family, target=target, asr=rate, control_rate=controls, outcome=outcome, reason="few images"
    )


def scanned(path="models/m.safetensors", rows=None, **more):
    rows = rows or [
        row("badnets:size=3", 0.98, "fails"),
        row("blend", 0.3, "inconclusive", "blend"),
        *(row(f"sig:delta={i}", i / 1000, "passes", "wave") for i in range(5)),
        TriggerRow("ctrl", "wave", reason="grey images"),
    ]
    more = {
        "versions": {"bdclean": "0.0.9"}, "started": "2026-11-20T10:00:00+02:00", "seconds": 90.5, "threshold": 0.2,
        "warnings": ["folders were not taken as labels"], "skipped": [Skipped("decree", "no encoder")], **more,
    }  # fmt: skip
    return RunRecord("scan", "backdoored", checkpoint=CheckpointEntry(path, "ab" * 32), triggers=rows, **more)


def suspicious(*findings):
    return replace(scanned(rows=[row("sig", 0.01, "passes")]), verdict="suspicious", findings=list(findings))


def cleansed():
    return RunRecord(
        "cleanse",
        "no-evidence",
        threshold=0.2,
        checkpoint=CheckpointEntry("m.safetensors", "ab" * 32),
        recipe=RecipeEntry("inoculate"),
        before=Side("backdoored", [], [row("badnets:size=3", 0.98, "fails")]),
        after=Side("no-evidence", [], [row("badnets:size=3", 0.02, "passes")]),
        output=OutputEntry("m.clean.safetensors", "cd" * 32),
    )


def refused():
    problem = Problem("x.pt is a pickle.", 3)
    return RunRecord("scan", outcome="refused", checkpoint=CheckpointEntry("x.pt"), problem=problem)


def not_assessed():
    return RunRecord("scan", checkpoint=CheckpointEntry("few.safetensors"), advice="give 200 images")


def shown(*records):
    log = json.loads(sarif.render(records))
    PUBLISHED.validate(log)
    (only,) = log["runs"]
    return only


def fingerprints(*records):
    found = [each["partialFingerprints"]["primaryLocationLineHash"] for each in shown(*records)["results"]]
    assert len(set(found)) == len(found)
    return found


ALL = [
    scanned(),
    cleansed(),
    refused(),
    not_assessed(),
    scanned(HOSTILE, [row(HOSTILE, 0.9, "fails", HOSTILE)]),
]


def test_the_schema_that_is_shipped_refuses_what_is_no_sarif():
    assert PUBLISHED.schema["id"].endswith("/errata01/os/schemas/sarif-schema-2.1.0.json")
    log = json.loads(sarif.render(ALL))
    log["runs"][0]["results"][0]["level"] = "fatal"
    assert not PUBLISHED.is_valid(log)


def test_what_code_scanning_requires_is_there():
    found = shown(*ALL)
    driver = found["tool"]["driver"]
    assert driver["name"] == "bdclean" and driver["semanticVersion"]
    for rule in driver["rules"]:
        for name in ("shortDescription", "fullDescription"):
            assert 0 < len(rule[name]["text"]) <= 1024
        assert len(rule["id"]) <= 255 and rule["help"]["text"] and rule["help"]["markdown"]
        assert "security" in rule["properties"]["tags"]
        assert "security-severity" not in rule["properties"], (
            "inconclusive rows would rank as high as failing ones"
        )
    assert found["results"]
    for result in found["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"] and re.fullmatch(
            "[0-9a-f]{16}:[1-9][0-9]*", result["partialFingerprints"]["primaryLocationLineHash"]
        )
        (location,) = result["locations"]
        place = location["physicalLocation"]
        assert place["region"]["startLine"] == 1
        assert (
            found["artifacts"][place["artifactLocation"]["index"]]["location"]["uri"]
            == place["artifactLocation"]["uri"]
        )
        assert place["artifactLocation"]["uriBaseId"] in found["originalUriBaseIds"]


def test_there_is_one_rule_for_each_family_and_each_detector_whatever_was_found():
    from bdclean.measuring import pull

    names = [rule["id"] for rule in shown()["tool"]["driver"]["rules"]]
    assert len(set(names)) == len(names)
    assert {name.partition("/")[2] for name in names if name.startswith("trigger/")} == {*FAMILIES, "other"}
    assert {n.partition("/")[2] for n in names if n.startswith("detector/")} == {
        *DETECTORS,
        pull.NAME,
        "other",
    }
    assert names == [rule["id"] for rule in shown(*ALL)["tool"]["driver"]["rules"]]


def test_levels_follow_the_outcomes_and_what_passes_is_no_result():
    found = [(each["ruleId"], each["level"]) for each in shown(scanned())["results"]]
    assert found == [("trigger/patch", "error"), ("trigger/blend", "note")]
    firing = Finding("inversion", "suspicious", reason="a mask of 5 pixels")
    quiet = Finding("mm-bd", "no-outlier", reason="usual")
    (only,) = shown(suspicious(quiet, firing))["results"]
    assert (only["ruleId"], only["level"]) == ("detector/inversion", "warning")
    assert "5 pixels" in only["message"]["text"]


def test_a_message_says_the_rate_its_interval_and_the_controls():
    first, second = (each["message"]["text"] for each in shown(scanned())["results"])
    assert "badnets:size=3 sends 98.0 (96.0-100.0, n 500) % of images to class 0" in first
    assert "highest of 19 controls 4.0 %" in first
    assert second.startswith("Inconclusive: blend ") and second.endswith("Few images.")


@pytest.mark.parametrize("record", [refused(), not_assessed()])
def test_what_was_not_assessed_does_not_read_as_nothing_found(record):
    found = shown(scanned(), record)
    first, second = found["invocations"]
    assert first["executionSuccessful"] and not second["executionSuccessful"]
    (note,) = second["toolExecutionNotifications"]
    assert note["level"] == "error"
    assert note["message"]["text"] in ("refused: x.pt is a pickle.", "not-assessed: give 200 images.")
    assert {each["provenance"]["invocationIndex"] for each in found["results"]} == {0}


def test_what_was_not_done_is_told_beside_what_was_found():
    (found,) = shown(scanned())["invocations"]
    notes = {
        each["descriptor"]["id"]: (each["level"], each["message"]["text"])
        for each in found["toolExecutionNotifications"]
    }
    assert notes["warning"] == ("warning", "folders were not taken as labels")
    assert notes["skipped"] == ("note", "decree: no encoder")
    assert notes["not-measured"] == ("note", "ctrl: grey images")
    assert (
        found["startTimeUtc"] == "2026-11-20T08:00:00.000Z"
        and found["endTimeUtc"] == "2026-11-20T08:01:30.500Z"
    )
    assert found["properties"]["version"] == "0.0.9"


@pytest.mark.parametrize("started", ["", "yesterday", "2026-11-20T10:00:00", "9999-12-31T23:59:59+00:00"])
def test_a_time_that_says_nothing_is_left_out(started):
    (found,) = shown(scanned(started=started, seconds=1e200))["invocations"]
    assert "startTimeUtc" not in found


def test_no_evidence_says_that_triggers_that_were_not_tried_are_not_excluded():
    found = shown(cleansed())
    assert found["results"] == []
    (note,) = found["invocations"][0]["toolExecutionNotifications"]
    assert note["level"] == "note" and "not tried are not excluded" in note["message"]["text"]
    assert "was: backdoored" in note["message"]["text"]


@pytest.mark.parametrize(("verdict", "level"), [("backdoored", "error"), ("suspicious", "warning")])
def test_a_record_that_lacks_the_rows_of_its_verdict_is_a_result(verdict, level):
    rows = [row("blend", 0.3, "inconclusive", "blend")]
    *_, last = shown(replace(scanned(rows=rows), verdict=verdict))["results"]
    assert (last["ruleId"], last["level"]) == ("verdict", level)


def test_of_a_cleansing_the_results_are_the_written_files():
    still = cleansed()
    still.verdict = still.after.verdict = "backdoored"
    still.after.triggers = [row("badnets:size=3", 0.95, "fails")]
    found = shown(still)
    assert [each["location"]["uri"] for each in found["artifacts"]] == ["m.clean.safetensors"]
    assert found["artifacts"][0]["hashes"]["sha-256"] == "cd" * 32
    assert found["results"][0]["level"] == "error"


# --- fingerprints -------------------------------------------------------------------------------------------


def test_fingerprints_are_the_same_in_every_run_on_the_same_file():
    again = scanned(
        "./models//m.safetensors", started="2027-01-01T00:00:00+00:00", versions={"bdclean": "9.9"}
    )
    again.triggers = [
        row("sig:delta=99", 0.5, "fails", "wave"),
        row("blend", 0.97, "fails", "blend"),
        row("badnets:size=3", 0.9, "fails"),
    ]
    assert fingerprints(scanned()) == fingerprints(again)[:0:-1]
    typed_whole = scanned(str(Path("models/m.safetensors").absolute()))
    assert fingerprints(typed_whole) == fingerprints(scanned())


def test_fingerprints_differ_by_file_bytes_trigger_and_target():
    rows = [row("badnets:size=3", 0.98, "fails"), row("badnets:size=4", 0.98, "fails")]
    rows += [
        row("badnets:size=3", 0.98, "fails", target=1),
        row("badnets:size=3", 0.98, "fails", target="next"),
    ]
    other_place, other_bytes = scanned("n.safetensors", rows), scanned(rows=rows)
    other_bytes.checkpoint.sha256 = "cd" * 32
    assert len(fingerprints(scanned(rows=rows), other_place, other_bytes)) == 12


def test_a_finding_keeps_its_fingerprint_whatever_else_fires():
    mask, smooth = (
        Finding("inversion", "suspicious", reason=reason) for reason in ("a mask", "a smooth one")
    )
    pulls = [Finding("pull", "suspicious", reason=f"p {n}", trigger=f"badnets:size={n}") for n in (3, 4)]
    every = fingerprints(suspicious(mask, smooth, *pulls))
    calm = replace(mask, verdict="no-outlier"), replace(pulls[0], verdict="usual")
    assert fingerprints(suspicious(calm[0], smooth, pulls[1], calm[1])) == [every[1], every[3]]
    assert fingerprints(suspicious(pulls[1])) == [every[3]]
    assert fingerprints(suspicious(replace(pulls[1], reason="p 0.004", score=0.4))) == [every[3]]


# --- strangers' text ----------------------------------------------------------------------------------------


def test_strangers_text_is_neither_markup_nor_a_placeholder():
    text = sarif.render(
        [scanned(HOSTILE, [row(HOSTILE, 0.9, "fails", HOSTILE, HOSTILE)], warnings=[HOSTILE])]
    )
    log = json.loads(text)
    PUBLISHED.validate(log)
    assert text.isascii()
    text.encode("utf-8")

    (found,) = log["runs"]
    notes = found["invocations"][0]["toolExecutionNotifications"]
    for each in (*found["results"], *notes):
        said = each["message"]["text"]
        assert said.isprintable() and "](" not in said
        assert not re.search(r"[{}]", said.replace("{{", "").replace("}}", ""))
    (result,) = found["results"]
    assert result["ruleId"] == "trigger/other"
    assert "{{0}}" in result["message"]["text"] and "\\x1b" in result["message"]["text"]


def test_a_long_name_is_cut():
    (result,) = shown(scanned(rows=[row("file:" + "a" * 9000, 0.9, "fails")]))["results"]
    assert len(result["message"]["text"]) <= 1024 and result["message"]["text"].endswith(" ...")


@pytest.mark.parametrize("sha256", ["", "../x", "AB" * 32, "ab"])
def test_what_is_no_digest_is_not_called_one(sha256):
    record = scanned()
    record.checkpoint.sha256 = sha256
    assert all("hashes" not in each for each in shown(record)["artifacts"])


def test_a_record_without_a_path_has_no_artifact():
    found = shown(RunRecord("scan", outcome="refused", problem=Problem("no.", 3)))
    assert found["artifacts"] == [] and not found["invocations"][0]["executionSuccessful"]


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("m.safetensors", "m.safetensors"),
        ("./a//b/../m.safetensors", "a/m.safetensors"),
        ("../m.safetensors", "../m.safetensors"),
        ("a b/ü%20#?.safetensors", "a%20b/%C3%BC%2520%23%3F.safetensors"),
        ("javascript:alert(1)", "javascript%3Aalert%281%29"),
        ("a\nb\udcff\ud800", "a%0Ab%ED%B3%BF%ED%A0%80"),
        ("a\udcff", "a%FF"),
        ("models/", "models"),
        ("back\\slash", "back%5Cslash"),
        ("/models/m n.safetensors", "file:///models/m%20n.safetensors"),
        ("//models/m", "file:///models/m"),
        ("C:\\models\\m n.safetensors", "file:///C:/models/m%20n.safetensors"),
        ("c:/models/m", "file:///c:/models/m"),
        ("\\\\server\\share\\m", "file://server/share/m"),
    ],
)
def test_a_path_becomes_a_uri(path, uri):
    found, relative = sarif.uri_of(path)
    assert found == uri and relative == (not uri.startswith("file:"))
    parts = urlsplit(found)
    assert parts.scheme in ("", "file") and not parts.query and not parts.fragment
    assert re.fullmatch(r"[\w.~%/:()-]*", found, re.ASCII)


def test_an_absolute_path_in_the_working_directory_is_relative_to_it(tmp_path):
    assert sarif.uri_of(str(tmp_path / "a b" / "m.safetensors")) == ("a%20b/m.safetensors", True)
    beside = f"{tmp_path}-beside/m.safetensors"
    assert sarif.uri_of(beside) == (f"file://{beside}", False)
    assert unquote(sarif.uri_of(str(tmp_path / "m%"))[0]) == "m%"


# --- the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["audit.sarif", "audit.SARIF", "audit.sarif.json"])
def test_report_writes_sarif_where_the_name_ends_so(name, tmp_path):
    scanned().write(tmp_path / "a.json")
    refused().write(tmp_path / "b.json")
    assert run(["report", "a.json", "b.json", "--out", name]) == 0
    log = json.loads((tmp_path / name).read_text(encoding="ascii"))
    PUBLISHED.validate(log)
    assert len(log["runs"][0]["invocations"]) == 2


def test_sarif_on_standard_output_is_one_document(capsys, tmp_path):
    scanned().write(tmp_path / "a.json")
    assert run(["report", "a.json", "--format", "sarif", "--fail-on", "asr>=0.2"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["version"] == "2.1.0"


@pytest.mark.parametrize("command", ["scan", "cleanse"])
def test_a_refused_run_prints_an_unsuccessful_invocation(command, capsys, tmp_path):
    (tmp_path / "images").mkdir()
    line = [command, "missing.safetensors", "--data", "images", "--format", "sarif"]
    assert run(line) == 3
    log = json.loads(capsys.readouterr().out)
    PUBLISHED.validate(log)
    (found,) = log["runs"][0]["invocations"]
    assert not found["executionSuccessful"]
    assert "missing.safetensors does not exist" in found["toolExecutionNotifications"][0]["message"]["text"]


@pytest.mark.slow
def test_two_scans_of_the_same_file_with_other_seeds_have_the_same_fingerprints(capsys, tmp_path):
    model = tmp_path / "signs.safetensors"
    model.symlink_to(SAMPLES / "signs-badnets.safetensors")
    line = ["--data", str(SAMPLES / "images" / "unlabeled"), "--format", "sarif", "--limit", "400", "-q"]
    line += ["--trigger", "badnets:size=3,position=bottom-right,pattern=checker", "--target", "0"]
    found = []
    for path, seed in ((model.name, "0"), (str(model), "1")):
        assert run(["scan", path, *line, "--seed", seed]) == 1
        log = json.loads(capsys.readouterr().out)
        PUBLISHED.validate(log)
        found.append([each["partialFingerprints"] for each in log["runs"][0]["results"]])
        assert log["runs"][0]["results"][0]["level"] == "error"
    assert found[0] == found[1]
