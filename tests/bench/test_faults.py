"""`cleanse` under faults at exact moments: the input is untouched, the output whole or absent, and --resume goes on."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bdclean
from bdclean.cli.main import run
from bdclean.errors import Interrupted
from bdclean.files.writing import alone
from bdclean.record.parsing import parse_records
from bdclean.training import loop

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
ROOT = str(Path(bdclean.__file__).parent.parent)
IMAGES = str(SAMPLES / "images" / "labeled")
MODEL = "signs-badnets.safetensors"
LINE = [
    "cleanse", MODEL, "--labeled", IMAGES, "--limit", "30", "--recipe", "ft", "--set", "epochs=2",
    "--set", "batch_size=8", "--trigger", "badnets:size=3", "--preprocess", "half", "--precision", "fp32",
    "--device", "cpu", "--format", "json", "-q", "--out", "out.safetensors",
]  # fmt: skip

# Imports torch once, then forks a child for every run. A run is {folder, line, at, count, do} and
# may start in a copy of another folder: when the child opens or
# renames a file that `at` matches, for the count-th time, it does `do`.
DRIVER = """
import json, os, re, resource, shutil, sys
import bdclean.runs.cleanse, bdclean.training.resume, bdclean.recipes.ft, bdclean.triggers.badnets
import torch._dynamo
from bdclean.cli.main import run

bdclean.training.resume.SAVE_EVERY_SECONDS = -1.0

def fill(leave):
    room = shutil.disk_usage(".").free
    with open("ballast", "wb") as file:
        file.write(bytes(max(0, room - leave)))

def limit_memory(more):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)

def fail(kind):
    raise kind("a fault")

def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)

def watch(at, count, do):
    seen = []
    def hook(event, values):
        if event in ("open", "os.rename") and re.search(at, f"{event} {values[0]}"):
            seen.append(event)
            if len(seen) == count:
                eval(do)
    sys.addaudithook(hook)

codes = []
for case in json.load(sys.stdin):
    if "copy" in case:
        shutil.copytree(case["copy"], case["folder"], dirs_exist_ok=True)
    child = os.fork()
    if child == 0:
        os.chdir(case["folder"])
        for number, name in ((1, "stdout"), (2, "stderr")):
            place = case.get("logs", ".") + "/" + name
            os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if case.get("do"):
            watch(case["at"], case.get("count", 1), case["do"])
        os._exit(run(case["line"]))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""

STATE = r"open .*/\.out\.safetensors\.resume\.safetensors\.\w+\.part"
OUTPUT = r"open .*/\.out\.safetensors\.[0-9a-f]{8}\.part"
RENAMING = OUTPUT.replace("open", "os.rename")
RECORD = r"open .*/\.out\.json\."
READ_BACK = r"open out\.safetensors$"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def play(cases):
    """Runs each {folder: Path, ...}, one after another, and returns their exit codes."""
    for case in cases:
        case["folder"].mkdir(exist_ok=True)
        shutil.copy(SAMPLES / MODEL, case["folder"] / MODEL)
    told = [{"line": LINE, **case, "folder": str(case["folder"])} for case in cases]
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(told), env=environment,
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(folder, whole, code, left=()):
    """The input is as it was; the output whole or absent; what is left is `left`; the record tells how it ended."""
    assert digest(folder / MODEL) == digest(SAMPLES / MODEL)
    out = folder / "out.safetensors"
    assert not out.exists() or whole is None or digest(out) == whole
    others = {MODEL, "stdout", "stderr", "ballast", "out.safetensors", "out.json"}
    assert sorted({path.name for path in folder.iterdir()} - others) == sorted(left)
    assert "Traceback" not in (folder / "stderr").read_text() or code == 70
    (record,) = parse_records((folder / "out.json").read_text(), "out.json")
    assert record.exit_code == code
    return record


RESUME = ("out.safetensors.resume.json", "out.safetensors.resume.safetensors")
FAULTS = {
    "Ctrl-C while images are read": ({"at": "open .*labeled/.*png", "count": 10, "do": "send(2)"}, 130, ()),
    "SIGTERM while the output is written": ({"at": OUTPUT, "do": "send(15)"}, 143, RESUME),
    "SIGHUP before the output is renamed": ({"at": RENAMING, "do": "send(1)"}, 129, RESUME),
    "Ctrl-C twice in training": ({"at": STATE, "count": 3, "do": "send(2, 2)"}, 130, RESUME),
    "SIGTERM in training": ({"at": STATE, "count": 2, "do": "send(15)"}, 143, RESUME),
    "a defect after the output": ({"at": READ_BACK, "do": "fail(ZeroDivisionError)"}, 70, RESUME),
    "no memory for more images": (
        {"at": "open .*labeled/.*png", "count": 5, "do": "limit_memory(0)"},
        3,
        (),
    ),
    "no memory for the output": ({"at": OUTPUT, "do": "fail(MemoryError)"}, 3, RESUME),
}


