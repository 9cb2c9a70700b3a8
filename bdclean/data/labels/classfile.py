"""What `--classes FILE` says: the names of the classes, or a CSV of which image is of which class."""

from __future__ import annotations

import csv
import io
import os
import re
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdclean.data.decode import SUFFIXES
from bdclean.errors import Refused
from bdclean.files import strictjson

MAX_BYTES = 512 * 2**20
LISTED, LOOKED = 0.9, 100
"""From this share of lines of an image's name and a label on, a text is a list of labels, and no class names."""
FILE_COLUMNS = (
    "file",
    "filename",
    "file_name",
    "path",
    "filepath",
    "image",
    "img",
    "image_id",
    "name",
    "id",
    "key",
)
LABEL_COLUMNS = (
    "label",
    "class",
    "classid",
    "class_id",
    "target",
    "category",
    "y",
    "label_name",
    "class_name",
)


@dataclass(frozen=True)
class FileLabels:
    """Labels by file name, as the file has them."""

    path: Path
    labels: Mapping[str, str]

    def match(self, names: Sequence[str]) -> list[str | None]:
        """Each image's label, None where the CSV does not have it.

        Both sides are compared as whole paths, then with up to three leading folders of the CSV's left out, then as
        file names alone; each with and without the ending. What matches most images wins; a file name that stands for
        two labels matches none.
        """
        best: list[str | None] = []
        for cut in (0, 1, 2, 3, -1):
            for ending in (True, False):
                found: dict[str, str | None] = {}
                for file, label in self.labels.items():
                    key = _form(file, cut, ending)
                    found[key] = label if found.get(key, label) == label else None
                matched = [found.get(_form(name, min(cut, 0), ending)) for name in names]
                if sum(m is not None for m in matched) > sum(b is not None for b in best):
                    best = matched
                if len(best) and None not in best:
                    return best
        return best or [None] * len(names)


