"""A path that a user gives -> Listing, whatever it is: a folder, an archive, a part of one, or shards."""

from __future__ import annotations

import re
from pathlib import Path

from bdclean.data.sources.archive import list_tars
from bdclean.data.sources.folder import SHARDS, list_folder, search
from bdclean.data.sources.listing import PICKLED, Listing, held
from bdclean.data.sources.npz import list_npz
from bdclean.data.sources.parquet import list_parquet
from bdclean.errors import Refused
from bdclean.files.text import plain

TARS = (".tar", ".tar.gz", ".tgz")
FORMS = "a folder of images, a .tar, .tar.gz, .npz or .parquet"
MAX_SHARDS = 100_000


def open_images(path: Path) -> Listing:
    """What `path` holds: a folder, an archive, ARCHIVE/PART (a folder inside a tar, a part of an .npz), or shards.

    Shards are a folder of tars or parquet files without images of its own, or NAME-{000..123}.tar. Raises Refused,
    one sentence, for what is none of these or holds no image.
    """
    listing = _open(path)
    if not len(listing.names):
        if listing.others[PICKLED]:
            raise Refused(
                f"{plain(listing.where)} holds no images but {listing.others[PICKLED]} pickles, which can run "
                "code when loaded: where you trust them, save their arrays with "
                "numpy.savez('images.npz', x=IMAGES, y=LABELS)."
            )
        others = held(listing.others)
        raise Refused(
            f"{plain(listing.where)} holds no images{f' (but {others} files)' if others else ', it is empty'}."
        )
    return listing


def _open(path: Path) -> Listing:
    if path.is_dir():
        found = search(path)
        if found.shards and not found.files:
            return _shards(str(found.root), found.root, found.shards)
        found.others.update(Path(name).suffix.lower() for name in found.shards)
        return list_folder(found)
    file, inside = path, ""
    while not file.exists() and file.parent != file:
        file, inside = file.parent, f"{file.name}/{inside}" if inside else file.name
    if not file.is_file():
        names = _expand(path.name)
        if len(names) > 1:
            missing = next((name for name in names if not (path.parent / name).is_file()), None)
            if missing is not None:
                raise Refused(f"{path}: there is no {path.parent / missing}.")
            return _shards(str(path), path.parent, names)
        raise Refused(f"{path} does not exist: give {FORMS}.")
    name = file.name.lower()
    if name.endswith(TARS):
        return list_tars(str(path), [file], inside)
    if name.endswith(".npz"):
        return list_npz(file, inside)
    if name.endswith(".parquet") and not inside:
        return list_parquet(str(path), [file], [file.stem])
    if inside:
        raise Refused(f"{path} does not exist: {file} is a file.")
    if name.endswith((".zip", ".7z", ".rar", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise Refused(f"{path} is an archive of a kind that is not read: unpack it and give the folder.")
    raise Refused(f"{path} is a file, not a set of images: give {FORMS}.")


def _shards(where: str, root: Path, names: list[str]) -> Listing:
    paths = [root / name for name in names]
    parquet = [path.name.lower().endswith(".parquet") for path in paths]
    if all(parquet):
        return list_parquet(where, paths, [name.removesuffix(".parquet") for name in names])
    if any(parquet) or not all(path.name.lower().endswith(TARS) for path in paths):
        raise Refused(f"{where} holds archives of several kinds: give those of one.")
    return list_tars(where, paths)


def _expand(name: str) -> list[str]:
    """NAME-{000..123}.tar as the names it stands for, by the rule of shells: zeros are kept."""
    match = re.fullmatch(r"(.*)\{([0-9]{1,9})\.\.([0-9]{1,9})\}(.*)", name)
    if match is None or not match[4].lower().endswith(SHARDS):
        return [name]
    first, last = int(match[2]), int(match[3])
    if not 0 <= last - first < MAX_SHARDS:
        raise Refused(
            f"{name} names no shards: write the lower number first, and at most {MAX_SHARDS:,} of them."
        )
    width = max(len(match[2]), len(match[3])) if "0" in (match[2][0], match[3][0]) else 0
    return [f"{match[1]}{number:0{width}}{match[4]}" for number in range(first, last + 1)]