@pytest.mark.slow
def test_faults_at_exact_moments_lose_nothing(tmp_path):
    folders = {name: tmp_path / str(number) for number, name in enumerate(FAULTS)}
    cases = [{"folder": folders[name], **fault} for name, (fault, _, _) in FAULTS.items()]
    resumed = [
        {
            "folder": tmp_path / f"{folders[name].name} again",
            "copy": str(folders[name]),
            "line": [*LINE, "--resume"],
        }
        for name in ("SIGTERM while the output is written", "Ctrl-C twice in training")
    ]
    (tmp_path / "gone" / "records").mkdir(parents=True)
    vanished = {"folder": tmp_path / "gone", "at": OUTPUT, "do": "os.rmdir('records')"}
    vanished["line"] = [*LINE, "--record", "records/out.json"]
    codes = play([{"folder": tmp_path / "whole"}, *cases, *resumed, vanished])
    whole = digest(tmp_path / "whole" / "out.safetensors")
    ended = check(tmp_path / "whole", whole, codes[0])
    assert ended.outcome == "ran" and codes[1:-3] == [code for _, code, _ in FAULTS.values()]
    for name, (_, code, left) in FAULTS.items():
        record = check(folders[name], whole, code, left)
        began = name not in ("Ctrl-C while images are read", "no memory for more images")
        assert (record.before is not None and record.before.triggers == ended.before.triggers) == began, name
        assert (folders[name] / "out.safetensors").exists() == (code == 70)
        assert code != 70 or (record.curve == ended.curve and record.output == ended.output)
    for case, code in zip(resumed, codes[-3:-1], strict=True):
        record = check(case["folder"], whole, codes[0])
        assert code == codes[0] and record.curve == ended.curve and record.rows() == ended.rows()
    assert codes[-1] == codes[0] and (tmp_path / "gone" / "records" / "out.json").exists()


@pytest.fixture
def small_disks(tmp_path):
    """Makes file systems of 3 MB."""
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("a file system can only be mounted by root")
    mounted = []

    def make(name):
        place = tmp_path / name
        place.mkdir()
        mounting = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
        done = subprocess.run(mounting, capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", place], check=True)


FULL = {  # a fault, and what of the run is whole after it
    "from the start": ({"at": "out.safetensors.lock", "do": "fill(0)"}, 3, False),
    "at the state": ({"at": STATE, "do": "fill(100_000)"}, 3, False),
    "at the third state": ({"at": STATE, "count": 3, "do": "fill(100_000)"}, 3, False),
    "at the output": ({"at": OUTPUT, "do": "fill(100_000)"}, 3, False),
    "at the record": ({"at": RECORD, "do": "fill(0)"}, 1, True),
}


@pytest.mark.slow
def test_a_full_disk_loses_nothing(small_disks, tmp_path):
    disks = {name: small_disks(f"disk{number}") for number, name in enumerate(FULL)}
    logs = {name: tmp_path / f"logs{number}" for number, name in enumerate(FULL)}
    for place in logs.values():
        place.mkdir()
    cases = [
        {"folder": disks[name], "logs": str(logs[name]), **fault} for name, (fault, _, _) in FULL.items()
    ]
    codes = play(cases)
    for name, exited in zip(FULL, codes, strict=True):
        _, code, whole = FULL[name]
        disk, said = disks[name], (logs[name] / "stderr").read_text()
        assert exited == code and digest(disk / MODEL) == digest(SAMPLES / MODEL), name
        assert "the disk is full" in said or "MB are free" in said, name
        assert (disk / "out.safetensors").exists() == whole and not list(disk.glob(".*")), name
        (disk / "ballast").unlink()
    resumed = [{"folder": disk, "line": [*LINE, "--resume"]} for disk in disks.values()]
    codes = play([*resumed, {"folder": tmp_path / "other"}])  # the last one on another file system
    assert codes == [1] * len(codes)
    for disk in disks.values():
        assert check(disk, digest(tmp_path / "other" / "out.safetensors"), 1).outcome == "ran"


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["full", "read-only"])
def test_what_cannot_be_written_never_ends_as_no_evidence(small_disks, reading):
    """A scan whose verdict is no-evidence, and a report: the record or page has no room, or may not be written."""
    disk = small_disks("disk")
    if reading == "full":
        (disk / "ballast").write_bytes(bytes(3 << 20))
    else:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    images = SAMPLES / "images" / "labeled"
    scanned = [
        "scan",
        SAMPLES / "signs-clean.safetensors",
        "--data",
        images,
        "--trigger",
        "badnets",
        "-q",
        "--limit",
        "60",
    ]
    record = disk.parent / "r.json"
    assert command(*map(str, [*scanned, "--record", record])).returncode == 0
    for words in (
        [*scanned, "--record", disk],
        [*scanned, "--record", disk / "r.json"],
        [*scanned, "--out", disk / "r.html"],
        ["report", record, "--out", disk / "audit.html"],
    ):
        done = command(*map(str, words))
        assert done.returncode == 3 and "cannot be written" in done.stderr, words
        assert reading.replace("full", "the disk is full") in done.stderr, words
        assert [path.name for path in disk.iterdir() if path.name != "ballast"] == [], words


