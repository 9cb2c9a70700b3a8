"""What is known of Windows and macOS, asked of an interpreter that lacks what only a POSIX system has.

Not tried, because there was no such machine: scratch files behind a map (an open file deletes itself otherwise there),
locks (Windows has none here: two runs into one output are not told apart, and what a killed run left half-written
stays), how much memory is free (taken for 4 GiB on Windows), lists of models in a code page, Ctrl-C, live progress.
"""

import ast
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import bdclean

ROOT = Path(bdclean.__file__).parent
SAMPLES = Path(__file__).parents[2] / "sample_models"
MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
OS = (
    "O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC WNOHANG chown chroot confstr ctermid fchmod fchown fork "
    "forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp getpriority getresuid getsid getuid killpg "
    "lchown major mkfifo mknod nice openpty posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev "
    "sched_getaffinity sched_setaffinity sched_yield set_blocking setgid setpgid setpriority setsid setuid sync "
    "sysconf sysconf_names tcgetpgrp ttyname uname wait wait3 wait4"
).split()
SIGNAL = (
    "ITIMER_PROF ITIMER_REAL SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGPROF SIGQUIT SIGTSTP SIGUSR1 SIGUSR2 SIGWINCH "
    "alarm getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigwait"
).split()

# What others import is loaded first: they know their systems. Then what this file names is taken away, Windows' rule
# that an open file can be neither moved nor deleted is held up, and text without a named encoding is an error of ours.
WITHOUT = f"""
import importlib, os, pkgutil, signal, sys, warnings
import jinja2, numpy, PIL.Image, rich.progress, safetensors.torch, scipy.ndimage, torch, torchvision, typer
import torch._dynamo, torch.fx

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {MODULES!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
for name in {MODULES!r}:
    sys.modules.pop(name, None)
for module, names in ((os, {OS!r}), (signal, {SIGNAL!r})):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

def opened():
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{{number}}"))
        except OSError:
            pass
    return found

def guarded(act):
    def guard(*paths, **more):
        if sys._getframe(1).f_globals["__name__"] != "tempfile":  # it has other flags there
            for path in paths:
                if os.path.realpath(path) in opened():
                    raise PermissionError(13, "being used by another process", str(path))
        return act(*paths, **more)
    return guard

for name in ("rename", "replace", "remove", "unlink"):
    setattr(os, name, guarded(getattr(os, name)))
warnings.filterwarnings("error", category=EncodingWarning, module=r"bdclean\\.")
"""


def python(code, *arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    return subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", WITHOUT + code, *arguments],
        capture_output=True, text=True, env=env, timeout=600,
    )  # fmt: skip


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are not listed here")


@needs_proc
@pytest.mark.slow
def test_every_module_imports_without_what_only_posix_has():
    code = """
import bdclean
names = [found.name for found in pkgutil.walk_packages(bdclean.__path__, "bdclean.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert not hasattr(os, "fork") and "fcntl" not in sys.modules
print(len(names))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 250


@needs_proc
@pytest.mark.slow
def test_a_scan_and_a_cleansing_run_without_what_only_posix_has(tmp_path):
    with tarfile.open(tmp_path / "signs.tar", "w") as tar:
        tar.add(SAMPLES / "images" / "labeled", "labeled")
    code = """
from bdclean.cli.main import run
found = [run(line.split()) for line in sys.argv[1:]]
print("CODES", *found, file=sys.stderr)
"""
    scanned = "--data signs.tar --trigger badnets --limit 240 --no-pictures --device cpu"
    model = SAMPLES / "signs-badnets.safetensors"
    pruned = f"cleanse {model} {scanned} --recipe clp --out out.safetensors --format jsonl --fail-on never"
    done = python(
        code, f"scan {model} {model.with_name('signs-clean.safetensors')} {scanned} --format jsonl --record runs/",
        pruned, pruned,
    )  # fmt: skip
    assert "CODES 1 0 0" in done.stderr, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["outcome"] for record in records] == ["ran"] * 4
    assert records[0]["verdict"] == "backdoored" and records[0]["data"]["skipped"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.json",
        "out.safetensors",
        "runs",
        "signs.tar",
    ], "nothing half-written, no lock, no state"
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_what_only_posix_has_is_asked_for_before_it_is_used():
    """By hasattr or getattr in the same file, which the drivers of benches that only run there need not."""
    missing = []
    for file in ROOT.rglob("*.py"):
        if "bench" in file.relative_to(ROOT).parts:
            continue
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                continue
            owner, name = node.value.id, node.attr
            if name in {"os": OS, "signal": SIGNAL}.get(owner, ()) and f'attr({owner}, "{name}"' not in text:
                missing.append(f"{file.name}: {owner}.{name}")
    assert not missing


@pytest.mark.parametrize("name", ["faults", "fuzz", "speed"])
def test_benches_that_need_posix_say_so(name, monkeypatch, capsys):
    from bdclean.bench.__main__ import main

    monkeypatch.delattr(os, "fork")
    monkeypatch.setattr(sys, "argv", ["bench", name])
    assert main() == 3
    assert f"{name} needs a POSIX system" in capsys.readouterr().err
