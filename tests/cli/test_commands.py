import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bdclean
from bdclean.cli import arguments
from bdclean.cli.main import run
from bdclean.errors import Refused, UsageError
from bdclean.files.writing import alone, write_text
from bdclean.networks.normalisation import NAMED
from bdclean.networks.recognition.user_code import load
from bdclean.record.parsing import parse_records
from bdclean.record.run import Measure, Problem, Rate, RunRecord, TriggerRow
from bdclean.runs import places
from bdclean.runs.options import Inputs

SAMPLES = Path(__file__).parents[2] / "sample_models"
ROOT = str(Path(bdclean.__file__).parent.parent)


def command(*words, **more):
    env = {**os.environ, "PYTHONPATH": ROOT, **more.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "bdclean", *words], capture_output=True, text=True, env=env, timeout=60, **more
    )


@pytest.fixture
def record(tmp_path):
    row = TriggerRow("badnets", "patch", target=0, asr=Rate(0.9, 100, 0.82, 0.95), outcome="fails")
    found = RunRecord(
        "scan", "backdoored", measures=[Measure("clean_accuracy", 0.8, 100, 0.7, 0.9)], triggers=[row]
    )
    found.write(tmp_path / "a.json")
    return "a.json"


def test_help_answers_at_once():
    fastest = 9.0
    for _ in range(3):
        start = time.perf_counter()
        done = command("--help")
        fastest = min(fastest, time.perf_counter() - start)
    assert done.returncode == 0 and "cleanse" in done.stdout and "\x1b" not in done.stdout
    assert fastest < 1.0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", ""),
        ("frob", "No such command"),
        ("scan", "Missing argument"),
        ("scan m --nope", "No such option"),
        ("scan m", "give --data"),
        ("cleanse m --data . --head old", "no --head 'old': give keep or new"),
        ("scan m --data . --format htm", "no --format 'htm'"),
        ("scan m --data . --fail-on asr", "--fail-on 'asr'"),
        ("scan m --data . --trigger wanett", "no trigger is called 'wanett'"),
        ("scan m --data . --seed 9223372036854775808", "--seed 9223372036854775808 is too large"),
        ("scan m --data . --trigger badnets:3", "write KEY=VALUE"),
        ("scan m --data . --target -1", "--target"),
        ("scan m --data . --detector decre", "did you mean decree?"),
        ("scan m --data . --limit -1", "--limit"),
        ("scan m --data . --device gpu", "--device 'gpu'"),
        ("scan m --data . --precision int8", "--precision 'int8'"),
        ("scan m --data . --format json --out a.json --record a.json", "both the report and the record"),
        ("scan m --data . --sequela pat", "no --sequela 'pat': did you mean path?"),
        ("cleanse m --data . --sequela path,", "no --sequela ''"),
        ("scan m --data . --sequela path", "bdclean cleanse measures it"),
        ("scan m --data . --sequela membership --members .", "--members PATH and --non-members PATH"),
        ("cleanse m --data . --non-members . --sequela path", "are for --sequela membership"),
        ("report a.json --card notes.txt", "name a file that ends in .md or .markdown"),
        ("cleanse m", "give --data"),
        ("cleanse m --data . --recipe bcuu", "did you mean bcu or ibau?"),
        ("cleanse m --data . --set epochs", "KEY=VALUE"),
        ("cleanse m --data . --out same.json", "both the model and its record"),
        ("cleanse m --data . --set epochs=3", "as in --recipe inoculate --set epochs=3 ("),
        ("cleanse m --data . --recipe auto --set frob=3", "no recipe has 'frob'"),
        ("ls things", "nothing is listed"),
        ("ls recipe", "which recipe?"),
        ("ls recipe frob", "no recipe is called"),
        ("ls recipes bcu", "ls recipe bcu"),
        ("report", "Missing argument"),
        ("report a.json --fail-on never --fail-on inconclusive", "contradicts"),
    ],
)
def test_wrong_usage_exits_2_with_one_sentence(line, words, capsys):
    assert run(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err and "Traceback" not in captured.err
    command = line.split()[0] if words not in ("", "No such command") else ""
    assert not words or captured.err.endswith(f" Try 'bdclean {command} --help'.\n".replace("  ", " "))


def test_ls_alone_lists_what_there_is_to_list(capsys):
    assert run(["ls"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in shown] == [
        "recipes",
        "triggers",
        "detectors",
        "architectures",
        "schema",
    ]


def test_help_shows_what_makes_a_run_fail_by_default(capsys):
    for name, default in (("scan", "asr>=0.2"), ("cleanse", "asr>=0.2"), ("report", "never")):
        run([name, "--help"])
        assert f"Default: {default}." in " ".join(capsys.readouterr().out.split()), name


def test_help_names_every_normalisation(capsys):
    for name in ("scan", "cleanse"):
        run([name, "--help"])
        (said,) = re.findall(
            r"--preprocess NAME (.*?) --device", " ".join(capsys.readouterr().out.split()).replace("- ", "-")
        )
        names = {each for known in NAMED for each in (known, known.removesuffix("-bgr"))}
        assert {n for n in names if not n.endswith("-bgr")} <= set(re.findall(r"[a-z0-9-]+", said))
        assert "-bgr" in said


def test_doctor_says_what_a_bug_report_needs(capsys):
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    for line in (r"memory +[0-9.]+ GiB, [0-9.]+ GiB to be had", r"temporary folder +/\S+, [0-9.]+ GiB free"):
        assert re.search(line, shown), shown
    assert "bdclean[timm]" in shown and "bdclean[parquet]" in shown and "usable cores" in shown


def test_every_shared_option_is_in_the_help_of_both(capsys):
    for name in ("scan", "cleanse"):
        run([name, "--help"])
        shown = capsys.readouterr().out
        for option in (
            "--data --test --labeled --classes --arch --kind --preprocess --device --precision --batch-size --limit "
            "--seed --strict --allow-pickle --format --record --no-pictures --quiet --verbose --trigger --fail-on "
            "--out --sequela --members --non-members"
        ).split():
            assert option in shown, (name, option)


def test_report_reads_files_standard_input_and_several(record, capsys, monkeypatch):
    assert run(["report", record]) == 0
    assert "badnets sends 90.0" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(record).read_bytes())))
    assert run(["report", "-", record, "--format", "json"]) == 0
    assert len(parse_records(capsys.readouterr().out, "x")) == 2
    assert run(["report", record, "--out", "r.md", "--format", "md"]) == 0
    assert capsys.readouterr().out == "" and "badnets" in Path("r.md").read_text()


