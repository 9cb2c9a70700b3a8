import re
import subprocess

import bdclean
from bdclean.cli import version
from bdclean.cli.main import run


def test_the_version_is_said_with_its_commit_where_there_is_one(capsys):
    assert run(["--version"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(rf"bdclean {re.escape(bdclean.__version__)}( \([0-9a-f]{{7,40}}(-dirty)?\))?\n", said)


def test_what_the_build_recorded_comes_before_what_is_checked_out(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    monkeypatch.setattr(version, "PACKAGE", tmp_path / "bdclean")
    monkeypatch.setattr(version, "RECORDED", tmp_path / "bdclean" / "commit.txt")
    assert version.named() == bdclean.__version__
    (tmp_path / "bdclean").mkdir()
    subprocess.run([*git, "init", "-q"], check=True)
    assert version.named() == bdclean.__version__  # without any commit yet
    (tmp_path / "a").write_text("a")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "a", "--no-verify"], check=True)
    asked = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
    assert version.named() == f"{bdclean.__version__} ({asked.stdout.strip()})"
    (tmp_path / "a").write_text("b")
    assert version.named().endswith("-dirty)")
    (tmp_path / "bdclean" / "commit.txt").write_text("abcdef0\n")
    assert version.named() == f"{bdclean.__version__} (abcdef0)"
