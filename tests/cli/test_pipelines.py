"""What people write around bdclean, each through the installed command in a shell."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from cli.terminal import on_a_terminal

import bdclean
from bdclean.cli.commands import app
from bdclean.cli.console import COMMANDS
from bdclean.cli.main import run
from bdclean.record.parsing import parse_records
from bdclean.record.run import CheckpointEntry, Rate, RunRecord, TriggerRow

ROOT = Path(bdclean.__file__).parents[1]
CHECKOUT = Path(__file__).resolve().parents[2]
SAMPLES = CHECKOUT / "sample_models"
INSTALLED = Path(sys.executable).with_name("bdclean")

pytestmark = pytest.mark.skipif(not INSTALLED.exists(), reason="the command is not installed beside Python")


def shell(script, **more):
    env = {**os.environ, "PATH": f"{INSTALLED.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(
        ["bash", "-c", script], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )


@pytest.fixture
def record():
    row = TriggerRow("badnets", "patch", target=0, asr=Rate(0.9, 100, 0.82, 0.95), outcome="fails")
    RunRecord("scan", "backdoored", triggers=[row], checkpoint=CheckpointEntry("m.safetensors")).write(
        Path("a.json")
    )
    return "a.json"


@pytest.fixture
def junk():
    """Three files that are no models, one of them with a name that shells break."""
    for name in ("a.safetensors", "b c.safetensors", "deep/d.safetensors"):
        Path("models", name).parent.mkdir(parents=True, exist_ok=True)
        Path("models", name).write_bytes(b"")
    return sorted(f"models/{name}" for name in ("a.safetensors", "b c.safetensors", "deep/d.safetensors"))


@pytest.mark.slow
def test_models_that_find_names_become_a_line_each(junk):
    done = shell(
        "find models -name '*.safetensors' | sort | bdclean scan - --data . --format jsonl; exit ${PIPESTATUS[2]}"
    )
    assert done.returncode == 3
    assert [json.loads(line)["checkpoint"]["path"] for line in done.stdout.splitlines()] == junk
    assert len(done.stderr.splitlines()) == 3 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_folder_of_models_is_told_apart_behind_a_pipe():
    Path("models").mkdir()
    for name in ("signs-badnets", "signs-clean"):
        Path(f"models/{name}.safetensors").symlink_to(SAMPLES / f"{name}.safetensors")
    reader = (
        "import json, sys; [print(r['checkpoint']['path'], r['verdict']) for r in map(json.loads, sys.stdin)]"
    )
    done = shell(
        f"find models -name '*.safetensors' | sort | bdclean scan - --data {SAMPLES}/images/labeled --limit 240 "
        f"--trigger badnets --no-pictures --format jsonl | {sys.executable} -c {shlex.quote(reader)}; "
        "exit ${PIPESTATUS[2]}"
    )
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "models/signs-badnets.safetensors backdoored",
        "models/signs-clean.safetensors no-evidence",
    ]


@pytest.mark.slow
def test_a_list_with_all_that_lists_have_gives_a_line_for_each_model():
    """Written by Windows: a name that is missing, one with spaces, one twice, folders, a file that is no model."""
    for name in ("mine/a b.safetensors", "folder/model.safetensors"):
        Path(name).parent.mkdir()
        Path(name).symlink_to(SAMPLES / "signs-badnets.safetensors")
    Path("empty").mkdir()
    Path("torn.safetensors").write_bytes(b"\xff" * 30)
    names = [
        "gone.safetensors",
        "mine/a b.safetensors",
        "",
        "empty",
        "torn.safetensors",
        "mine/a b.safetensors",
        "folder",
    ]
    Path("list.txt").write_bytes("".join(f"{name}\r\n" for name in names).encode())
    done = shell(
        f"bdclean scan - --data {SAMPLES}/images/labeled --limit 128 --trigger badnets --no-pictures --format jsonl "
        "--record runs/ < list.txt"
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert [(record["checkpoint"]["path"], record["verdict"]) for record in records] == [
        ("gone.safetensors", "not-assessed"),
        ("mine/a b.safetensors", "backdoored"),
        ("empty", "not-assessed"),
        ("torn.safetensors", "not-assessed"),
        ("folder", "backdoored"),
    ]
    said = [line for line in done.stderr.splitlines() if line.startswith("bdclean: ")]
    assert said[0] == "bdclean: mine/a b.safetensors is named 2 times and looked at once."
    for name in ("gone.safetensors", "empty", "torn.safetensors"):
        assert sum(line.startswith(f"bdclean: {name}: ") for line in said) == 1
    assert len(list(Path("runs").iterdir())) == 5 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_cleansing_is_reported_behind_a_pipe():
    done = shell(
        f"bdclean cleanse {SAMPLES}/signs-badnets.safetensors --data {SAMPLES}/images/unlabeled --recipe clp "
        "--trigger badnets --limit 300 --out m.safetensors --format json | bdclean report - --format md"
    )
    assert done.returncode == 0 and Path("m.safetensors").stat().st_size > 10_000
    assert done.stdout.startswith("## m.safetensors\n\n**") and "recipe: clp" in done.stdout
    (record,) = parse_records(Path("m.json").read_text(), "m.json")
    assert record.verdict in done.stdout


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("bdclean scan none nothing neither --data . --format jsonl", 3),
        ("bdclean ls architectures", 0),
        ("bdclean ls schema", 0),
        ("bdclean --help", 0),
        ("bdclean report a.json --format html", 0),
    ],
)
def test_a_reader_that_has_read_enough_ends_it_quietly(command, code, record):
    done = shell(f"{command} | head -c 1; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == code and len(done.stdout) == 1
    assert not re.search("Traceback|BrokenPipe|Broken pipe|Exception", done.stderr), done.stderr


def test_runs_side_by_side_never_mix():
    """Several write records into one folder, and reports to standard output and to one file."""
    one = "bdclean scan a.safetensors --data . --record runs/ --format json"
    done = shell(
        f"for n in 1 2 3; do {one} >$n.json 2>$n.err & done; wait; "
        "for n in 1 2 3; do bdclean report $n.json --out all.md & done; wait; ls -A"
    )
    assert done.returncode == 0
    for n in (1, 2, 3):
        (found,) = parse_records(Path(f"{n}.json").read_text(), "x")
        assert found.outcome == "refused" and len(Path(f"{n}.err").read_text().splitlines()) == 1
    assert len(list(Path("runs").iterdir())) == 3 and not list(Path("runs").glob(".*"))
    assert Path("all.md").read_text().startswith("## scan a.safetensors\n")
    made = {f"{n}.{end}" for n in (1, 2, 3) for end in ("json", "err")}
    assert set(done.stdout.split()) == {*made, "all.md", "runs"}


def test_colours_are_for_terminals_that_take_them(record):
    coloured = on_a_terminal("report", record)[1]
    assert "\x1b[1;31mbackdoored" in coloured
    assert (
        on_a_terminal("report", record, NO_COLOR="")[1] == coloured
    )  # as no-color.org has it: empty is unset
    for more in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        code, sent = on_a_terminal("report", record, **more)
        assert code == 0 and "\x1b" not in sent and "backdoored: badnets" in sent, more


@pytest.mark.parametrize("columns", [1, 7, 40, 999_999_999])
def test_a_terminal_of_any_width_ends(record, columns):
    code, sent = on_a_terminal("report", record, columns=columns)
    assert code == 0 and "backdoored" in re.sub(r"\s|\x1b\[[0-9;]*m", "", sent)


def test_a_pipe_is_as_wide_as_somebody_says():
    """rich and click do so; a shell's own COLUMNS is not exported."""
    RunRecord("scan", advice="word " * 60).write(Path("a.json"))
    for columns, longest in (("40", 40), ("0", 300), ("-3", 300), ("x", 300), ("", 300)):
        done = shell("bdclean report a.json", COLUMNS=columns)
        found = max(map(len, done.stdout.splitlines()))
        assert found <= 40 if longest == 40 else found >= 300, columns