def test_a_page_is_written_or_printed_and_nothing_else(record, capsys):
    assert run(["report", record, "--out", "audit.html"]) == 0
    assert capsys.readouterr().out == ""
    assert run(["report", record, "--format", "html"]) == 0
    captured = capsys.readouterr()
    assert captured.out == Path("audit.html").read_text() and captured.err == ""
    assert captured.out.startswith("<!doctype html>") and captured.out.endswith("</html>\n")


def test_a_refused_model_gives_a_page_of_its_own(capsys, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"")
    assert run(["scan", "m.safetensors", "--data", ".", "--out", "audit.html"]) == 3
    assert "Refused" in Path("audit.html").read_text() and capsys.readouterr().out == ""


def test_report_exits_by_fail_on_alone(record, capsys):
    for expression, code in (
        ("asr>=0.5", 1),
        ("asr>=0.95", 0),
        ("clean_accuracy<0.9", 1),
        ("agreement<0.9", 3),
    ):
        assert run(["report", record, "--fail-on", expression]) == code, expression
    assert "agreement was not measured" in capsys.readouterr().err


PATHS = ("--data", "--test", "--labeled", "--classes", "--record", "--out", "--members", "--non-members")


@pytest.mark.parametrize("option", [*PATHS, "--reference", "--arch", "--trigger", "--preprocess", "--kind"])
def test_an_unset_variable_is_wrong_usage_and_not_the_working_directory(option, capsys):
    for command in ("scan", "cleanse"):
        for value in ("", "  "):
            if option != "--reference" or command == "scan":
                assert run([command, "m.safetensors", "--data", ".", option, value]) == 2, (command, value)
                err = capsys.readouterr().err
                assert option in err and err.rstrip().endswith(f"Try 'bdclean {command} --help'."), err
    assert not list(Path().iterdir())


