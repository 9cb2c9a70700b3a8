import io
import json
import re
from pathlib import Path

import pytest

from bdclean.cli.progress import Progress, details
from bdclean.errors import UsageError
from bdclean.record.parsing import parse_records
from bdclean.record.run import (
    Bound,
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
)
from bdclean.report import wording
from bdclean.report.formats import choose_format, render
from bdclean.report.rows import evidence

HOSTILE = "m\x1b[31m[red]|</td>\u202e\r\nb*a*`d`\udc80.safetensors"


def row(trigger, value, outcome, seen=False, highest=0.04):
    controls = {"median": 0.02, "highest": highest, "count": 19} if outcome != "passes" else None
    rate = Rate(value, 500, max(0.0, value - 0.02), min(1.0, value + 0.02))
    return TriggerRow(
        trigger, "patch", seen, 0, "screening", 500, rate, None, controls, None, None, outcome, "because"
    )


def scanned(path="m.safetensors", rows=None):
    rows = rows or [
        row("badnets:size=3", 0.98, "fails"),
        row("blend", 0.3, "inconclusive", highest=0.4),
        *(row(f"sig:delta={i}", i / 1000, "passes") for i in range(20)),
    ]
    return RunRecord(
        "scan",
        "backdoored",
        seconds=75.0,
        seed=7,
        device="cpu",
        checkpoint=CheckpointEntry(
            path, "ab" * 32, "safetensors", "resnet20-cifar-a", unread=["proj.weight"]
        ),
        data=DataEntry("images", 1000, unreadable=[{"path": "broken.png", "reason": "not an image"}]),
        threshold=0.2,
        measures=[Measure("clean_accuracy", 0.83, 1000, 0.81, 0.85), Measure("agreement", None, 1000)],
        triggers=rows,
        findings=[Finding("inversion", "suspicious", 5.0, 2.0, None, "a mask of 5 pixels")],
        skipped=[Skipped("accuracy by class", "too few labels")],
        warnings=["folders were not taken as labels"],
    )


def cleansed():
    before = [row("badnets:size=3", 0.98, "fails", True), row("sig", 0.9, "fails")]
    after = [row("badnets:size=3", 0.021, "passes", True), row("sig", 0.032, "passes")]
    return RunRecord(
        "cleanse",
        "no-evidence",
        threshold=0.2,
        checkpoint=CheckpointEntry("m.safetensors", "ab" * 32),
        measures=[Measure("balanced_score", 0.971, 1000)],
        recipe=RecipeEntry("inoculate", "own", {"epochs": 30}, [], ["patch"]),
        before=Side("backdoored", [Measure("clean_accuracy", 0.84, 1000, 0.82, 0.86)], before),
        after=Side("no-evidence", [Measure("clean_accuracy", 0.83, 1000, 0.81, 0.85)], after),
        output=OutputEntry("m.clean.safetensors", "cd" * 32),
    )


def refused():
    problem = Problem("x.pt is a pickle.", 3)
    return RunRecord("scan", outcome="refused", checkpoint=CheckpointEntry("x.pt"), problem=problem)


@pytest.mark.parametrize("form", ["table", "md"])
def test_a_scan_says_all_that_a_reader_must_know(form):
    shown = render([scanned()], form, everything=True).replace("\\", "")
    for words in (
        "backdoored",
        "badnets:size=3 sends 98.0 (96.0-100.0, n 500) % of images to class 0",
        "highest of 19 controls 4.0 %",
        "83.0 (81.0-85.0, n 1000)",
        "Inconclusive",
        "blend: because",
        "Not done",
        "accuracy by class: too few labels",
        "a mask of 5 pixels",
        "broken.png: not an image",
        "proj.weight",
        "folders were not taken as labels",
        "Triggers that were not tried are not excluded",
        "sig:delta=0",
        "1 min 15 s",
    ):
        assert words in shown, words
    assert re.search(r"\b(is|are|looks) (clean|safe)\b", shown) is None


