"""The one way in which bdclean puts a file on disk: whole and durable, or not at all. Also who may write there."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from bdclean import ranks
from bdclean.errors import Refused

try:
    import fcntl
except ImportError:  # no POSIX system: nothing is locked there
    fcntl = None  # type: ignore[assignment]

LOCKS = fcntl is not None
T = TypeVar("T")


def replace(path: Path, write: Callable[[IO[bytes]], T]) -> T:
    """Returns what `write` returns after filling a new file in `path`'s folder, which then takes `path`'s place.

    File and folder are flushed to the disk: after a kill or a power cut `path` holds the old content or the new one.
    A link is followed; what is no regular file (a pipe, /dev/stdout) is written to as it is; a folder that went away
    is made again. Raises Refused where the system refuses, and leaves nothing half-written behind.
    """
    with _said(path):
        if (straight := _straight(path)) is not None:
            with open(straight, "wb") as stream:
                return write(stream)
        target = Path(os.path.realpath(path))
        with _filled(target, write) as (partial, written):
            os.replace(partial, target)
        return written


def _straight(path: Path) -> Path | str | None:
    """Where is written without a new file: to what is no regular one, and from torchrun's other processes nowhere."""
    if not ranks.first():
        return os.devnull
    return path if is_special(path) else None


def create(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Fills a new file as `replace` does, but never in the place of another; returns where it is.

    Where `path` is taken, that is the first free one of path-2, path-3, ...: also of processes that do this at the same
    time each gets its own.
    """
    with _said(path):
        if (straight := _straight(path)) is not None:
            with open(straight, "wb") as stream:
                write(stream)
            return path
        target = Path(os.path.realpath(path))
        with _filled(target, write) as (partial, _):
            number = 1
            place = target
            while not _placed(partial, place):
                number += 1
                place = target.with_stem(f"{target.stem}-{number}")
        return place


def _placed(partial: Path, place: Path) -> bool:
    """Whether `partial` could be put where nothing was; by a link, which cannot replace."""
    try:
        os.link(partial, place)
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links: the name is taken first, by an empty file
        try:
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        try:
            os.replace(partial, place)
        except OSError:
            place.unlink(missing_ok=True)
            raise
        return True
    partial.unlink()
    return True


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Says what the system refuses of writing to `path`."""
    try:
        yield
    except OSError as error:
        raise Refused(f"{path} cannot be written: {reason(error)}.") from None


@contextlib.contextmanager
def _filled(path: Path, write: Callable[[IO[bytes]], T]) -> Iterator[tuple[Path, T]]:
    """A new file beside `path` with what `write` writes, and what that returned; gone where anything fails.

    It is flushed, and locked until it is put in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, stream = _begun(path)
    try:
        with stream:
            written = write(stream)
            stream.flush()
            os.fsync(stream.fileno())
            if not LOCKS:
                stream.close()  # Windows moves no file that is open; where nothing is locked, nothing is let go of
            yield partial, written
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8; what has no UTF-8 is escaped. Raises Refused as `replace` does."""
    raw = text.encode("utf-8", errors="backslashreplace")
    replace(path, lambda stream: stream.write(raw))


def _begun(path: Path) -> tuple[Path, IO[bytes]]:
    """A new half-written file of `path`, locked: `sweep` sees by this that somebody is still writing."""
    while True:
        partial = path.with_name(f"{_start_of_parts(path)}{os.urandom(4).hex()}.part")
        stream = open(partial, "xb")
        held = _hold(stream)
        if held is False or (held and _same_file(partial, stream)):  # without locks nobody sweeps
            return partial, stream
        stream.close()  # another process swept it between our opening and our locking


def sweep(path: Path) -> None:
    """Deletes the half-written files that killed runs left of `path`; one that is still being written stays."""
    if not ranks.first():
        return
    path = Path(os.path.realpath(path))
    start = _start_of_parts(path)
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(start) and name.endswith(".part"):
                with contextlib.suppress(OSError), open(path.with_name(name), "rb+") as stream:
                    if _hold(stream):
                        path.with_name(name).unlink()


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keeps other runs from writing to `path` meanwhile; raises Refused where one is at it, naming its process.

    The system holds the lock on `path`.lock and lets go of it when the process dies, however it does: a file that a
    killed run left behind keeps nobody out. Where the system or its file system knows no locks, nothing is kept out.
    """
    if not LOCKS or not ranks.first():
        yield
        return
    place = Path(f"{os.path.realpath(path)}.lock")
    while True:
        try:
            handle = os.open(place, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise Refused(f"{path} cannot be written: {place} cannot be made ({reason(error)}).") from None
        stream = os.fdopen(handle, "r+b", buffering=0)
        if _hold(stream) is None:
            with stream:
                process = stream.read(20).strip().decode("ascii", "replace")
            raise Refused(
                f"{path} is being written by another run (process {process or 'unknown'}): "
                "wait until it has ended, or choose another --out."
            )
        if _same_file(place, stream):
            break
        stream.close()  # the run before us deleted it between our opening and our locking
    with stream:
        try:
            with contextlib.suppress(OSError):  # the number only helps people
                stream.truncate(0)
                stream.write(b"%d\n" % os.getpid())
            yield
        finally:
            with contextlib.suppress(OSError):
                if _same_file(place, stream):
                    place.unlink()


def check(path: Path) -> None:
    """Raises Refused where `path` cannot be written, found out by making a file without a name in its folder."""
    if os.path.isdir(path):  # Path.is_dir would raise where a folder on the way may not be entered
        raise Refused(f"{path} is a folder: name a file.")
    if is_special(path):
        return
    folder = os.path.dirname(os.path.realpath(path))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) and not os.path.isdir(folder):
            raise Refused(
                f"{path} cannot be written: {folder} is not a folder: make it, or choose another place."
            ) from None
        raise Refused(
            f"{path} cannot be written: no file can be made in {folder} ({reason(error)}); choose another place."
        ) from None


def is_special(path: Path) -> bool:
    """Whether something is at `path` that is neither a file nor a folder: a pipe, a terminal, /dev/null."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def reason(error: OSError) -> str:
    """The system's words for what went wrong, and for a full disk what to do."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return "the disk is full; free some space or choose another place"
    return (error.strerror or type(error).__name__).lower()


def _start_of_parts(path: Path) -> str:
    # a name has at most 255 bytes, and the ending needs some
    return f".{os.fsdecode(os.fsencode(path.name)[:200])}."


def _hold(stream: IO[bytes]) -> bool | None:
    """Locks an open file until it is closed: True if it is ours now, None if another process holds it.

    False where the system knows no locks: then nobody can tell.
    """
    if not LOCKS:
        return False
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


def _same_file(path: Path, stream: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(stream.fileno()))
    except OSError:
        return False


def _flush_folder(folder: Path) -> None:
    """Makes a renaming outlive a power cut, where the system can flush a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