def test_a_model_or_record_that_is_empty_or_a_url_is_wrong_usage(capsys, monkeypatch):
    for line in (["scan", "", "--data", "."], ["cleanse", " ", "--data", "."], ["report", ""]):
        assert run(line) == 2
        assert "is a variable unset?" in capsys.readouterr().err
    for line in (["scan", "HTTPS://a.b/m.safetensors", "--data", "."], ["report", "s3://a/r.json"]):
        assert run(line) == 2
        assert "is a URL: bdclean fetches nothing, download it first" in capsys.readouterr().err
    assert run(["scan", "m.safetensors", "--data", "https://a.b/c.tar"]) == 2
    assert "'--data': https://a.b/c.tar is a URL" in capsys.readouterr().err


@pytest.fixture
def of_two(monkeypatch):
    """Makes this process the one of that rank of two that torchrun started, where the others never come."""

    def ranked(rank):
        said = {
            "WORLD_SIZE": 2,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 1,
        }
        for name, value in said.items():
            monkeypatch.setenv(name, str(value))

    return ranked


@pytest.mark.parametrize("command", ["scan", "cleanse"])
def test_what_several_processes_cannot_share_is_wrong_usage(command, of_two, capsys):
    of_two(0)
    assert run([command, "m.safetensors", "--data", ".", "--device", "cuda:1"]) == 2
    assert "torchrun gives each process its own: give cuda" in capsys.readouterr().err
    assert run(["scan", "-", "--data", "."]) == 2
    assert "under torchrun, name the models" in capsys.readouterr().err


def test_of_several_processes_the_first_alone_lists_reports_and_writes(of_two, record, capsys):
    line = ["report", str(record), "--out", "out.md"]
    of_two(1)
    for command in (line, ["ls", "recipes"], ["doctor"], ["--version"]):
        assert run(command) == 0
    assert capsys.readouterr() == ("", "") and not Path("out.md").exists()
    write_text(Path("out.md"), "of another process")
    with alone(Path("out.md")):
        assert not Path("out.md").exists() and not Path("out.md.lock").exists()
    of_two(0)
    assert run(line) == 0 and Path("out.md").exists()


def test_a_torn_record_leaves_the_others_in_the_report(record, capsys):
    whole = Path(record).read_text()
    line = parse_records(whole, "x")[0].dump()
    Path("lines.jsonl").write_text(f"{line}\n{line[:400]}\n{line}\n")
    Path("torn.json").write_text(whole[:400])
    odd = {
        "schema": "bdclean.report/1",
        "runs": [json.loads(whole), {"schema": "bdclean.run/1", "verdict": 3}],
    }
    Path("odd.json").write_text(json.dumps(odd))
    assert run(["report", "torn.json", record, "lines.jsonl", "odd.json", "--format", "json"]) == 3
    captured = capsys.readouterr()
    assert len(parse_records(captured.out, "x")) == 4
    errors = captured.err.splitlines()
    assert [error.split(" ")[3].rstrip(":") for error in errors] == ["torn.json", "lines.jsonl", "odd.json"]
    assert "(line 2)" in errors[1]
    # What was found counts more than what could not be read.
    assert run(["report", "torn.json", record, "--fail-on", "asr>=0.5"]) == 1


