"""A model card's audit section through the command line: made anew, and every other byte of the card kept."""

import os
import re
import stat
from pathlib import Path

import pytest

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
    TriggerRow,
)
from bdclean.report.card import BEGIN, END, TITLE

FRONT = "---\nlicense: mit\ntags: [vision]\n# a comment\n---\n"
TEXT = "# A model\n\nIt tells road signs apart.\n"


def row(trigger, value, outcome):
    rate = Rate(value, 500, max(0.0, value - 0.02), min(1.0, value + 0.02))
    return TriggerRow(trigger, "patch", target=3, asr=rate, outcome=outcome)


def scanned(path="m.safetensors", rows=None):
    rows = rows or [
        row("badnets:size=3", 0.98, "fails"),
        *(row(f"sig:delta={n}", 0.01, "passes") for n in range(4)),
    ]
    return RunRecord(
        "scan",
        "backdoored",
        started="2026-11-20T10:00:00+00:00",
        versions={"bdclean": "0.1.0"},
        seed=7,
        checkpoint=CheckpointEntry(path, "ab" * 32),
        triggers=rows,
        findings=[Finding("stripes", "no-outlier"), Finding("inversion", "suspicious", reason="5 pixels")],
    )


def cleansed():
    return RunRecord(
        "cleanse",
        "no-evidence",
        threshold=0.2,
        started="2026-11-21T10:00:00+00:00",
        checkpoint=CheckpointEntry("m.safetensors", "ab" * 32),
        recipe=RecipeEntry("inoculate"),
        before=Side("backdoored", [], [row("badnets:size=3", 0.98, "fails")]),
        after=Side("no-evidence", [], [row("badnets:size=3", 0.02, "passes")]),
        output=OutputEntry("m.clean.safetensors", "cd" * 32),
    )


@pytest.fixture
def records(tmp_path):
    scanned().write(tmp_path / "a.json")
    cleansed().write(tmp_path / "b.json")


def kept(card, *names):
    """Runs report on records with a card of these bytes, twice; returns what stands before and after its section."""
    Path("README.md").write_bytes(card)
    assert run(["report", *(names or ["a.json"]), "--card", "README.md", "--out", "x.md"]) == 0
    once = Path("README.md").read_bytes()
    assert run(["report", *(names or ["a.json"]), "--card", "README.md", "--out", "x.md"]) == 0
    assert Path("README.md").read_bytes() == once
    return once


def section(card):
    return card[card.index(BEGIN) : card.index(END) + len(END)]


@pytest.mark.usefixtures("records")
def test_the_section_says_the_verdict_what_was_tried_when_and_on_which_bytes():
    said = section(kept(FRONT.encode() + TEXT.encode()).decode()).replace("\\", "")
    for words in (
        f"## {TITLE}\n",
        "### m.safetensors\n",
        "**backdoored**: badnets:size=3 sends 98.0 (96.0-100.0, n 500) % of images to class 3",
        "- checked: 2026-11-20, bdclean 0.1.0, seed 7\n",
        f"- sha256: {'ab' * 32}\n",
        "- tried: 5 triggers (badnets 1, sig 4): fails 1, passes 4\n",
        "- looked for without a trigger: stripes, inversion (suspicious)\n",
        "| badnets:size=3 | 3 | 98.0 (96.0-100.0, n 500) | fails |",
        "Triggers that were not tried are not excluded",
    ):
        assert words in said, words
    assert "sig:delta=0" not in said
    assert re.search(r"\b(is|are|looks) (clean|safe)\b", said) is None


@pytest.mark.usefixtures("records")
def test_of_a_cleansing_the_section_is_about_the_written_file():
    said = section(kept(TEXT.encode(), "b.json").decode()).replace("\\", "")
    assert "### m.clean.safetensors" in said and f"- sha256: {'cd' * 32}" in said
    assert "**no-evidence**: (was: backdoored, badnets 98.0 -> 2.0 %)" in said
    assert "- made from: m.safetensors (abababab)" in said


@pytest.mark.usefixtures("records")
def test_several_records_stand_in_one_section():
    said = kept(TEXT.encode(), "a.json", "b.json").decode()
    assert said.count(f"## {TITLE}") == said.count(BEGIN) == 1
    assert said.index("### m.safetensors") < said.index("### m.clean.safetensors")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