def test_a_terminal_that_is_not_utf_8_gets_what_it_can_show(record):
    RunRecord("scan", advice="gr\u00f6\u00dfer \u2192").write(Path("a.json"))
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code, sent = on_a_terminal("report", "a.json", **plain)
    assert code == 0 and "gr\\xf6\\xdfer \\u2192" in sent and sent.isascii()
    code, sent = on_a_terminal("report", "a.json", PYTHONIOENCODING="latin-1")
    assert code == 0 and "gr\\xf6\\xdfer \\u2192" in sent  # the first two are bytes that are no UTF-8
    code, sent = on_a_terminal("scan", "m\u00fc.safetensors", "--data", ".", **plain)
    assert code == 3 and "does not exist" in sent and "Traceback" not in sent


# --- completion and help --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bdclean cl", ["cleanse"]),
        ("bdclean scan --detec", ["--detector"]),
        ("bdclean cleanse m --recipe ft", ["ft", "ft-sam"]),
        ("bdclean ls recipe ino", ["inoculate"]),
        ("bdclean ls arch", ["architectures"]),
        ("bdclean report a --format j", ["json", "jsonl"]),
        ("bdclean scan models/", []),  # the shell's own: files
    ],
)
def test_a_shell_is_told_what_could_be_typed(line, words, monkeypatch, capsys):
    Path("bdclean.toml").write_text("nonsense")  # nobody asked for it to be read
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    monkeypatch.setenv("_BDCLEAN_COMPLETE", "complete_bash")
    assert run([]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == words and captured.err == ""


def test_the_script_of_completion_is_kept_in_a_file_or_installed(tmp_path):
    done = shell("_BDCLEAN_COMPLETE=source_bash bdclean >script && . ./script && complete -p bdclean")
    assert done.returncode == 0 and "_bdclean_completion" in done.stdout, done.stderr
    for name in ("zsh", "fish", "powershell"):
        done = shell("bdclean", _BDCLEAN_COMPLETE=f"source_{name}")
        assert done.returncode == 0 and "bdclean" in done.stdout, name
    (tmp_path / "home").mkdir()
    done = shell("bdclean --install-completion; exit $?", HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert [
        file for file in (tmp_path / "home").rglob("*") if file.is_file() and "bdclean" in file.read_text()
    ]


def test_a_shell_that_is_not_known_is_no_verdict(monkeypatch, capsys):
    """Typer's own exit code for it is 1."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    monkeypatch.setenv("_BDCLEAN_COMPLETE", "source_tcsh")
    assert run([]) != 1


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_ends_with_an_example_that_can_be_typed(command, capsys):
    assert run([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    examples = shown[shown.index("Example") :].replace("\\\n", " ")
    lines = [
        line.partition("|")[2].strip() if "|" in line else line.strip() for line in examples.splitlines()
    ]
    lines = [re.sub(" > .*", "", line) for line in lines if line.startswith("bdclean ")]
    assert lines and all(f"bdclean {command}" in line for line in lines)
    group = typer.main.get_command(app)
    for line in lines:
        _, name, *words = shlex.split(line)
        root = group.make_context("bdclean", [name, *words])
        group.commands[name].make_context(name, words, parent=root)  # raises on what there is not
        for word in words:
            assert not word.startswith("sample_models/") or (CHECKOUT / word).exists(), word
