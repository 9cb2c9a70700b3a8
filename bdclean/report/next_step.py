"""What to type after a run, made of what was typed for it."""

from __future__ import annotations

from collections.abc import Sequence

from bdclean.record.run import BACKDOORED, SUSPICIOUS, RunRecord
from bdclean.report import wording

CARRIED = ("--labeled", "--classes", "--arch", "--kind", "--preprocess", "--trigger", "--allow-pickle")
"""Options of a scan that its cleansing takes, too."""
FLAGS = ("--allow-pickle", "--strict", "--no-pictures", "--quiet", "--verbose", "--force", "--resume")
"""Options without a value."""


def next_command(record: RunRecord) -> str:
    """Returns the command to type next, quoted for a POSIX shell: after a finding the cleansing, after it the report.

    Empty where there is nothing to go on with: what is missing then is said in the run's sentence.
    """
    given = options(record.argv)
    if record.command == "scan" and record.verdict in (BACKDOORED, SUSPICIOUS) and record.data is not None:
        path = record.data.path
        words = ["bdclean", "cleanse", record.checkpoint.path]
        words += [] if ("--labeled", [path]) in given else ["--data", path]
        words += [word for name, value in given if name in CARRIED for word in (name, *value)]
    elif record.command == "cleanse" and record.output is not None:
        output = record.output.path.rstrip("/").removesuffix(".safetensors")
        places = [place for name, value in given if name == "--record" for place in value]
        words = ["bdclean", "report", *(places[-1:] or [f"{output}.json"]), "--out", f"{output}.html"]
    else:
        return ""
    return " ".join(map(wording.quoted, words))


def options(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Returns the long options of a command line as they were typed, each with its value if it has one."""
    found = []
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            values = [value] if equals else [] if name in FLAGS else list(argv[place + 1 : place + 2])
            found.append((name, values))
    return found