def _form(name: str, cut: int, ending: bool) -> str:
    """`name` without its first `cut` folders (-1: without any), and without its ending where that is not wanted."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    name = unicodedata.normalize("NFC", "/".join(parts[min(cut, len(parts) - 1) :] if parts else parts))
    return name if ending else os.path.splitext(name)[0]


def read_class_file(path: Path) -> tuple[str, ...] | FileLabels:
    """Class names in the order of the head, or labels by file name. Raises Refused for what is neither.

    Names: one a line, a JSON list, or a JSON object from index to name, from name to index (torchvision's
    `class_to_idx`), or from index to [WordNet number, name] (Keras's `imagenet_class_index.json`). Labels: a CSV or
    JSON lines with a file and a label each, or lines of an image's name, a space or tab, and its label.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            raise Refused(f"{path} is not a file: give class names, one a line, or a CSV of file,label.")
        if status.st_size > MAX_BYTES:
            raise Refused(f"{path} is too large for class names or labels.")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Refused(f"class names cannot be read from {path}: {error.strerror}.") from None
    except ValueError:
        raise Refused(f"{path} is not text: give class names, one a line, or a CSV of file,label.") from None
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        found = _table(path, text)
    elif suffix == ".json":
        found = _json(path, text)
    elif suffix in (".jsonl", ".ndjson"):
        found = _json_lines(path, text)
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        found = _list(path, lines) or tuple(lines)
    if isinstance(found, tuple) and len(found) < 2:
        raise Refused(f"{path} names {len(found)} classes, at least 2 are needed.")
    return found


def _json(path: Path, text: str) -> tuple[str, ...]:
    try:
        found = strictjson.parse(text)
        if isinstance(found, dict) and all(type(value) is int for value in found.values()):
            found = {str(index): name for name, index in found.items()}
        if isinstance(found, dict):
            found = [found[str(i)] for i in range(len(found))]
        # several words for one class are matched as synonyms
        return tuple(", ".join(name) if isinstance(name, list) else str(name) for name in found)
    except (strictjson.NotJson, KeyError, TypeError):
        raise Refused(f"{path} is not a list of class names: give one name a line, or a JSON list.") from None


def _json_lines(path: Path, text: str) -> FileLabels:
    labels: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            row = strictjson.parse(line)
        except strictjson.NotJson:
            row = None
        said = {str(key).lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
        file = next((said[name] for name in FILE_COLUMNS if name in said), None)
        label = next((said[name] for name in LABEL_COLUMNS if name in said), None)
        if not isinstance(file, str) or not isinstance(label, (str, int, float)):
            raise Refused(f"{path} has a line without a 'file' and a 'label': give both in each.")
        labels[file.strip()] = label_text(str(label))
    if not labels:
        raise Refused(f"{path} is empty: give one object with 'file' and 'label' a line.")
    return FileLabels(path, labels)


def label_text(label: str) -> str:
    """A label as it was meant: without quotes that were written into it, and a whole number without its `.0`."""
    label = label.strip()
    if len(label) > 1 and label[0] == label[-1] and label[0] in "\"'":
        label = label[1:-1].strip()
    return label[: label.index(".")] if re.fullmatch(r"-?[0-9]+\.0+", label) else label


def _table(path: Path, text: str) -> tuple[str, ...] | FileLabels:
    try:
        first = text.lstrip().split("\n", 1)[0]
        delimiter = max((",", ";", "\t"), key=first.count)
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise Refused(f"{path} is not a CSV of file,label ({error}).") from None
    if not rows:
        raise Refused(f"{path} is empty: give a CSV of file,label, or class names.")
    if max(len(row) for row in rows) == 1:
        return tuple(row[0].strip() for row in rows)
    header = [cell.strip().lower() for cell in rows[0]]
    file = next((header.index(name) for name in FILE_COLUMNS if name in header), None)
    label = next((header.index(name) for name in LABEL_COLUMNS if name in header), None)
    if label is not None and (file is None or file == label):
        file = next((k for k in range(len(header)) if k != label and _is_image(rows[1:2], k)), None)
    if file is not None and label is not None:
        rows = rows[1:]
    elif len(header) == 2:
        numbers = [row[0].strip() for row in rows if row[0].strip().isdigit()]
        if len(numbers) >= len(rows) - 1 and sorted(map(int, numbers)) == list(range(len(numbers))):
            named = {int(row[0]): row[1].strip() for row in rows if row[0].strip().isdigit() and len(row) > 1}
            return tuple(named.get(k, str(k)) for k in range(len(numbers)))
        file, label = 0, 1
        if not _is_image(rows[:1], 0) and _is_image(rows[1:2], 0):
            rows = rows[1:]
    else:
        held = ", ".join(repr(cell[:30]) for cell in header[:6])
        raise Refused(f"{path} has the columns {held}: name one 'file' and one 'label'.")
    return FileLabels(
        path,
        {row[file].strip(): label_text(row[label]) for row in rows if len(row) > max(file, label)},
    )


def _list(path: Path, lines: list[str]) -> FileLabels | None:
    """Labels by file name, where nearly all lines are such pairs, as in the val.txt of ImageNet; else None."""
    for some in (lines[:LOOKED], lines):  # a look at a few first: a file of names may be huge
        pairs = [pair for line in some if (pair := _pair(line)) is not None]
        if not pairs or len(pairs) < LISTED * len(some):
            return None
    return FileLabels(path, {file.strip(): label_text(label) for file, label in pairs})


def _pair(line: str) -> list[str] | None:
    """An image's name and its label; None for another line."""
    # behind a tab a label may have spaces, behind a space the file's name may
    row = line.split("\t", 1) if "\t" in line else line.rsplit(None, 1)
    return row if len(row) == 2 and _is_image([row], 0) else None


def _is_image(rows: list[list[str]], column: int) -> bool:
    return any(
        len(row) > column and os.path.splitext(row[column].strip())[1].lower() in SUFFIXES for row in rows
    )
