"""The version of this bdclean, for people. git is asked when somebody asks, never at a start."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bdclean import __version__

PACKAGE = Path(__file__).parents[1]
RECORDED = (
    PACKAGE / "commit.txt"
)  # of a wheel and an sdist that were built in a checkout: .ci/record_commit.py


def named() -> str:
    """Returns the version, with the commit that it was built from or that is checked out where one is known."""
    commit = _recorded() or _checked_out()
    return f"{__version__} ({commit})" if commit else __version__


def _recorded() -> str:
    try:
        return RECORDED.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _checked_out() -> str:
    if not (
        PACKAGE.parent / ".git"
    ).exists():  # a user's own repository above site-packages says nothing of bdclean
        return ""
    asked = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(asked, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