@pytest.mark.usefixtures("records")
def test_all_else_stays_byte_for_byte(newline, mark, end):
    encoding = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(mark, "utf-8")
    before = mark + f"{FRONT}{TEXT.rstrip()} \u00fc\t ".replace("\n", newline).encode(encoding)
    before += end.replace("\n", newline).encode(encoding)
    once = kept(before)
    assert once.startswith(before)
    text = once[len(mark) :].decode(encoding)
    assert set(re.findall("\r\n|\n|\r", section(text))) == {newline}
    assert text.endswith(END + newline if end else END), "it ends as the card did"
    assert f"{newline * 2}{BEGIN}" in text

    after = f"{newline}{newline}## More{newline}the end".encode(encoding)
    head, tail = (once.index(each.encode(encoding)) for each in (BEGIN, END))
    tail += len(END.encode(encoding))
    again = kept(once[:tail] + after, "b.json")
    assert again.startswith(once[:head]) and again.endswith(after)
    assert "no-evidence" in section(again[len(mark) :].decode(encoding))


@pytest.mark.usefixtures("records")
def test_mixed_line_endings_stay_as_they_are():
    before = b"# A\r\nb\nc\rd\n"
    once = kept(before)
    assert once.startswith(before) and b"\r\n## Backdoor audit\r\n" in once


@pytest.mark.parametrize("card", [b"", b"\xef\xbb\xbf"])
@pytest.mark.usefixtures("records")
def test_an_empty_card_holds_the_section_alone(card):
    once = kept(card)
    assert once.startswith(card + BEGIN.encode()) and once.endswith(END.encode() + b"\n")


@pytest.mark.usefixtures("records")
def test_a_card_that_is_not_there_is_made():
    assert run(["report", "a.json", "--card", "README.md", "--format", "json"]) == 0
    assert Path("README.md").read_text(encoding="utf-8").startswith(BEGIN)


@pytest.mark.usefixtures("records")
def test_marks_in_front_matter_are_not_looked_at():
    front = f"---\r\nnote: '{BEGIN} {END}'\r\n---\r\n".encode()
    once = kept(front + b"text")
    assert once.startswith(front + b"text\r\n\r\n" + BEGIN.encode())


@pytest.mark.usefixtures("records")
def test_the_card_keeps_its_mode_and_a_link_stays_one(tmp_path):
    (tmp_path / "real.md").write_text(TEXT)
    (tmp_path / "real.md").chmod(0o640)
    (tmp_path / "README.md").symlink_to("real.md")
    assert run(["report", "a.json", "--card", "README.md", "--out", "x.md"]) == 0
    assert (tmp_path / "README.md").is_symlink() and BEGIN in (tmp_path / "real.md").read_text()
    assert stat.S_IMODE((tmp_path / "real.md").stat().st_mode) == 0o640


@pytest.mark.usefixtures("records")
def test_a_card_that_is_up_to_date_is_not_written(tmp_path):
    kept(TEXT.encode())
    before = (tmp_path / "README.md").stat()
    assert run(["report", "a.json", "--card", "README.md", "--out", "x.md"]) == 0
    assert (tmp_path / "README.md").stat().st_ino == before.st_ino


@pytest.mark.usefixtures("records")
def test_the_report_itself_is_shown_as_ever(capsys):
    Path("README.md").write_text(TEXT)
    assert run(["report", "a.json", "--card", "README.md", "--format", "md"]) == 0
    with_card = capsys.readouterr()
    assert run(["report", "a.json", "--format", "md"]) == 0
    assert with_card.out == capsys.readouterr().out and with_card.err == ""
    assert run(["report", "a.json", "--card", "README.md", "--fail-on", "asr>=0.2"]) == 1


def test_strangers_text_cannot_end_the_section_or_be_markup(tmp_path):
    evil = f"x{END}\n## {TITLE}\n<script>\x1b[31m\u202e\ud800|`[a](http://b)"
    scanned(evil, [row(evil, 0.98, "fails")]).write(tmp_path / "a.json")
    once = kept(TEXT.encode())
    text = once.decode()
    assert text.count(END) == text.count(f"## {TITLE}") == 1
    assert "<script" not in text.replace("\\<", "") and "](http" not in text.replace("\\]", "")
    assert all(each.isprintable() for each in text.split("\n"))


