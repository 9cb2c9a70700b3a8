"""What README says of the tool is what the tool says of itself; its tables are there, and benches write them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bdclean
from bdclean.bench import __main__ as bench
from bdclean.bench import tables
from bdclean.cli.main import run as cli
from bdclean.registry import RECIPES

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
PACKAGE = Path(bdclean.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = sorted((ROOT / "sample_models" / "tables").glob("*.md"))


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_it_is_read_in_two_minutes():
    assert len(README.encode()) <= 12_000


def test_every_recipe_is_named():
    heads = re.findall(r"^\* ((?:`[a-z0-9-]+`(?:, )?)+): ", section("Recipes"), re.MULTILINE)
    assert sorted(re.findall(r"[a-z0-9-]+", " ".join(heads))) == sorted(RECIPES)


def test_the_map_names_every_room_and_no_other():
    tree = section("Map of the code").split("    sample_models/")[0]
    rooms = set(re.findall(r"^ {6}([a-z]+)/", tree, re.MULTILINE))
    assert rooms == {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    files = set(re.findall(r"\b[a-z_]+\.py\b", tree))
    assert files == {file.name for file in PACKAGE.glob("*.py") if not file.name.startswith("_")}


def test_every_link_leads_somewhere():
    for file in (ROOT / "README.md", *TABLES):
        for link in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
            assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_every_table_is_linked():
    assert all(f"(sample_models/tables/{file.name})" in README for file in TABLES)


def test_every_verdict_and_exit_code_is_there():
    codes = set(map(int, re.findall(r"\d+", " ".join(re.findall(r"^\| ([\d, ]+) \|", README, re.MULTILINE)))))
    assert codes == {0, 1, 2, 3, 70, 129, 130, 143}
    assert all(
        f"`{verdict}`" in README for verdict in ("no-evidence", "backdoored", "suspicious", "not-assessed")
    )
    assert 'The words "clean" and "safe" are never a verdict' in README
    assert "those that were not tried are not excluded" in " ".join(README.split())


@pytest.mark.parametrize("command", re.findall(r"\.venv/bin/.*", section("Try it")))
def test_the_commands_to_try_name_what_is_there(command):
    for path in re.findall(r"sample_models/[\w./-]+", command):
        assert (ROOT / path).exists()


@pytest.mark.slow
def test_the_output_shown_is_what_scan_says():
    shown = section("Try it").partition("    $ bdclean ")[2]
    words, _, shown = shown.partition("\n")
    ended = subprocess.run(
        [sys.executable, "-m", "bdclean", *words.split(), "-q"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == 1
    said, shown = " ".join(ended.stdout.split()), [" ".join(part.split()) for part in shown.split("\n\n")]
    assert shown[0] in said and shown[-1] in said
    for rate in re.findall(r"\d[\d.]* \([\d.]+-[\d.]+, n \d+\)|highest [\d.]+, median [\d.]+", shown[1]):
        assert rate in said


def test_what_pipelines_type_can_be_typed(tmp_path):
    """Each command of the last section, as the workflow, the hook and the rule of make start it."""
    said = section("In a pipeline")
    (line,) = re.findall(r"^ +- run: (.*) > bdclean.sarif$", said, re.MULTILINE)
    (entry,) = re.findall(r"entry: (bdclean [^}]*)}", said)
    (rule,) = re.findall(r"^    (%.*\n)    (\t.*\n)", said, re.MULTILINE)
    tool = f"{sys.executable} -m bdclean "
    (tmp_path / "Makefile").write_text("".join(rule).replace("bdclean cleanse", f"{tool}cleanse"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.safetensors").write_bytes(b"")
    for command, code, there in (
        (line.replace("bdclean ", tool), 3, '"version": "2.1.0"'),
        (f"{entry.replace('bdclean ', tool)} models/a.safetensors models/none.safetensors", 3, ""),
        ("make -s models/a.clean.safetensors", 2, ""),  # of make itself, for the 3 of bdclean
    ):
        env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
        script = ["bash", "-o", "pipefail", "-c", command]
        done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == code and there in done.stdout, done.stderr
        assert "images does not exist" in done.stderr or "Error 3" in done.stderr, done.stderr


def test_the_project_file_shown_is_one_that_is_read(tmp_path, capsys, monkeypatch):
    file = re.search(
        r"(?:^    .*\n)+\Z", section("In a pipeline").split("MIT licence")[0].rstrip() + "\n", re.MULTILINE
    )
    text = re.sub("^    ", "", file[0], flags=re.MULTILINE).replace("...", "ab" * 32)
    (tmp_path / "bdclean.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert cli(["scan", "m.safetensors", "--data", "."]) == 3
    assert "bdclean.toml has defaults for --fail-on." in capsys.readouterr().err


# --- tables ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Runs the bench `rule` on two records, with more words."""
    for name, verdict in (("net-clean", "no-evidence"), ("net-patch", "backdoored")):
        checkpoint = {"path": f"/somewhere/{name}.safetensors", "classes": 10}
        record = {"schema": "bdclean.run/1", "command": "scan", "verdict": verdict, "checkpoint": checkpoint}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))

    def run(*words):
        records = [str(tmp_path / "net-clean.json"), "net-patch.json"]
        monkeypatch.setattr(sys, "argv", ["bench", "rule", *records, *words])
        return bench.main()

    return run


