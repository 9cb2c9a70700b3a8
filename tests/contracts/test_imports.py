"""What must stay light and what must stay apart, asked of a fresh interpreter."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bdclean

ROOT = Path(bdclean.__file__).parent
SOURCE = Path(__file__).parents[2]


def python(code, *arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, timeout=60
    )


HEAVY = (
    "bad = {'torch', 'torchvision', 'numpy', 'scipy', 'PIL', 'jinja2', 'matplotlib'} & set(sys.modules); "
    "assert not bad, bad"
)


def test_help_ls_and_report_import_no_torch(tmp_path):
    from bdclean.record.run import RunRecord

    RunRecord("scan").write(tmp_path / "a.json")
    code = f"""
import sys
from bdclean.cli.main import run
lines = ["--help", "scan --help", "cleanse --help", "ls recipes", "ls triggers", "ls detectors", "ls architectures",
         "ls schema", "ls recipe bcu", "ls recipe inoculate", "ls trigger badnets",
         "report a.json a.json --format table", "report a.json --format md", "report a.json --format json",
         "report a.json --format sarif"]
for line in lines:
    assert run(line.split()) == 0, line
{HEAVY}
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_usage_is_checked_before_torch_is_imported():
    code = f"import sys; from bdclean.cli.main import run; assert run(sys.argv[1:]) == 2; {HEAVY}"
    done = python(code, "scan", "m.safetensors", "--data", ".", "--trigger", "badnetz")
    assert done.returncode == 0, done.stderr
    assert "did you mean badnets" in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "scan missing --data .",
        "scan m --data missing",
        "scan m --test missing/part",
        "scan m --labeled . --classes missing",
        "scan m --data . --reference missing",
        "scan m --data . --trigger file:missing.png",
        "cleanse missing --data .",
        "cleanse m --data missing",
    ],
)
def test_a_slip_in_a_path_is_told_before_torch_is_imported(line, tmp_path):
    (tmp_path / "m").write_bytes(b"no network")
    code = f"import sys; from bdclean.cli.main import run; assert run(sys.argv[1:]) == 3; {HEAVY}"
    done = python(code, *line.split(), "--record", "runs/")
    assert done.returncode == 0 and "missing" in done.stderr, done.stderr
    (record,) = (tmp_path / "runs").iterdir()
    assert ("unread" in record.name) == ("missing --data" in line)


LIGHT = (
    "cli",
    "record",
    "report",
    "registry",
    "errors",
    "progress",
    "files.text",
    "files.weights",
    "runs.options",
    "runs.places",
)


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_import_nothing_heavy(room):
    code = f"""
import importlib, pkgutil, sys
room = importlib.import_module("bdclean.{room}")
for found in pkgutil.walk_packages(getattr(room, "__path__", ()), "bdclean.{room}."):
    importlib.import_module(found.name)
assert "importlib.metadata" not in sys.modules
{HEAVY}
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_tests_take_no_private_name_of_ours():
    """What can be seen from outside is tested from outside."""
    taken = []
    for file in sorted((SOURCE / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bdclean"):
                taken += [
                    f"{file.name}: {a.name}" for a in node.names if a.name[0] == "_" and a.name[1] != "_"
                ]
    assert not taken


def test_there_is_no_room_for_leftovers():
    words = ("util", "helper", "common", "core", "base", "misc")
    stems = [p.relative_to(ROOT) for p in ROOT.rglob("*.py")]
    assert not [
        p for p in stems if p.stem.strip("_") in words or p.stem.strip("_") in [f"{w}s" for w in words]
    ]


@pytest.mark.skipif(not (SOURCE / "pyproject.toml").is_file(), reason="no source tree beside the tests")
def test_version_and_entry_point_agree_with_the_package():
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    assert project["version"] == bdclean.__version__
    assert project["scripts"]["bdclean"] == "bdclean.__main__:main"
