import html
import io
import json
import re
import shlex
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
from bdclean.report.page.bars import groups
from bdclean.report.rows import evidence

HOSTILE = "m\x1b[31m[red]|</td>\u202e\r\nb*a*`d`\udc80.safetensors"


def row(trigger, value, outcome, seen=False, highest=0.04, told=False):
    controls = {"median": 0.02, "highest": highest, "count": 19} if outcome != "passes" else None
    rate = Rate(value, 500, max(0.0, value - 0.02), min(1.0, value + 0.02))
    return TriggerRow(
        trigger,
        "patch",
        seen,
        told,
        0,
        "screening",
        500,
        rate,
        None,
        controls,
        None,
        None,
        outcome,
        "because",
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
        "83.0 % (81.0-85.0, n 1000)",
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
    assert "84.0 % (82.0-86.0, n 1000)" in shown and "83.0 % (81.0-85.0, n 1000)" in shown
    assert "98.0 (96.0-100.0, n 500)" in shown and "2.1 (0.1-4.1, n 500)" in shown
    assert "fails -> passes" in shown and "0.971" in shown and "m.clean.safetensors" in shown


@pytest.mark.parametrize("form", ["table", "md"])
def test_triggers_that_the_recipe_was_told_stand_apart_from_their_family(form):
    record = cleansed()
    record.after.triggers.append(row("badnets:size=5", 0.01, "passes", True, told=True))
    shown = render([record], form, width=200, everything=True).replace("\\", "")
    titles = (
        "did not train on",
        "families that the recipe trained on",
        "the recipe was told, and trained on",
    )
    places = [shown.index(words) for words in titles]
    assert places == sorted(places)
    assert shown.rindex("badnets:size=5") > places[2] > shown.rindex("badnets:size=3") > places[1]


def test_a_rate_of_a_trigger_that_the_recipe_was_told_says_so_at_the_head():
    record = cleansed()
    for side in (record.before, record.after):
        side.triggers = [row("badnets:size=3", 0.98 if side is record.before else 0.02, "fails", told=True)]
    record.after.triggers[0].outcome = "passes"
    assert "badnets:size=3, which the recipe trained on, sends 2.0" in render([record], "table", width=300)


def test_in_a_comparison_it_says_how_much_a_recipe_knew():
    record = cleansed()
    record.before.triggers.append(row("badnets:size=5", 0.97, "fails", True))
    record.after.triggers.append(row("badnets:size=5", 0.01, "passes", True, told=True))
    lines = [line.split("|") for line in render([record, scanned()], "md").replace("\\", "").splitlines()]
    known = {cells[1].strip(): cells[2].strip() for cells in reversed(lines) if len(cells) > 4}
    assert (known["badnets:size=5"], known["badnets:size=3"], known["sig"]) == ("unlearned", "seen", "")


@pytest.mark.parametrize("form", ["table", "md"])
def test_several_runs_start_with_their_comparison_the_worst_first(form):
    shown = render([refused(), cleansed(), scanned()], form).replace("\\", "")
    assert shown == render([scanned(), refused(), cleansed()], form).replace("\\", "")
    scan = shown.index("scan m.safetensors")
    assert shown.index("3 runs") < scan < shown.index("m.clean.safetensors", scan)
    assert "84.0 -> 83.0 (81.0-85.0, n 1000)" in shown
    assert "90.0 -> 3.2 (1.2-5.2, n 500)" in shown, "the unseen family is the worst row"
    assert "refused" in shown and "x.pt is a pickle." in shown


def test_rows_that_do_not_stand_out_are_counted_unless_all_are_asked_for():
    passing = sum(row.outcome == "passes" for row in scanned().triggers)
    assert f"and {passing} that pass (-v lists them)" in render([scanned()], "table")
    assert "-v lists" not in render([scanned()], "table", everything=True)
    quiet = scanned(rows=[row("a", 0.01, "passes")])
    quiet.findings[0].verdict = "no-outlier"
    shown = render([quiet], "table")
    assert "\nall 1 pass (-v lists them)\n" in shown and "\nnone stands out (-v lists all 1)\n" in shown


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
        "m\\x1b[2J: images 2/5  18 s left  loss 0.250  1,234 images/s",
        "m\\x1b[2J: images 4/5  6 s left  loss 0.250  1,234 images/s",
    ]


@pytest.fixture
def now(monkeypatch):
    """The time that progress goes by, as the one item of a list."""
    held = [100.0]
    monkeypatch.setattr("bdclean.cli.progress.time.monotonic", lambda: held[0])
    return held