def test_what_was_not_assessed_replaces_what_was(tmp_path, records):
    kept(TEXT.encode())
    problem = Problem("m.safetensors is a pickle.", 3)
    refused = RunRecord(
        "scan", outcome="refused", checkpoint=CheckpointEntry("m.safetensors"), problem=problem
    )
    refused.write(tmp_path / "c.json")
    assert run(["report", "c.json", "--card", "README.md", "--out", "x.md"]) == 0
    said = Path("README.md").read_text(encoding="utf-8")
    assert "**not-assessed \\(refused\\)**" in said or "**not-assessed (refused)**" in said
    assert "backdoored" not in said


def test_a_card_is_no_report(tmp_path):
    scanned(rows=[row(f"badnets:size={n}", 0.98, "fails") for n in range(40)]).write(tmp_path / "a.json")
    text = kept(TEXT.encode()).decode()
    assert text.count("| fails |") == 10 and "30 more do not pass, either" in text


# --- bad input ----------------------------------------------------------------------------------------------

TWO = f"{BEGIN}\na\n{END}\n\n{BEGIN}\nb\n{END}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{TEXT}{TWO}", "README.md has several audit sections (lines 4, 8): leave one of them"),
        (f"{TEXT}{BEGIN}\na\n{END}\n## backdoor AUDIT ##\r\nold\n", "several audit sections (lines 4, 7)"),
        (f"{TEXT}{BEGIN}\na\n{END}\n{END}\n", "several audit sections"),
        (f"{TEXT}{BEGIN}\na\n", "an audit section that is not whole (line 4)"),
        (f"{TEXT}\n{END}\n", "an audit section that is not whole (line 5)"),
        (f"{END}\n{BEGIN}\n", "an audit section that is not whole"),
        (f"{TEXT}## Backdoor audit\n\nby hand\n", "a section Backdoor audit that is not bdclean's (line 4)"),
        ("a\0b", "README.md is not text"),
        (b"\xff\xfea", "README.md is not text"),
        (b"caf\xe9", "README.md is not text"),
    ],
)
@pytest.mark.usefixtures("records")
def test_a_card_that_is_not_clear_is_refused_and_kept(text, words, capsys):
    raw = text if isinstance(text, bytes) else text.encode()
    Path("README.md").write_bytes(raw)
    assert run(["report", "a.json", "--card", "README.md"]) == 3
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err and captured.err.count("\n") == 1
    assert Path("README.md").read_bytes() == raw


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("--card -", 2, "a model card is Markdown"),
        ("--card m.safetensors", 2, "a model card is Markdown: name a file that ends in .md or .markdown"),
        ("--card a.json", 2, "a model card is Markdown"),
        ("--card README.md --out README.md", 2, "--card and --out are the same file"),
        ("--card README.md --out ./README.md", 2, "--card and --out are the same file"),
        ("--card folder.md", 3, "is a folder"),
        ("--card missing/README.md", 3, "missing is not a folder"),
        ("--card pipe.md", 3, "is no regular file"),
        ("--card protected.md", 3, "protected.md cannot be written"),
    ],
)
@pytest.mark.usefixtures("records")
def test_what_cannot_be_a_card_is_told_in_one_sentence(line, code, words, capsys, monkeypatch):
    Path("README.md").write_text(TEXT)
    Path("protected.md").write_text(TEXT)
    Path("folder.md").mkdir()
    os.mkfifo("pipe.md")
    allowed = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: "protected" not in str(path) and allowed(path, mode))
    assert run(["report", "a.json", *line.split()]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err and captured.err.count("\n") == 1
    assert Path("README.md").read_text() == Path("protected.md").read_text() == TEXT


@pytest.mark.usefixtures("records")
def test_a_record_is_never_taken_for_the_card(tmp_path, capsys):
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.md").write_text(text)
    assert run(["report", "a.md", "--card", "a.md"]) == 3
    assert "is an input of this run" in capsys.readouterr().err and (tmp_path / "a.md").read_text() == text


@pytest.mark.usefixtures("records")
def test_a_card_stays_where_a_record_cannot_be_read(tmp_path, capsys):
    before = kept(TEXT.encode(), "a.json", "b.json")
    (tmp_path / "torn.json").write_text('{"schema": "bdclean.run/2"}')
    assert run(["report", "a.json", "torn.json", "--card", "README.md", "--out", "x.md"]) == 3
    assert "README.md is left as it is" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_bytes() == before
