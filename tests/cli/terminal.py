"""Runs bdclean on a terminal of its own."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import bdclean


def on_a_terminal(*words, cwd=".", columns=200, **more):
    """Exit code and everything that the command sent to its terminal; `more`: variables of its environment."""
    parent, child = pty.openpty()
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(bdclean.__file__).parents[1]),
        "COLUMNS": str(columns),
        "TERM": "xterm",
    }
    env.pop("NO_COLOR", None)
    words = [word.encode("utf-8", "surrogateescape") if isinstance(word, str) else word for word in words]
    process = subprocess.Popen(
        [sys.executable, "-m", "bdclean", *words],
        stdin=child,
        stdout=child,
        stderr=child,
        cwd=cwd,
        env={**env, **more},
    )
    os.close(child)
    sent = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # the child's side is closed
            break
        if not piece:
            break
        sent += piece
    os.close(parent)
    return process.wait(), sent.decode("utf-8", "backslashreplace").replace("\r\n", "\n")