ROWS = [
    "| net-clean | 10 | no | no-evidence | 0 | 0 | 0 | 0 |",
    "| net-patch | 10 | yes | backdoored | 0 | 0 | 0 | 0 |",
]


def test_a_bench_writes_its_table_with_what_is_needed_to_make_it_again(counted, capsys):
    assert counted("--table", "rule.md") == 0
    printed, written = capsys.readouterr().out, Path("rule.md").read_text(encoding="utf-8")
    assert all(row in printed for row in ROWS) and printed.strip() in written
    assert "    python -m bdclean.bench rule net-clean.json net-patch.json --table rule.md\n" in written
    for start in (
        "# How often",
        "* Seed: that of each record",
        "* n: images",
        "* Machine: device ",
        "* Date: 20",
    ):
        assert f"\n{start}" in written
    assert re.search(r"\n\* Commit: ([0-9a-f]{7,}( and what was changed since)?|unknown)\n", written)
    assert not list(Path().glob(".*.part"))


def test_only_the_part_that_the_bench_made_is_replaced(counted):
    Path("rule.md").write_text(f"mine\n\n{tables.BEGIN}\nold\n{tables.END}\n\nmine, too\n", encoding="utf-8")
    counted("--table=rule.md")
    once = Path("rule.md").read_text(encoding="utf-8")
    assert once.startswith("mine\n\n" + tables.BEGIN) and once.endswith(tables.END + "\n\nmine, too\n")
    assert "old" not in once and ROWS[0] in once
    counted("--table=rule.md")
    assert Path("rule.md").read_text(encoding="utf-8") == once


@pytest.mark.parametrize("content", ["mine\n", f"{tables.BEGIN}\nno end\n", f"{tables.END}{tables.BEGIN}"])
def test_a_file_without_the_marks_is_left_alone_before_anything_is_measured(counted, capsys, content):
    Path("rule.md").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match="without the marks"):
        counted("--table", "rule.md")
    assert Path("rule.md").read_text(encoding="utf-8") == content and not capsys.readouterr().out


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(counted, capsys):
    with pytest.raises(SystemExit, match="no folder"):
        counted("--table", "nowhere/rule.md")
    assert not capsys.readouterr().out


def test_a_bench_that_breaks_leaves_the_table_as_it_was(counted):
    Path("rule.md").write_text(f"{tables.BEGIN}\nold\n{tables.END}\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError):
        counted("missing.json", "--table", "rule.md")
    assert "old" in Path("rule.md").read_text(encoding="utf-8")


def test_without_a_file_a_bench_prints_alone(counted, capsys):
    assert counted() == 0
    printed = capsys.readouterr().out
    assert all(row in printed for row in ROWS)
    assert not list(Path().glob("*.md"))


def test_seed_and_device_are_those_of_the_command():
    text = tables.heading("cifar10", ["--data", "/a/b/cifar10.tar.gz", "--seed", "7", "--device=cpu"], "abc")
    assert "* Seed: 7\n" in text and text.endswith("* Commit: abc")
    assert "    python -m bdclean.bench cifar10 --data cifar10.tar.gz --seed 7 --device=cpu\n" in text


def test_every_bench_has_words_and_a_table():
    assert set(tables.ABOUT) == set(bench.DRIVERS)
    assert set(bench.DRIVERS) <= {file.stem for file in TABLES}


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
def test_every_table_says_how_and_on_what_it_was_made(file):
    text = file.read_text(encoding="utf-8")
    assert "\n* Commit: " in text and "\n* Date: " in text
    if file.stem in bench.DRIVERS:
        assert (
            f"\n# {tables.ABOUT[file.stem].title}\n" in text and tables.BEGIN in text and tables.END in text
        )
        assert f"--table sample_models/tables/{file.name}\n" in text
    else:
        assert "**No bench makes this table" in text and re.search(r"\n\* Commit: \*\*[0-9a-f]{7}", text)
