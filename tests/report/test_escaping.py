"""Strangers' strings reach the terminal, Markdown and standard error as text alone."""

import json
import re
import unicodedata

import pytest
from cli.terminal import on_a_terminal
from hostile.case import parts, prepare, raw

from bdclean.cli.defects import trace
from bdclean.cli.main import run
from bdclean.record.run import RunRecord

EVIL = (
    "\x1b[2J\x1b]0;owned\x07\x9b31m[red]x[/red][link=http://evil]y[/link]\u202egnp\u2066\n\rbdclean: fine"
    "\x00\u2028\ud800:smile:"
)
SHOWN = (
    "\\x1b[2J\\x1b]0;owned\\x07\\x9b31m[red]x[/red][link=http://evil]y[/link]\\u202egnp\\u2066\\n\\rbdclean: fine"
    "\\x00\\u2028\\ud800:smile:"
)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LIVE = re.compile(r"\x1b\[(?:[0-9;]*m|[0-9]*[AKG]|2K|\?25[lh])")  # what rich's own progress bar sends


def harmless(text, allowed=COLOURS):
    """Nothing but text, line ends and the codes that bdclean itself sends."""
    rest = allowed.sub("", text)
    if allowed is LIVE:
        rest = rest.replace("\r", "")
    odd = {c for c in rest if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029"} - {"\n"}
    return not odd and not any(line.startswith("bdclean: fine") for line in rest.split("\n"))


def evil_record():
    """A record with the string wherever a record takes a text."""

    def filled(value):
        if isinstance(value, dict):
            return {key: item if key in FIXED else filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return EVIL if isinstance(value, str) else value

    from bdclean.bench.abuse.parsers import whole_record

    return {**filled(whole_record()), "verdict": "backdoored"}


FIXED = ("schema", "verdict", "command", "outcome", "png_base64")


@pytest.fixture
def record(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(evil_record()))
    return "r.json"


@pytest.mark.parametrize("words", [(), ("-v",), ("--format", "md"), ("--format", "json")])
def test_a_record_on_a_terminal(words, record):
    code, sent = on_a_terminal("report", record, *words)
    assert code == 0 and harmless(sent)
    if "json" in words:
        assert json.loads(sent)["runs"][0]["warnings"] == [EVIL]
    elif "md" not in words:
        # rich's markup and emoji are shown as they are written, wrapped or not
        assert SHOWN in "".join(COLOURS.sub("", sent).split("\n")).replace("  ", "") or SHOWN in COLOURS.sub(
            "", sent
        )


def test_several_records_and_fail_on(record):
    # wide enough that no cell is wrapped: a wrapped one may begin a line with what was typed
    code, sent = on_a_terminal("report", record, record, "--fail-on", "asr>=0.2", columns=2000)
    assert code == 1 and harmless(sent)


def test_markdown_holds_no_markup_of_strangers(record, capsys):
    assert run(["report", record, record, "--format", "md"]) == 0
    shown = capsys.readouterr().out
    assert harmless(shown)
    assert (
        "[link=" not in shown.replace("\\[", "") and "](" not in shown and "<" not in shown.replace("\\<", "")
    )
    assert "http://" not in shown and "|x" not in shown


@pytest.mark.parametrize(
    "name",
    ["path", "option", "trigger", "fail-on"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("set", "arch", "classes")],
)
def test_what_was_typed(name, tmp_path):
    prepare(tmp_path)
    evil = EVIL.replace("\x00", "").replace("\ud800", "\udcff").replace("/", "")
    good = ("scan", "good.safetensors", "--data", "images")
    lines = {
        "path": ("scan", evil, "--data", "images"),
        "option": ("scan", f"--{evil}"),
        "trigger": (*good, "--trigger", evil),
        "set": ("cleanse", *good[1:], "--set", evil),
        "fail-on": (*good, "--fail-on", evil),
        "arch": (*good, "--arch", evil),
        "classes": (*good, "--classes", evil),
    }
    code, sent = on_a_terminal(*lines[name], cwd=tmp_path)
    assert code in (2, 3) and ("owned" in sent or "gnp" in sent) and harmless(sent, LIVE)


@pytest.mark.slow
def test_a_scan_of_odd_files_on_a_terminal(tmp_path):
    prepare(tmp_path)
    table, data = parts()
    table = {f"model.{name}": entry for name, entry in table.items() if name != "__metadata__"}
    table["projector." + EVIL.replace("\ud800", "")] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    table["__metadata__"] = {EVIL.replace("\ud800", ""): EVIL.replace("\ud800", "") + "<script>"}
    odd = EVIL.replace("\x00", "").replace("\ud800", "\udcff").replace("/", "")
    model, images = tmp_path / f"m{odd}.safetensors", tmp_path / f"i{odd}"
    model.write_bytes(raw(table, data))
    images.mkdir()
    for number, picture in enumerate(sorted((tmp_path / "images").iterdir())):
        home = images / f"{number % 2}{odd}"
        home.mkdir(exist_ok=True)
        (home / f"{odd}{number}.png").write_bytes(picture.read_bytes())
    (images / f"0{odd}" / f"broken{odd}.png").write_bytes(b"x")
    for form in ("table", "md"):
        code, sent = on_a_terminal(
            "scan", str(model), "--data", str(images), "--trigger", "badnets", "--format", form, "--record", "r.json",
            cwd=tmp_path,
        )  # fmt: skip
        assert code in (0, 1, 3) and "owned" in sent and harmless(sent, LIVE)
        assert RunRecord.from_json(json.loads((tmp_path / "r.json").read_text())).outcome == "ran"


def test_a_traceback_is_escaped(capsys):
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        trace(error)
    shown = capsys.readouterr().err
    assert "Traceback" in shown and harmless(shown) and len(shown.splitlines()) > 3