def test_progress_over_several_models_says_which_it_is_and_what_is_left_over_all(now):
    file = io.StringIO()
    progress = Progress(file=file, models=4)
    for model, seconds in (("a", 40.0), ("b", 20.0), ("c", 90.0)):
        with progress:
            progress.begin(model)
            for done in (1, 2):
                now[0] += seconds / 2
                progress("images", done, 2)
    assert file.getvalue().splitlines() == [
        "model 1/4 a: images 1/2",
        "model 1/4 a: images 2/2  0.1/s",
        "model 2/4 (1 min 50 s left over all) b: images 1/2",  # 40 s each: two more, and 30 s of this one
        "model 2/4 (1 min 40 s left over all) b: images 2/2  0.1/s",
        "model 3/4 (30 s left over all) c: images 1/2",  # 30 s each: this one has taken longer already
        "model 3/4 (30 s left over all) c: images 2/2  0.0/s",
    ]


def test_models_that_take_less_than_a_line_are_told_now_and_then_all_the_same(now):
    file = io.StringIO()
    progress = Progress(file=file, models=30)
    for number in range(30):
        with progress:
            progress.begin(f"m{number}")
            now[0] += 1.0
            progress("images", 1, 1)
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["10/30", "20/30", "30/30"]
    assert lines[0].startswith("model 10/30 (20 s left over all) m9: images 1/1")


def test_quiet_progress_says_nothing():
    file = io.StringIO()
    with Progress(True, file) as progress:
        progress("images", 1, 1)
    assert file.getvalue() == ""


def test_rate_and_time_left():
    assert details(10, 90, 5.0, {"kept": 3}) == "45 s left  kept 3  2.0/s"
    assert details(0, 90, 0.0, {}) == ""
    shown = details(10, 90, 5.0, {"loss": 0.25, "agreement": 0.5, "sent": 0.1, "images_per_second": 70.0})
    assert shown == "45 s left  loss 0.250  agreement 0.500  70 images/s", "two measures at most"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("title", ["", "models/a-rather-long-name-of-a-network.safetensors"])
def test_a_live_line_keeps_bar_and_counter_in_their_places_at_80_columns(monkeypatch, title):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    file, frames = Terminal(), []
    with Progress(file=file, models=5 if title else 1) as progress:
        progress.begin(title)
        for done, loss in ((1, 1234.5678), (50, 0.25), (4999, 1 / 3)):
            progress(
                "distillation", done, 5000, loss=loss, agreement=0.987654, sent=0.1, images_per_second=812.0
            )
            progress._live.refresh()
            lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").splitlines()
            frames.append([line for line in lines if "distillation" in line][-1])
    assert all(len(line) <= 80 for line in frames)
    places = {(re.search("[\u2500-\u257f]", line).start(), line.index("/5000")) for line in frames}
    assert len(places) == 1, "nothing jumps"
    assert all(line.count("\u2501") + line.count("\u2578") + line.count("\u257a") >= 13 for line in frames)
    assert ("-network.safetensors: distillation" in frames[0]) == bool(title)
    overall = [line for line in lines if line.startswith("model ")]
    assert bool(overall) == bool(title) and all(len(line) <= 80 for line in overall)
    assert all("1/5" in line for line in overall[-1:])
    assert "loss 1.23e+03" in frames[0] or title


def test_a_backdoor_of_one_source_is_told_once():
    found = row("badnets:size=3", 0.12, "fails")
    found.bounds = [Bound(None, 0.12, 500, 0.09, 0.02), Bound(11, 1.0, 12, 0.6, 0.0)]
    found.decisive_source = 11
    assert evidence(found) == (
        "badnets:size=3 sends all 12 images of class 11 to class 0, the highest of 19 controls 0.0 %."
    )
    names = [*map(str, range(11)), "stop"]
    assert "all 12 images of stop (11) to 0 (0)" in evidence(found, names)
    found.bounds[1].value = 0.75
    assert "75.0 % of the 12 images of class 11" in evidence(found)


def of_one_source(value, outcome, after=False):
    """A row that moves one of twelve classes, which is 8.3 % of all."""
    found = row("badnets:size=3", value / 12, outcome)
    found.worst_source = {"class": 11, "value": value, "n": 25, "low": max(0, value - 0.1), "high": value}
    found.bounds = [Bound(None, value / 12, 500, 0.05, 0.02), Bound(11, value, 25, 0.7, 0.0)]
    found.decisive_source = 11 if outcome == "fails" else None
    return found


