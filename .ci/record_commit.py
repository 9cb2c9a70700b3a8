"""Build hook: a wheel and an sdist that are built in a checkout hold the commit in bdclean/commit.txt."""

import subprocess
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class RecordCommit(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version, build_data):
        root = Path(self.root)
        if version == "editable" or not (root / ".git").exists():
            return  # of a checkout git is asked, an sdist has the file
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        try:
            commit = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return
        self.folder = (
            tempfile.TemporaryDirectory()
        )  # lasts as long as the hook: nothing is written into the checkout
        file = Path(self.folder.name) / "commit.txt"
        file.write_text(commit)
        build_data["force_include"][str(file)] = "bdclean/commit.txt"
