"""All hostile files: `python tests/hostile/make.py FOLDER [NAME...]` writes one folder for each, with its command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script, the package's own folder is on the path instead of its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from hostile import containers, folders, headers, options, pictures
from hostile.case import Case, prepare

ALL = (headers, folders, pictures, containers, options)


def cases() -> list[Case]:
    """Every case; names are unique."""
    return [case for module in ALL for case in module.cases()]


def main(arguments: list[str]) -> int:
    """Writes the corpus below a folder and prints each case's command."""
    root, names = Path(arguments[0]), arguments[1:]
    for case in cases():
        if names and case.name not in names:
            continue
        folder = root / case.name
        folder.mkdir(parents=True)
        prepare(folder)
        case.write(folder)
        print(f"cd {shlex.quote(str(folder))} && bdclean {shlex.join(case.argv)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