def test_a_folder_stands_for_its_records(record, capsys, tmp_path):
    (tmp_path / "runs").mkdir()
    for name in ("b.json", "a.json", "c.jsonl"):
        (tmp_path / "runs" / name).write_text(Path(record).read_text())
    (tmp_path / "runs" / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "runs" / "notes.txt").write_text("nothing")
    (tmp_path / "runs" / "deep.json").mkdir()
    assert run(["report", "runs", "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert len(parse_records(captured.out, "x")) == 3 and captured.err == ""
    (tmp_path / "runs" / "torn.json").write_text('{"schema": "bdclean.run/1", "verd')
    assert run(["report", "runs/"]) == 3
    assert "left out: runs/torn.json" in capsys.readouterr().err
    assert run(["report", "runs", "--out", "runs/a.json"]) == 3
    assert "input of this run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(["report", "empty"]) == 3
    assert "empty holds no records" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_record_with_a_byte_order_mark_is_read(record, encoding, capsys):
    Path("r.json").write_text(Path(record).read_text(), encoding=encoding)
    assert run(["report", "r.json"]) == 0


def test_a_report_goes_where_out_says_or_says_why_not(record, capsys):
    assert run(["report", record, "--out", "-", "--format", "md"]) == 0
    assert "badnets" in capsys.readouterr().out and not Path("-").exists()
    assert run(["report", record, "--out", "audit.pdf"]) == 2
    assert "nothing is written as .pdf: end it in .html" in capsys.readouterr().err
    assert run(["report", record, "--out", "audit.pdf", "--format", "html"]) == 0
    assert run(["report", record, "--out", "audit.txt"]) == 0
    assert run(["cleanse", "m.safetensors", "--data", ".", "--out", "-"]) == 2
    assert run(["scan", "m.safetensors", "--data", ".", "--record", "-"]) == 2
    assert "--format json prints the record" in capsys.readouterr().err


def test_rules_are_hyphens_where_an_encoding_has_no_others(record):
    plain = command("report", record, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}).stdout
    drawn = command("report", record, env={"PYTHONIOENCODING": "utf-8"}).stdout
    assert "\u2500\u2500" in drawn and plain == drawn.replace("\u2500", "-")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"schema": "bdclean.run/1"}', b"[]"])
def test_a_broken_record_is_refused(content, tmp_path, capsys):
    (tmp_path / "bad.json").write_bytes(content)
    assert run(["report", "bad.json"]) == 3
    assert capsys.readouterr().err.startswith("bdclean: bad.json")
    assert run(["report", "missing.json"]) == 3


def test_report_never_writes_over_its_record(record, capsys):
    before = Path(record).read_bytes()
    assert run(["report", record, "--out", record]) == 3
    assert Path(record).read_bytes() == before and "input of this run" in capsys.readouterr().err


def test_models_come_from_standard_input(monkeypatch):
    raw = b"\xef\xbb\xbf  one.safetensors \t\n\n# all of them\n  # and\ntwo \xff.safetensors\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert arguments.expand_models(["first", "-"]) == [
        "first",
        "one.safetensors",
        os.fsdecode(b"two \xff.safetensors"),
    ]
    with pytest.raises(UsageError, match="names none"):
        arguments.expand_models(["-"])


def listed(monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    return arguments.expand_models(["-"])


def test_a_file_whose_name_looks_like_a_comment_or_ends_in_a_space_is_not_lost(monkeypatch):
    for name in ("#1.safetensors", "a b .safetensors ", "c.safetensors"):
        Path(name).touch()
    raw = b"#1.safetensors\n#2.safetensors\na b .safetensors \r\n  c.safetensors\t\n"
    assert listed(monkeypatch, raw) == ["#1.safetensors", "a b .safetensors ", "c.safetensors"]


def test_names_between_nulls_keep_every_character(monkeypatch):
    raw = b"./a\nb.safetensors\0./ c.safetensors\0./#d\xff.safetensors\0"
    names = ["./a\nb.safetensors", "./ c.safetensors", os.fsdecode(b"./#d\xff.safetensors")]
    assert listed(monkeypatch, raw) == names


def test_a_list_that_windows_redirected_is_read(monkeypatch):
    raw = "C:\\m\\\xe4.safetensors\r\n\r\n\\\\server\\share\\b.safetensors\r\n".encode("utf-16")
    assert listed(monkeypatch, raw) == ["C:\\m\\\xe4.safetensors", "\\\\server\\share\\b.safetensors"]


def test_a_model_that_is_named_again_is_looked_at_once_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"b\na\r\nb\n")))
    assert arguments.expand_models(["a", "-", "c"]) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == [
        "bdclean: a is named 2 times and looked at once.",
        "bdclean: b is named 2 times and looked at once.",
    ]


