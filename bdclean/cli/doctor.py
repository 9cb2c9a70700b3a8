"""What `bdclean doctor` prints: this machine, and whether bdclean can work on it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from bdclean import ranks
from bdclean.cli.catalogue import _columns
from bdclean.cli.version import named
from bdclean.files.weights import memory

PACKAGES = (
    "bdclean",
    "torch",
    "torchvision",
    "safetensors",
    "numpy",
    "scipy",
    "pillow",
    "typer",
    "rich",
)
EXTRAS = {"timm": "timm", "parquet": "pyarrow"}
"""What `bdclean[NAME]` installs."""


# --- doctor -------------------------------------------------------------------------------------------------


def doctor() -> tuple[str, bool]:
    """Returns what a bug report needs about this machine, and whether bdclean can work on it."""
    rows = [("python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [(package, named() if package == "bdclean" else _version(package)) for package in PACKAGES]
    rows += [(f"bdclean[{extra}]", f"{package} {_version(package)}") for extra, package in EXTRAS.items()]
    rows.append(("temporary folder", _temporary()))
    try:
        import torch
    except Exception as error:  # a broken installation is what this command is for
        return _columns([*rows, ("problem", f"torch cannot be imported: {error}")]), False
    rows += _torch(torch)
    from bdclean.data.scratch import available

    rows.append(("memory", f"{memory() / 2**30:.1f} GiB, {available() / 2**30:.1f} GiB to be had now"))
    rows.append(("free disk here", _free(Path.cwd())))
    return _columns(rows), True


def _temporary() -> str:
    """Returns where large files go for a while, and how much room there is."""
    import tempfile

    try:
        folder = tempfile.gettempdir()
    except OSError:
        return "none can be written to: set TMPDIR to one"
    return f"{folder}, {_free(Path(folder))} free"


def _free(folder: Path) -> str:
    import shutil

    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB"


def versions() -> dict[str, str]:
    """Returns the versions that go into a record."""
    found = {package: _version(package) for package in ("bdclean", "torch", "torchvision", "numpy")}
    return {"python": platform.python_version(), **found}


def _version(package: str) -> str:
    from importlib import metadata  # slow to import, and lists do not need it

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package == "bdclean":
            from bdclean import __version__

            return __version__
        return "not installed"


def _torch(torch: Any) -> list[tuple[str, str]]:
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        memory = properties.total_memory / 2**30
        rows.append((f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB, {bf16}"))
    if not rows:
        rows.append(("cuda", "none"))
    from bdclean.data.processors import usable

    flags = _cpu_flags()
    native = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    rows.append(("cpu", f"{usable()} usable cores, {torch.get_num_threads()} threads, {_capability(torch)}"))
    if (count := ranks.own().count) > 1:
        rows.append(("processes", f"{count}, started by torchrun"))
    rows.append(("cpu bf16", ", ".join(native) if native else "emulated, slower than fp32"))
    return rows


def _capability(torch: Any) -> str:
    found = getattr(torch.backends.cpu, "get_cpu_capability", None)
    return str(found()) if found is not None else platform.machine()


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
