"""A file is whole or absent, whatever happens while it is written, and only one run writes an output."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import bdclean
from bdclean.errors import Interrupted, Refused
from bdclean.files.writing import alone, check, is_special, replace, sweep, write_text

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(bdclean.__file__).parent.parent)}


def child(code, *arguments):
    """A Python that has run `code` up to where it prints `ready`, and goes on when its standard input is closed."""
    start = "import sys\nfrom pathlib import Path\nfrom bdclean.files.writing import *\n"
    started = subprocess.Popen(
        [sys.executable, "-c", start + code, *arguments],
        env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = started.stdout.readline()
    if line != "ready\n":
        end(started)
        raise AssertionError(line)
    return started


HALFWAY = """
def write(stream):
    stream.write(b"half")
    stream.flush()
    print("ready", flush=True)
    sys.stdin.read()
    stream.write(b" and whole")
replace(Path(sys.argv[1]), write)
"""
HOLDING = """
with alone(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


def end(process, number=None):
    if number:
        process.send_signal(number)
    process.communicate()
    return process.returncode


@pytest.mark.parametrize(
    "raised", [OSError(28, "No space left on device"), KeyboardInterrupt(), Interrupted(), ValueError("x")]
)
@pytest.mark.parametrize("before", [None, "old"])
def test_what_goes_wrong_while_writing_changes_nothing(tmp_path, raised, before):
    path = tmp_path / "out"
    if before:
        path.write_text(before)

    def write(stream):
        stream.write(b"half")
        raise raised

    with pytest.raises(Refused if isinstance(raised, OSError) else type(raised)) as caught:
        replace(path, write)
    assert not isinstance(raised, OSError) or "out cannot be written: the disk is full" in str(caught.value)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_a_new_file_is_as_readable_as_any_other(tmp_path):
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "x")
    finally:
        os.umask(mask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "file")
    for text in ("one", "two"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "deep" / "file").read_text() == text
    assert os.listdir(tmp_path / "deep") == ["file"]


def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert is_special(tmp_path / "pipe") and is_special(Path("/dev/null")) and not is_special(tmp_path)
    check(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "the report")
    reader.join()
    assert read == ["the report"] and is_special(tmp_path / "pipe")
    write_text(Path("/dev/null"), "x")
    assert is_special(Path("/dev/null"))


def test_a_name_as_long_as_can_be_is_written(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        write_text(tmp_path / name, "x")
        assert os.listdir(tmp_path) == [name]
        (tmp_path / name).unlink()


def test_what_a_killed_run_left_is_swept_and_what_another_writes_is_not(tmp_path):
    path = tmp_path / "out.json"
    (tmp_path / ".other.json.0123.part").write_text("x")
    killed, writing = child(HALFWAY, str(path)), child(HALFWAY, str(path))
    assert len(list(tmp_path.glob(".out.json.*.part"))) == 2
    end(killed, signal.SIGKILL)
    sweep(path)
    assert len(list(tmp_path.glob(".out.json.*.part"))) == 1
    assert end(writing) == 0 and path.read_text() == "half and whole"
    sweep(path)
    assert sorted(os.listdir(tmp_path)) == [".other.json.0123.part", "out.json"]


def test_a_second_run_is_refused_naming_the_first(tmp_path):
    path = tmp_path / "out"
    first = child(HOLDING, str(path))
    (tmp_path / "link").symlink_to(path)
    for name in ("out", "link"):  # another name of the same output
        with pytest.raises(Refused, match=rf"{name} is being written by another run \(process {first.pid}\)"):
            with alone(tmp_path / name):
                pass
    assert end(first) == 0 and sorted(os.listdir(tmp_path)) == ["link"]
    with alone(path):
        assert (tmp_path / "out.lock").read_text() == f"{os.getpid()}\n"
    assert sorted(os.listdir(tmp_path)) == ["link"]


def test_the_lock_of_a_killed_run_keeps_nobody_out(tmp_path):
    path = tmp_path / "out"
    first = child(HOLDING, str(path))
    end(first, signal.SIGKILL)
    assert os.listdir(tmp_path) == ["out.lock"]
    (tmp_path / "out.lock").write_text("1\n")  # the number of a process that lives proves nothing
    with alone(path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "out.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(Refused, match="out.lock cannot be made"):
        with alone(tmp_path / "out"):
            pass
    assert (tmp_path / "precious").read_text() == "x"


def test_only_one_of_many_gets_the_lock_and_each_in_the_end(tmp_path):
    """Taking turns, with the lock file deleted and made again each time, no two are ever in at once."""
    code = """
import time, os
print("ready", flush=True)
done = 0
while done < 40:
    try:
        with alone(Path(sys.argv[1])):
            os.mkdir(sys.argv[2])  # fails where another is in
            os.rmdir(sys.argv[2])
            done += 1
    except Refused:
        time.sleep(0.001)
"""
    runs = [child(code, str(tmp_path / "out"), str(tmp_path / "inside")) for _ in range(3)]
    assert [end(run) for run in runs] == [0, 0, 0]
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_places_where_nothing_can_be_written_are_refused_before_work():
    with pytest.raises(Refused, match="/proc/x cannot be written: no file can be made in /proc"):
        check(Path("/proc/x"))


def test_no_permission_is_refused_before_work(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    tmp_path.chmod(0o755)
    if os.geteuid():
        with pytest.raises(Refused, match=r"permission denied"):
            check(tmp_path / "shut" / "x")
        return
    code = f"""
import os
os.setuid(65534)
try:
    check(Path({str(tmp_path / "shut" / "x")!r}))
except Refused as error:
    print("ready" if "cannot be written" in str(error) and "ermission" in str(error) else error)
"""
    end(child(code))
