"""Weights files in a folder beside the one that was read: whoever uses the folder may load them instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from bdclean.errors import Refused
from bdclean.files.kinds import looks_like_pickle
from bdclean.files.tensorfile import read_header
from bdclean.files.text import shown

SHARED = 0.5
"""From this share of the read tensors' shapes on, a file holds the network again."""
LEAST_SIZE = 0.2
"""A torch file is not opened: from this share of the read files' size on (half precision and less) it may hold one."""
OF_TRAINING = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
"""Beginnings of what trainers save beside the weights."""


def second_files(folder: Path, read: Iterable[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name -> a sentence, of each file of `folder` that holds, or may hold, the network of `shapes` again.

    A safetensors file is known by its shapes, whatever its name and precision; a pickle by its size alone, as it is
    not opened. Nothing where `folder` is a file: then the user has said which one counts.
    """
    if not folder.is_dir():
        return {}
    files = list(read)
    inside = files[0].parent
    size = sum(path.stat().st_size for path in files)
    wanted = Counter(shape for shape in shapes.values() if len(shape) > 1)
    found = {}
    for path in sorted(inside.iterdir()):
        if path in files or not path.is_file() or path.name.startswith((".", *OF_TRAINING)):
            continue
        if path.stat().st_size >= LEAST_SIZE * size and looks_like_pickle(path):
            what = "may hold the same network"
        elif path.suffix == ".safetensors" and _again(path, wanted):
            what = "holds the same network"
        else:
            continue
        name = shown(path.name)
        found[name] = (
            f"{name} beside {shown(files[0].name)} {what} with other weights, and was neither measured nor cleansed: "
            f"name the file that is used, as in {shown(folder / files[0].name)}, or take the other away."
        )
    return found


def _again(path: Path, wanted: Counter[tuple[int, ...]]) -> bool:
    try:
        shapes = Counter(tuple(entry.shape) for entry in read_header(path).entries if len(entry.shape) > 1)
    except (Refused, OSError):
        return False
    return (wanted & shapes).total() > SHARED * wanted.total()
