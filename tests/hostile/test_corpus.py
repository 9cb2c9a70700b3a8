"""Every hostile file of the corpus: one sentence, nothing written, bounded time and memory."""

import os
from pathlib import Path

import pytest

from hostile.case import prepare
from hostile.make import cases
from hostile.runner import Runner

ALL = cases()
FAST = 16  # every so many of the quick cases run in the fast suite; all of them with -m slow


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    made = Runner(tmp_path_factory.mktemp("runner"))
    yield made
    made.close()


def chosen(fast):
    quick = [case for case in ALL if not case.slow]
    picked = quick[::FAST]
    return [pytest.param(case, id=case.name) for case in (picked if fast else ALL)]


def check(case, folder, runner):
    prepare(folder)
    case.write(folder)
    before, size = sorted(os.listdir(folder)), on_disk(folder)
    ended = runner.run(list(case.argv), folder)
    assert ended.code in case.codes, ended
    lines = ended.err.splitlines()
    assert all(line.startswith("bdclean: ") and line.isprintable() for line in lines), ended.err
    if case.refused:
        assert ended.out == "" and len(lines) == 1 and lines[0].endswith("."), ended
    assert case.said in ended.err
    assert len(ended.err) < 1500
    assert ended.cpu < case.seconds
    assert ended.peak < 2 * size + case.memory, f"{ended.peak:,} bytes for files of {size:,}"
    assert [name for name in sorted(os.listdir(folder)) if name not in before] in ([], ["r.json"])
    assert not Path("/tmp/owned").exists()


def on_disk(folder):
    """Bytes of all files there, as far as they are on the disk: a sparse file has few."""
    found = 0
    for path, _, files in os.walk(folder):
        for name in files:
            status = os.lstat(os.path.join(path, name))
            found += min(status.st_size, status.st_blocks * 512)
    return found


def test_names_are_unique_and_every_kind_is_there():
    names = [case.name for case in ALL]
    assert len(set(names)) == len(names) > 450
    kinds = {name.split("-")[0] for name in names}
    assert kinds >= {
        "header",
        "weights",
        "index",
        "model",
        "config",
        "picture",
        "tar",
        "npz",
        "trigger",
        "resume",
    }


@pytest.mark.parametrize("case", chosen(fast=True))
def test_some(case, tmp_path, runner):
    check(case, tmp_path, runner)


@pytest.mark.slow
@pytest.mark.parametrize("case", chosen(fast=False))
def test_all(case, tmp_path, runner):
    check(case, tmp_path, runner)
