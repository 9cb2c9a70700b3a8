"""Every test runs in its own empty folder, on one thread: two libraries' threads on a small machine fight."""

import os
import signal
import tarfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A suite in a shell's background, or under nohup, inherits ignored signals, and would hand that on to the commands
# that it interrupts.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pytest_collection_finish(session):
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    """CIFAR-10's test images, one folder a class: from the folder or the archive that BDCLEAN_CIFAR10 names."""
    named = os.environ.get("BDCLEAN_CIFAR10")
    if not named:
        pytest.skip("BDCLEAN_CIFAR10 names neither a folder nor an archive of CIFAR-10")
    if Path(named).is_dir():
        return Path(named) / "test"
    folder = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(named) as archive:
        members = [m for m in archive if m.name.removeprefix("./").startswith("test")]
        archive.extractall(folder, members, filter="data")
    return folder / "test"