@pytest.mark.parametrize("form", ["table", "md"])
def test_a_cleansing_shows_before_and_after_and_unseen_families_apart(form):
    shown = render([cleansed()], form, everything=True).replace("\\", "")
    unseen, seen = shown.index("did not train on"), shown.index("families that the recipe trained on")
    assert unseen < shown.index("sig", unseen) < seen < shown.index("badnets:size=3", seen)
    assert "84.0 (82.0-86.0, n 1000)" in shown and "83.0 (81.0-85.0, n 1000)" in shown
    assert "98.0 (96.0-100.0, n 500)" in shown and "2.1 (0.1-4.1, n 500)" in shown
    assert "fails -> passes" in shown and "0.971" in shown and "m.clean.safetensors" in shown


@pytest.mark.parametrize("form", ["table", "md"])
def test_several_runs_start_with_their_comparison(form):
    shown = render([scanned(), cleansed(), refused()], form).replace("\\", "")
    scan = shown.index("scan m.safetensors")
    assert shown.index("3 runs") < scan < shown.index("m.clean.safetensors", scan)
    assert "84.0 -> 83.0 (81.0-85.0, n 1000)" in shown
    assert "90.0 -> 3.2 (1.2-5.2, n 500)" in shown, "the unseen family is the worst row"
    assert "refused" in shown and "x.pt is a pickle." in shown


def test_rows_that_do_not_stand_out_are_counted_unless_all_are_asked_for():
    passing = sum(row.outcome == "passes" for row in scanned().triggers)
    assert f"and {passing} that do not stand out (-v lists them)" in render([scanned()], "table")
    assert "do not stand out" not in render([scanned()], "table", everything=True)
    quiet = scanned(rows=[row("a", 0.01, "passes")])
    assert "none stands out; -v lists all 1" in render([quiet], "table")


def test_the_first_ten_lines_answer_what_is_asked_first():
    """On a terminal of 100 columns: verdict, what fired before and after, accuracy, where the file is."""
    lines = render([cleansed()], "table", width=100).split("\n")
    assert all(len(line) <= 100 for line in lines)
    first = "\n".join(lines[:10])
    assert cleansed().verdict in first and "m.clean.safetensors" in first and "84.0 -> 83.0" in first
    assert "fired before" in first and "fires after" in first
    for detail in ("sha256", "settings", "also fits", "worst_class_accuracy"):
        assert detail not in "\n".join(lines)


def test_no_evidence_is_worded_as_that():
    record = scanned(rows=[row("a", 0.01, "passes"), row("b", 0.3, "inconclusive")])
    record.verdict = "no-evidence"
    shown = render([record], "table")
    assert "no-evidence: 1 of 2 triggers tried stay below the threshold of 20 %, 1 inconclusive" in shown


def test_not_assessed_says_what_is_missing():
    record = RunRecord("scan", advice="about 400 images would be needed")
    assert "not-assessed: about 400 images would be needed." in render([record], "table")


@pytest.mark.parametrize("form", ["table", "md", "json", "jsonl"])
@pytest.mark.parametrize("colours", [False, True])
def test_strings_of_strangers_cannot_act(form, colours):
    record = scanned(HOSTILE, [row(HOSTILE, 0.9, "fails")])
    record.findings[0].reason = record.skipped[0].reason = record.warnings[0] = HOSTILE
    shown = render([record, record], form, colours=colours)
    assert "\x1b[31m[" not in shown and "\u202e" not in shown and "\r" not in shown
    shown.encode("utf-8")
    if form in ("json", "jsonl"):
        assert parse_records(shown, "x") == [record, record]
    elif form == "table":
        assert "m\\x1b[31m[red]|</td>\\u202e\\r\\nb*a*`d`\\udc80" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    else:
        assert "</td>" not in shown and "|\\<" in shown.replace("\\|", "|")


def test_markdown_tables_keep_their_columns():
    record = scanned("a|b", [row("file:a|b.png", 0.9, "fails")])
    tables = [line for line in render([record, record], "md").splitlines() if line.startswith("|")]
    counts = []
    for line in tables:
        counts.append(len(re.findall(r"(?<!\\)\|", line)))
        if set(line) == {"|", "-"}:
            width = counts[-1]
            assert counts[-2] == width
    assert counts and max(counts) < 20