@pytest.mark.parametrize(
    "path",
    ["C:\\models\\a.safetensors", "C:/models/a.safetensors", "\\\\server\\share\\a.safetensors", "D:a"],
)
def test_a_path_of_windows_is_no_url(path):
    arguments.check_paths("MODEL", [path])
    assert arguments.expand_models([path]) == [path]


def test_code_on_a_drive_of_windows_is_found_behind_its_last_colon():
    inputs = Inputs(data=Path("."), arch="C:\\nets\\own.py:Net")
    with pytest.raises(UsageError, match=r"--arch: C:\\nets\\own.py does not exist"):
        arguments.check_there(".", inputs, ())
    with pytest.raises(UsageError, match=r"--arch: C:\\nets\\own.py does not exist"):
        load("C:\\nets\\own.py:Net")
    with pytest.raises(UsageError, match="is not FILE.py:NAME"):
        load("C:\\nets\\own.py")


def test_what_windows_redirects_is_utf_8(monkeypatch):
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert run(["ls"]) == 0 and sys.stdout.encoding == "cp1252"
    monkeypatch.setattr(sys, "platform", "win32")
    assert run(["ls"]) == 0 and sys.stdout.encoding == "utf-8"


@pytest.mark.parametrize(
    ("model", "out"),
    [
        ("a/m.safetensors", "a/m.clean.safetensors"),
        ("a/folder", "a/folder.clean.safetensors"),
        ("a/model.safetensors.index.json", "a/model.clean.safetensors"),
        ("m.v2", "m.v2.clean.safetensors"),
    ],
)
def test_the_default_output_lies_beside_the_model(model, out):
    assert places.default_output(Path(model), None) == Path(out)
    assert places.default_output(Path(model), Path("x.safetensors")) == Path("x.safetensors")


def test_the_current_folder_as_model_has_a_name(tmp_path):
    assert places.default_output(Path("."), None) == tmp_path.with_name(f"{tmp_path.name}.clean")


def test_an_output_or_model_without_a_file_name_is_refused(tmp_path):
    for out in (".", "/", ".."):
        with pytest.raises(Refused, match="is a folder"):
            places.default_output(Path("m.safetensors"), Path(out))
    with pytest.raises(Refused, match="is not a model"):
        places.default_output(Path("/"), None)
    with pytest.raises(UsageError, match="always safetensors"):
        places.default_output(Path("m.pth"), Path("out.pth"))
    assert places.default_output(Path(".."), None).name == f"{tmp_path.parent.name}.clean"


def test_a_refused_output_folder_is_not_made(tmp_path, capsys):
    out = tmp_path / "gone" / "deep" / "m.safetensors"
    assert run(["cleanse", "m.safetensors", "--data", ".", "--out", str(out)]) == 3
    assert "is not a folder: make it" in capsys.readouterr().err and not (tmp_path / "gone").exists()