@pytest.mark.parametrize("form", ["table", "md", "html"])
def test_a_backdoor_of_one_source_is_headed_by_it_and_never_by_the_average(form):
    scan = scanned(rows=[of_one_source(1.0, "fails")])
    repair = cleansed()
    repair.before.triggers, repair.after.triggers = (
        [of_one_source(1.0, "fails")],
        [of_one_source(0.0, "passes")],
    )
    shown = plain_words(render([scan], form))
    head = shown[: shown.index("Triggers")]
    assert "all 25 images of class 11" in head and "8.3" not in head
    shown = plain_words(render([repair], form))
    assert "8.3" not in shown[: shown.index("Triggers")]
    if form != "html":
        assert "(was: backdoored, badnets 100.0 -> 0.0 % of class 11)" in shown
    compared = plain_words(render([scan, repair], form))
    assert "8.3" not in compared[: compared.index("badnets:size=3", compared.index("trigger"))]


def test_a_bar_of_one_source_is_as_long_as_its_rate():
    """Its base rate and controls, which are of all images, are not marked; the average stands beside it."""
    repair = cleansed()
    repair.before.triggers, repair.after.triggers = (
        [of_one_source(1.0, "fails")],
        [of_one_source(0.0, "passes")],
    )
    (bar,) = groups(repair)[0].bars
    before, after = bar.tracks
    assert (before.value, before.base, before.highest, before.number) == (100.0, None, None, "100.0\u00a0%")
    assert (after.value, after.number) == (0.0, "0.0\u00a0%") and bar.change == ""
    assert before.beside == "of class 11, all images 8.3" and after.beside == "of class 11, all images 0.0"


def plain_words(shown):
    """The words of a report, without markup, on one line."""
    body = re.sub(r"<style>.*?</style>", "", shown, flags=re.S)
    words = html.unescape(re.sub(r"<[^<>]*>", "", body)).replace("\\", "")
    return " ".join(words.split())


def test_a_trigger_with_two_rows_is_counted_once():
    """After a repair one is measured towards the suspect's target and towards what screening found."""
    record = cleansed()
    second = row("sig", 0.3, "inconclusive")
    second.target = 3
    record.after.triggers.append(second)
    shown = render([record], "table")
    assert "1 of 2 triggers tried stay below the threshold of 20 %, 1 inconclusive" in shown
    assert "fires after   0 of 2 triggers" in shown
    assert "1 of the 2 triggers tried stay below" in plain_words(render([record], "html"))


def test_no_evidence_beside_a_high_rate_says_what_harmless_stamps_do():
    rows = [row("a", 0.01, "passes"), row("sig", 0.358, "inconclusive", highest=0.555)]
    record = scanned(rows=rows)
    record.verdict = "no-evidence"
    words = "harmless stamps of the same strength (controls) move up to 55.5 %"
    assert f"The highest rate is 35.8 %, of sig; {words}." in render([record], "table")
    assert words in plain_words(render([record], "html"))
    record.triggers = rows[:1]
    assert "harmless" not in render([record], "table")


def test_what_failed_before_comes_first_then_what_is_inconclusive():
    record = cleansed()
    names = ("passes", "doubted", "failed", "doubtful", "fails")
    outcomes = [("passes",) * 2, ("inconclusive", "passes"), ("fails", "passes"), ("passes", "inconclusive")]
    pairs = dict(zip(names, [*outcomes, ("passes", "fails")], strict=True))
    record.before.triggers = [row(name, 0.1, old) for name, (old, _) in pairs.items()]
    record.after.triggers = [row(name, 0.1, new) for name, (_, new) in pairs.items()]
    listed = ["fails", "failed", "doubtful", "doubted"]
    shown = render([record], "table", width=80)
    rows = re.findall(r"^(\S+) +\S+ -> \S+$", shown, re.M)
    assert rows == listed and "and 1 that pass (-v lists them)" in shown
    words = render([record], "html")
    places = [words.index(f'<div class="what"><code>{name}</code>') for name in [*listed, "passes"]]
    assert places == sorted(places)


def test_a_row_has_two_lines_where_columns_have_no_room_and_specs_break_at_commas():
    spec = "file:" + ",".join(f"setting{k}=value{k}" for k in range(9))
    shown = render([scanned(rows=[row(spec, 0.9, "fails")])], "table", width=80)
    lines = shown[shown.index("\nTriggers\n") :].splitlines()[2:]
    assert [line[:8] for line in lines[:4]] == ["file:set", "setting4", "setting8", "    to c"]
    assert lines[0].endswith(",") and lines[2].endswith("fails")
    assert lines[3] == "    to class 0, ASR 90.0 (88.0-92.0, n 500) %, controls to 4.0 %"
    assert "class 0" in render([scanned()], "table", width=220)
    assert render([scanned()], "table", width=220).count("trigger ") == 1, "a head of columns"


