"""Every test runs in its own empty folder, on one thread: two libraries' threads on a small machine fight."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pytest_collection_finish(session):
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