def command(*words, **more):
    environment = {**os.environ, "PYTHONPATH": ROOT}
    return subprocess.run(
        [sys.executable, "-m", "bdclean", *words], env=environment, capture_output=True, text=True, timeout=300,
        check=False, **more,
    )  # fmt: skip


def test_a_second_run_on_the_same_output_is_refused(tmp_path):
    shutil.copy(SAMPLES / MODEL, tmp_path / MODEL)
    with alone(tmp_path / "out.safetensors"):
        done = command(*LINE)
    assert done.returncode == 3 and done.stdout == ""
    assert f"out.safetensors is being written by another run (process {os.getpid()})" in done.stderr
    assert os.listdir(tmp_path) == [MODEL]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scan", MODEL, "--data", ".", "--out", "gone/r.md"], "gone is not a folder: make it"),
        (["scan", MODEL, "--data", ".", "--record", "gone/r.json"], "gone is not a folder: make it"),
        (["cleanse", MODEL, "--data", ".", "--out", "gone/o.safetensors"], "gone is not a folder: make it"),
        (["cleanse", MODEL, "--data", ".", "--out", "/dev/null"], "no regular file"),
        (["cleanse", MODEL, "--data", ".", "--out", "n" * 240], "too long"),
        (["cleanse", MODEL, "--data", ".", "--out", "a", "--record", "a.resume.json"], "resume state"),
    ],
)
def test_places_are_refused_before_work_and_nothing_is_made(tmp_path, capsys, words, said):
    code = run(words)
    captured = capsys.readouterr()
    assert code == (2 if "resume state" in said else 3) and said in captured.err and captured.out == ""
    assert os.listdir(tmp_path) == []


def test_a_state_that_is_not_used_is_announced(tmp_path, capsys):
    (tmp_path / "o.safetensors.resume.safetensors").write_bytes(b"x")
    assert run(["cleanse", MODEL, "--data", ".", "--out", "o.safetensors"]) == 3
    assert "is not used and will be replaced: --resume goes on" in capsys.readouterr().err
    assert (tmp_path / "o.safetensors.resume.safetensors").exists()


def test_closed_streams_are_refused_before_work_and_never_written_into(tmp_path):
    shutil.copy(SAMPLES / MODEL, tmp_path / MODEL)
    line = " ".join([sys.executable, "-m bdclean cleanse", MODEL, "--data . --out o.safetensors"])
    for closed in (">&-", ">&- 2>&-", "<&- >&- 2>&-"):
        environment = {**os.environ, "PYTHONPATH": ROOT}
        done = subprocess.run(["bash", "-c", f"{line} {closed}"], env=environment, timeout=300, check=False)
        assert done.returncode == 3
    assert os.listdir(tmp_path) == [MODEL]


def test_a_terminal_that_hangs_up_twice_has_hung_up_once():
    with loop.deferred_signals() as caught:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught == [signal.SIGHUP]
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_nohup_is_obeyed(tmp_path, capsys):
    """A run that was told to ignore SIGHUP goes on ignoring it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.deferred_signals() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught == []
        run(["ls", "recipes"])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
