"""Room for pixels: in memory, or where they are too many, in a scratch file that the system pages in and out."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from bdclean.errors import Refused

try:
    import resource
except ImportError:  # no such limits there
    resource = None  # type: ignore[assignment]

SHARE = 0.4
"""Of the memory that is available, images may take so much before they go to disk: networks need the rest."""


def allocate(shape: Sequence[int], memory: int | None = None) -> tuple[Tensor, bool]:
    """(room for uint8 of `shape`, whether it lies on disk); nothing in it is set.

    On disk if it takes more than `memory` bytes (by default a share of what is available now). The scratch file has
    no name from the start, so that it is gone with its last user however the process ends. Its blocks are reserved:
    raises Refused at once where the disk is too small.
    """
    count = prod(shape)
    if count <= (available() * SHARE if memory is None else memory):
        try:
            return torch.empty(tuple(shape), dtype=torch.uint8), False
        except RuntimeError:
            pass  # a limit that was not seen: the disk may do
    folder = scratch_folder()
    free = shutil.disk_usage(folder).free
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if count > free:
                raise OSError
            if hasattr(os, "posix_fallocate"):
                # reserved, not only named: a disk that fills up later would kill the process at a write
                os.posix_fallocate(file.fileno(), 0, count)
            else:
                file.truncate(count)
            mapped = mmap.mmap(file.fileno(), count)
    except OSError:
        raise Refused(
            f"{shape[0]:,} images at {' x '.join(map(str, shape[2:]))} take {count / 2**30:,.1f} GiB, too much for the "
            f"memory, and {folder} has {free / 2**30:,.1f} GiB free for them: lower --limit, or set TMPDIR to a larger "
            "disk."
        ) from None
    return torch.frombuffer(mapped, dtype=torch.uint8).view(tuple(shape)), True


def scratch_folder() -> str:
    """Where large temporary files go: TMPDIR, else /var/tmp (on many systems /tmp lies in memory)."""
    if not os.environ.get("TMPDIR") and os.access("/var/tmp", os.W_OK):
        return "/var/tmp"
    return tempfile.gettempdir()


def available() -> int:
    """Bytes of memory that this process can still take: the machine's, or what its container or `ulimit -v` allows."""
    found = []
    pages = _text("/proc/self/statm").split()
    if resource is not None and pages:
        most, taken = resource.getrlimit(resource.RLIMIT_AS)[0], int(pages[0]) * resource.getpagesize()
        if most != resource.RLIM_INFINITY:
            found.append(max(0, most - taken))
    meminfo = _text("/proc/meminfo")
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        allowed, now = _text(limit).strip(), _text(used).strip()
        if allowed.isdigit() and now.isdigit():
            found.append(max(0, int(allowed) - int(now)))
    if not found and hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return min(found, default=4 * 2**30)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