def test_findings_say_where_they_were_seen_and_which_side_is_odd():
    record = cleansed()
    record.findings = [
        Finding("inversion", "outlier", 1.5, 13.5, None, "a small mask", "below", "suspect"),
        Finding("pull", "suspicious", 1.2, 0.5, 0.01, "together", "above", "output"),
    ]
    for words in (render([record], "table", width=60), plain_words(render([record], "html"))):
        assert "seen on the suspect, score 1.5, odd below 13.5" in words
        assert "seen on the output, score 1.2, odd above 0.5, p 0.01" in words
    wide = render([record], "table", width=250)
    assert re.search(r"inversion +outlier +suspect +1.5 +below 13.5", wide)
    assert "seen on" not in render([scanned()], "table", everything=True)


def test_the_verdict_is_the_last_line_with_the_next_command():
    record = scanned("my model.safetensors")
    record.argv = [
        "bdclean",
        "scan",
        "x",
        "--preprocess=half",
        "--strict",
        "--trigger",
        "sig",
        "-q",
        "--arch",
    ]
    ended = render([record], "table").splitlines()
    assert ended[-2:] == [
        "backdoored: my model.safetensors",
        "next: bdclean cleanse 'my model.safetensors' --data images --preprocess half --trigger sig --arch",
    ]
    narrow = render([record], "table", width=80)
    assert "--data images \\\n    --preprocess half" in narrow
    (words,) = re.findall(r"^next: (.*)", narrow, re.M | re.S)
    joined = words.replace("\\\n", "")
    assert shlex.split(joined) == shlex.split(ended[-1].removeprefix("next: "))
    record.argv = ["bdclean", "scan", "x", "--labeled", "images"]
    assert render([record], "table").endswith(
        "next: bdclean cleanse 'my model.safetensors' --labeled images\n"
    )
    repaired = render([cleansed()], "table").splitlines()
    assert repaired[-2] == "no-evidence: m.clean.safetensors"
    assert repaired[-1] == "next: bdclean report m.clean.json --out m.clean.html"
    kept = cleansed()
    kept.argv = ["bdclean", "cleanse", "m.safetensors", "--record", "runs/"]
    assert render([kept], "table").endswith("next: bdclean report runs/ --out m.clean.html\n")
    unknown = RunRecord("scan", checkpoint=CheckpointEntry("x.pt"), advice="give 400 images")
    for other in (refused(), unknown):
        assert "next:" not in render([other], "table")
    assert render([refused()], "table").endswith("\nrefused: x.pt: x.pt is a pickle.\n")
    assert render([unknown], "table").endswith("\nnot-assessed: x.pt: give 400 images.\n")


def test_held_out_images_are_not_those_of_a_test_set():
    record = cleansed()
    record.data = DataEntry("images", 5000, held_out=600)
    assert "600 held out" in render([record], "md")
    record.data.test = "test"
    shown = render([record], "md")
    assert "held out" not in shown and "measured on 600 of test" in shown


def test_class_names_of_the_file_are_used_without_labels():
    record = scanned()
    record.data.classes, record.checkpoint.class_names = None, ["stop", "yield"]
    assert "of images to stop (0)" in render([record], "table")
    assert "predicted as stop (0)" in plain_words(render([record], "html"))
    record.data.classes = ["halt", "yield"]
    assert "of images to halt (0)" in render([record], "table"), "labels count more than a claim"


def test_a_narrow_comparison_of_runs_without_a_name_is_drawn():
    records = [refused(), scanned()]
    for record in records:
        record.checkpoint.path = ""
    assert "x.pt is a pickle." in " ".join(render(records, "table", width=50).split())


def test_a_refused_run_says_why_in_the_comparison():
    for form in ("table", "md"):
        shown = render([scanned(), refused()], form).replace("\\", "")
        assert "x.pt is a pickle." in shown[: shown.index("Only the triggers")]
    page = plain_words(render([scanned(), refused()], "html"))
    assert "x.pt is a pickle." in page[: page.index("Every trigger in every run")]


def test_a_repair_is_headed_by_what_it_wrote():
    """The verdict is the output's; the suspect's stands behind it."""
    record = cleansed()
    shown = render([record], "md").splitlines()
    assert shown[0] == f"## {record.output.path}"
    assert "**no-evidence**: (was: backdoored, " in shown[2]
    table = render([record], "table")
    assert f"made from     {record.checkpoint.path} (abababab)" in table