def test_warnings_end_with_one_full_stop(tmp_path, record, capsys):
    early = RunRecord("scan", "not-assessed", outcome="refused", problem=Problem("m is short.", 3))
    early.write(tmp_path / "b.json")
    assert run(["report", record, "b.json", "--fail-on", "asr>=0.2"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.endswith(".") and not line.endswith("..") for line in lines)


def test_help_without_a_command_is_readable(capsys):
    assert run([]) == 2
    err = capsys.readouterr().err
    assert "Commands:\n" in err and "\\n" not in err


def test_a_reader_that_has_gone_changes_no_exit_code(record):
    reader = f"{sys.executable} -m bdclean report {record} --fail-on 'asr>=0.5'"
    script = f"exec 2>err; {reader} | true; exit ${{PIPESTATUS[0]}}"
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(["bash", "-c", script], env=env, timeout=60)
    assert done.returncode == 1 and "Traceback" not in Path("err").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_or_closed_standard_output_is_refused(record):
    for redirection in (">/dev/full", ">&-"):
        script = f"{sys.executable} -m bdclean report {record} {redirection}"
        env = {**os.environ, "PYTHONPATH": ROOT}
        done = subprocess.run(["bash", "-c", script], env=env, timeout=60, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 3, (redirection, done.stderr)
        assert "standard output" in done.stderr and "Traceback" not in done.stderr


def test_a_broken_installation_exits_70_and_leaves_a_record(tmp_path):
    (tmp_path / "typer.py").write_text("raise RuntimeError('half installed')\n")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = command("scan", "m.safetensors", "--record", "r.json", env=env)
    assert done.returncode == 70 and done.stdout == ""
    (record,) = parse_records((tmp_path / "r.json").read_text(), "r.json")
    assert record.outcome == "failed" and record.problem.exit_code == 70
    assert record.problem.digest and record.problem.digest in record.problem.message
    assert "half installed" in done.stderr


TALKING = """
import atexit, ctypes, os, subprocess, sys
from torch import nn

def talk(when):
    print(when, "printed")
    os.write(1, f"{when} written\\n".encode())
    ctypes.CDLL(None).puts(f"{when} put".encode())
    subprocess.run(["echo", when, "echoed"])

talk("import")
atexit.register(talk, "exit")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        talk("build")
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x):
        talk("forward")
        return self.body(x)
"""


@pytest.mark.slow
def test_what_a_users_network_prints_is_no_part_of_the_result(tmp_path):
    (tmp_path / "code.py").write_text(TALKING)
    shapes = {"0.weight": (4, 3, 3, 3), "0.bias": (4,), "3.weight": (3, 4), "3.bias": (3,)}
    generator = torch.Generator().manual_seed(0)
    drawn = {f"body.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(drawn, tmp_path / "m.safetensors")
    data = str(SAMPLES / "images" / "unlabeled")
    words = [
        "scan",
        "m.safetensors",
        "--data",
        data,
        "--arch",
        "code.py:Net",
        "--limit",
        "40",
        "--format",
        "json",
    ]
    done = command(*words, "--trigger", "badnets", "--preprocess", "half")
    assert done.returncode in (0, 1, 3) and len(parse_records(done.stdout, "x")[0].triggers) == 1
    for when in ("import", "build", "forward", "exit"):
        for how in ("printed", "written", "put", "echoed"):
            assert f"{when} {how}" in done.stderr, (when, how)


def test_a_broken_torch_exits_70_and_leaves_a_record(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcuda is missing')\n")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    (tmp_path / "m.safetensors").write_bytes(b"")
    done = command("scan", "m.safetensors", "--data", ".", "--format", "json", "--record", "runs/", env=env)
    assert done.returncode == 70 and "libcuda is missing" in done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    (record,) = parse_records(path.read_text(), "x")
    assert record.outcome == "failed" and record.problem.digest in done.stderr
    assert parse_records(done.stdout, "x") == [record]
    assert command("ls", "recipes", env=env).returncode == 0
    doctor = command("doctor", env=env)
    assert doctor.returncode == 3 and "libcuda is missing" in doctor.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_have_their_own_exit_codes(number, code, tmp_path):
    os.mkfifo(tmp_path / "slow.json")
    env = {**os.environ, "PYTHONPATH": ROOT}
    waiting = subprocess.Popen(
        [sys.executable, "-m", "bdclean", "report", "slow.json"], env=env, stderr=subprocess.PIPE, text=True
    )
    try:
        with open(tmp_path / "slow.json", "w"):  # opens once the other side reads
            waiting.send_signal(number)
            assert waiting.wait(30) == code
        assert "Traceback" not in waiting.communicate()[1]
    finally:
        waiting.kill()
        waiting.wait()


@pytest.mark.slow
def test_a_terminal_that_closes_leaves_a_record(tmp_path):
    """Its bars cannot be drawn any more, and it hangs up twice: the kernel's signal, then the shell's."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    words = [
        "scan",
        str(SAMPLES / "signs-badnets.safetensors"),
        "--data",
        str(SAMPLES / "images" / "labeled"),
    ]
    running = subprocess.Popen(
        [sys.executable, "-m", "bdclean", *words, "--record", "r.json"],
        env={**os.environ, "PYTHONPATH": ROOT, "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    try:
        os.close(theirs)
        shown = b""
        while b"screening" not in shown:  # it measures by now
            shown += os.read(ours, 4096)
        os.close(ours)
        for _ in range(3):
            running.send_signal(signal.SIGHUP)
            time.sleep(0.02)
        assert running.wait(60) == 129
    finally:
        running.kill()
        running.wait()
    (record,) = parse_records((tmp_path / "r.json").read_text(), "x")
    assert record.outcome == "interrupted" and record.problem.exit_code == 129
    assert record.checkpoint.sha256 and record.data.images


def test_nothing_printed_to_a_pipe_holds_escape_codes(record):
    done = command("report", record, env={"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr


def test_files_that_are_no_models_are_refused_one_by_one(tmp_path, capsys):
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04\x95" + bytes(100))
    (tmp_path / "\x1b[31mred.safetensors").write_bytes(b"\xff" * 64)
    models = sorted(path.name for path in tmp_path.iterdir())
    line = ["scan", *models, "missing.safetensors", "--data", ".", "--format", "jsonl", "--record", "runs/"]
    assert run(line) == 3
    captured = capsys.readouterr()
    records = parse_records(captured.out, "x")
    assert [r.checkpoint.path for r in records] == [*models, "missing.safetensors"]
    assert {r.outcome for r in records} == {"refused"} and {r.verdict for r in records} == {"not-assessed"}
    assert "\x1b" not in captured.err and len(captured.err.splitlines()) == 4
    assert len(list((tmp_path / "runs").iterdir())) == 4
    assert all(record.problem.message.endswith(".") for record in records)


def test_scanning_the_samples_tells_them_apart(capsys):
    listed = json.loads((SAMPLES / "manifest.json").read_text())
    samples = {sample["attack"]: sample for sample in listed if sample["kind"] == "classifier"}
    clean, poisoned = str(SAMPLES / samples[None]["file"]), str(SAMPLES / samples["badnets"]["file"])
    options = ["--data", str(SAMPLES / "images" / "labeled"), "--limit", "240", "--format", "json", "-q"]
    options += ["--trigger", samples["badnets"]["trigger"]]
    assert run(["scan", clean, *options, "--no-pictures"]) == 0
    (found,) = parse_records(capsys.readouterr().out, "x")
    assert found.pictures == [] and found.confusion, "counts are no pictures"
    assert found.verdict == "no-evidence" and found.checkpoint.sha256 == samples[None]["sha256"]
    assert run(["scan", clean, "missing", poisoned, *options]) == 1
    captured = capsys.readouterr()
    records = parse_records(captured.out, "x")
    assert [r.verdict for r in records] == ["no-evidence", "not-assessed", "backdoored"]
    stamped = [p for p in records[2].pictures if p.role == "stamped"]
    assert len(stamped) == 6 and {p.before for p in stamped} == {samples["badnets"]["target"]}
    assert sum(len(p.png_base64) for p in records[2].pictures) < 300_000
    assert records[2].triggers[0].target == samples["badnets"]["target"]
    assert captured.err.splitlines() == ["bdclean: missing: missing does not exist."]


def test_a_refused_cleanse_leaves_its_record_beside_the_output_and_no_other(tmp_path, capsys):
    (tmp_path / "m.safetensors").write_bytes(b"")
    assert run(["cleanse", "m.safetensors", "--data", "."]) == 3
    (record,) = parse_records(Path("m.clean.json").read_text(), "x")
    assert record.command == "cleanse" and record.outcome == "refused"
    assert capsys.readouterr().out == "" and not Path("m.clean.safetensors").exists()


def test_text_that_cannot_be_encoded_is_escaped(tmp_path):
    RunRecord("scan", advice="größer").write(tmp_path / "a.json")
    done = command("report", "a.json", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and "gr\\xf6\\xdfer" in done.stdout


def test_a_value_no_run_can_have_is_refused():
    with pytest.raises(UsageError):
        arguments.check_inputs(Inputs(kind="encodr"))
