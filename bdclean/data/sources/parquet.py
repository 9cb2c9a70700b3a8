"""Parquet files of encoded images, as Hugging Face's image sets are -> Listing. Needs the extra `parquet`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdclean.data.decode import MAX_BYTES, Picture, Unreadable
from bdclean.data.sources.listing import Listing
from bdclean.errors import Refused
from bdclean.files import strictjson

IMAGES = ("image", "img", "images", "picture", "pixels", "jpg", "png")
LABELS = ("label", "labels", "fine_label", "cls", "class", "class_id", "target", "y", "category")
MAX_ROWS = 10_000_000
MAX_CHUNK = 4 * 2**30  # bytes of images in one row group, which is read as a whole
AT_ONCE = 16


def list_parquet(where: str, paths: Sequence[Path], names: Sequence[str]) -> Listing:
    """The images of `paths` (called `names`): a column of {bytes, path} or of bytes, with the label column beside it.

    Images are read 16 rows at a time. Raises Refused where there is no such column, or pyarrow is missing.
    """
    pyarrow, parquet = _pyarrow()
    columns, labels, counts = [], [], []
    classes: tuple[str, ...] | None = None
    labelled = True
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                column = _image_column(pyarrow, schema, path)
                _check_groups(file.metadata, path)
                label = _label_column(pyarrow, schema)
                labelled = labelled and label is not None
                classes = _class_names(schema.metadata, label) if classes is None else classes
                columns.append(column)
                counts.append(file.metadata.num_rows)
                if sum(counts) > MAX_ROWS:
                    raise Refused(f"{where} holds more than {MAX_ROWS:,} images: give a part of it.")
                if label is not None:
                    labels += [_shown(v) for v in file.read(columns=[label]).column(label).to_pylist()]
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise Refused(f"{path} cannot be read as parquet: {_first_line(error)}.") from None
    starts = np.cumsum([0, *counts])
    shown = [
        f"{name}/{row:07}" if len(paths) > 1 else f"{row:07}"
        for name, count in zip(names, counts, strict=True)
        for row in range(count)
    ]

    def fetch(indices: np.ndarray) -> Iterator[tuple[int, Picture]]:
        ordered = np.sort(indices)
        for path, column, start, end in zip(paths, columns, starts[:-1], starts[1:], strict=True):
            mine = ordered[(ordered >= start) & (ordered < end)]
            yield from zip(mine.tolist(), _pictures(path, column, mine - start), strict=True)

    return Listing(where, shown, fetch, labels if labelled and labels else None, classes, stems_only=True)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Refused("reading parquet needs pyarrow: pip install 'bdclean[parquet]'.") from None
    return pyarrow, pyarrow.parquet


def _image_column(pyarrow: Any, schema: Any, path: Path) -> str:
    """The column of encoded images, `NAME` or `NAME.bytes`."""
    types = pyarrow.types

    def binary(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    found = {}
    for entry in schema:
        if binary(entry.type):
            found[entry.name] = entry.name
        elif types.is_struct(entry.type):
            inner = {entry.type.field(i).name: entry.type.field(i).type for i in range(entry.type.num_fields)}
            if "bytes" in inner and binary(inner["bytes"]):
                found[entry.name] = f"{entry.name}.bytes"
    for name in (*IMAGES, *found):
        if name in found:
            return found[name]
    held = ", ".join(repr(name[:40]) for name in schema.names[:5])
    raise Refused(f"{path} has no column of encoded images (it has {held}): give one with the files' bytes.")


def _label_column(pyarrow: Any, schema: Any) -> str | None:
    for name in LABELS:
        for entry in schema:
            if entry.name.lower() == name and (
                pyarrow.types.is_integer(entry.type) or pyarrow.types.is_string(entry.type)
            ):
                return str(entry.name)
    return None


def _check_groups(metadata: Any, path: Path) -> None:
    for number in range(metadata.num_row_groups):
        size = metadata.row_group(number).total_byte_size
        if size > MAX_CHUNK:
            raise Refused(
                f"{path} has a row group of {size / 2**30:,.1f} GiB, more than the {MAX_CHUNK / 2**30:.0f} allowed: "
                "write it with smaller ones."
            )


def _class_names(metadata: dict[bytes, bytes] | None, label: str | None) -> tuple[str, ...] | None:
    """The names that Hugging Face's own metadata gives the numbers of the label column."""
    try:
        said = strictjson.parse((metadata or {})[b"huggingface"])
        names = said["info"]["features"][label]["names"]
    except (KeyError, TypeError, strictjson.NotJson):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _pictures(path: Path, column: str, rows: np.ndarray) -> Iterator[Picture]:
    """The encoded images at `rows`, which rise; row groups without any are passed over."""
    pyarrow, parquet = _pyarrow()
    with parquet.ParquetFile(path) as file:
        start = 0
        for group in range(file.metadata.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            wanted, done = rows[(rows >= start) & (rows < end)], 0
            try:
                batches = (
                    file.iter_batches(AT_ONCE, [group], [column], use_threads=False) if len(wanted) else ()
                )
                position = start
                for batch in batches:
                    inside = wanted[(wanted >= position) & (wanted < position + len(batch))] - position
                    for row in inside.tolist():
                        yield _bytes(batch.column(0)[row])
                        done += 1
                    position += len(batch)
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                for _ in range(len(wanted) - done):
                    yield Unreadable(f"damaged ({_first_line(error)})")
            else:
                for _ in range(len(wanted) - done):
                    yield Unreadable("fewer rows than the file says")
            start = end


def _bytes(value: Any) -> Picture:
    if hasattr(value, "values"):  # {bytes, ...}
        value = value["bytes"] if value.is_valid else value
    if not value.is_valid:
        return Unreadable("no bytes in this row")
    buffer = value.as_buffer()
    if buffer.size > MAX_BYTES:
        return Unreadable(f"{buffer.size:,} bytes, more than the {MAX_BYTES:,} allowed")
    return bytes(buffer.to_pybytes())


def _shown(value: object) -> str | None:
    return None if value is None or value == -1 else str(value)[:200]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