def test_without_colours_there_is_no_escape_code_and_no_trailing_blank():
    shown = render([scanned(), cleansed()], "table")
    assert "\x1b" not in shown and not re.search(r"[ \t]$", shown, re.MULTILINE)
    assert "\x1b[" in render([scanned()], "table", colours=True)


def test_a_narrow_terminal_wraps_within_its_width():
    for line in render([scanned(), cleansed()], "table", width=80).splitlines():
        assert len(line) <= 80


def test_json_is_always_one_document_and_jsonl_one_line_a_run():
    document = json.loads(render([scanned()], "json"))
    assert document["schema"] == "bdclean.report/1" and len(document["runs"]) == 1
    lines = render([scanned(), refused()], "jsonl").splitlines()
    assert [json.loads(line)["schema"] for line in lines] == ["bdclean.run/1"] * 2


def test_formats_that_cannot_be_made_are_wrong_usage():
    for name in ("sarf", "TABLE", ""):
        with pytest.raises(UsageError):
            choose_format(name)


def test_the_format_is_what_is_asked_for_else_what_the_file_ends_in():
    assert (
        choose_format(None)
        == choose_format(None, Path("report"))
        == choose_format(None, Path("a.txt"))
        == "table"
    )
    found = [choose_format(None, Path(name)) for name in ("a.html", "A.HTM", "a.md", "a.json", "a.jsonl")]
    assert found == ["html", "html", "md", "json", "jsonl"]
    found = [
        choose_format(None, Path(name)) for name in ("a.sarif", "a.SARIF.json", "a.b.json", "sarif.json")
    ]
    assert found == ["sarif", "sarif", "json", "json"]
    assert choose_format("md", Path("a.html")) == "md"


def test_numbers_in_words():
    assert wording.rate(Rate(0.9731, 500, 0.951, 0.986)) == "97.3 (95.1-98.6, n 500)"
    assert wording.rate(Rate(None, 0)) == wording.rate(None) == "-"
    assert (
        wording.rate(Measure("clean_accuracy_change", -0.01, 100, -0.02, 0.005))
        == "-1.0 (-2.0 to 0.5, n 100)"
    )
    assert [wording.duration(s) for s in (None, 8.24, 185, 7800)] == [
        "-",
        "8.2 s",
        "3 min 05 s",
        "2 h 10 min",
    ]


def test_progress_on_a_pipe_is_an_occasional_plain_line(monkeypatch):
    clock = iter(range(0, 10_000, 6))
    monkeypatch.setattr("bdclean.cli.progress.time.monotonic", lambda: float(next(clock)))
    file = io.StringIO()
    with Progress(file=file) as progress:
        progress.begin("m\x1b[2J")
        for done in range(1, 6):
            progress("images", done, 5, loss=0.25, images_per_second=1234.5)
    lines = file.getvalue().splitlines()
    assert lines == [
        "m\\x1b[2J: images 2/5  loss 0.25  1,234 images/s  18 s left",
        "m\\x1b[2J: images 4/5  loss 0.25  1,234 images/s  6 s left",
    ]


def test_quiet_progress_says_nothing():
    file = io.StringIO()
    with Progress(True, file) as progress:
        progress("images", 1, 1)
    assert file.getvalue() == ""


def test_rate_and_time_left():
    assert details(10, 90, 5.0, {"kept": 3}) == "kept 3  2.0/s  45 s left"
    assert details(0, 90, 0.0, {}) == ""


def test_a_backdoor_of_one_source_is_told_once():
    found = row("badnets:size=3", 0.12, "fails")
    found.bounds = [Bound(None, 0.12, 500, 0.09, 0.02), Bound(11, 1.0, 12, 0.6, 0.0)]
    found.decisive_source = 11
    assert evidence(found).startswith("badnets:size=3 sends 100.0 % (n 12) of the images of class 11, 12.0 (")
    assert evidence(found).count("11") == 1


def test_a_repair_is_headed_by_what_it_wrote():
    """The verdict is the output's; the suspect's stands behind it."""
    record = cleansed()
    shown = render([record], "md").splitlines()
    assert shown[0] == f"## {record.output.path}"
    assert "**no-evidence**: (was: backdoored, " in shown[2]
    table = render([record], "table")
    assert f"made from     {record.checkpoint.path} (abababab)" in table
