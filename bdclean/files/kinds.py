"""What a file is, told by its first bytes, so that a refusal can say what to do."""

from __future__ import annotations

import zipfile
from pathlib import Path

PNG = b"\x89PNG\r\n\x1a\n"
ZIP = b"PK\x03\x04"
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
EXPORT = "save the network's state_dict() with safetensors where you trust it"
# OpenAI's CLIP is published so.
SCRIPT = "where you trust it, save torch.jit.load(FILE).state_dict() with safetensors"
FETCH = "fetch the file itself (git lfs pull, or the download link)"
STARTS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"\x89HDF\r\n\x1a\n",
        "a Keras or other HDF5 file",
        "convert it to a PyTorch network's safetensors file",
    ),
    (b"GGUF", "a GGUF file of a language model", "bdclean reads image classifiers"),
    (b"\x93NUMPY", "a NumPy array", EXPORT),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", FETCH),
    (b"<!DOCTYPE", "a web page, not the weights", FETCH),
    (b"<!doctype", "a web page, not the weights", FETCH),
    (b"<html", "a web page, not the weights", FETCH),
    (b"\x1f\x8b", "a gzip archive", "unpack it and name the file in it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it and name the file in it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it and name the file in it"),
    (b"BZh", "a bzip2 archive", "unpack it and name the file in it"),
)
# By what is in the name, for formats without a mark of their own.
NAMED: tuple[tuple[str, str, str], ...] = (
    (".onnx", "an ONNX graph", "save the state_dict() of the PyTorch network that it was made from"),
    (".ckpt", "a TensorFlow checkpoint", "convert it to a PyTorch network's safetensors file"),
    (".pb", "a TensorFlow graph", "convert it to a PyTorch network's safetensors file"),
    (".mlmodel", "a Core ML model", "save the state_dict() of the PyTorch network that it was made from"),
    (".msgpack", "a Flax file", "convert it to a PyTorch network's safetensors file"),
)
MOST_MEMBERS = 100_000


def looks_like_pickle(path: Path) -> bool:
    """Whether the content is a torch archive or a bare pickle, whatever the file is called."""
    with path.open("rb") as stream:
        start = stream.read(16)
    return start.startswith((ZIP, *PICKLES)) and not is_safetensors(start)


def is_safetensors(start: bytes) -> bool:
    """Its ninth byte is "{"; the length before it may by chance begin like a pickle."""
    return start[8:9] == b"{"


def sentence(path: Path, where: str) -> str | None:
    """Why the file is not read and what to do, where its kind is known; None for a pickle or a safetensors file."""
    found = kind(path)
    return None if found is None else f"{where} is {found[0]}: {found[1]}."


def kind(path: Path) -> tuple[str, str] | None:
    """What the file is, and what to do with it."""
    with path.open("rb") as stream:
        start = stream.read(512)
    if is_safetensors(start):
        return None
    for beginning, what, advice in STARTS:
        if start.lstrip(b"\xef\xbb\xbf \r\n").startswith(beginning):
            return what, advice
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite model", "convert the network that it was made from"
    if start[257:262] == b"ustar":
        return "a tar archive", "unpack it and name the file in it"
    if start.startswith(ZIP):
        return archive(path)
    if start.startswith(PICKLES):
        return None
    name = path.name.lower()
    return next(((what, advice) for ending, what, advice in NAMED if ending in name), None)


def archive(path: Path) -> tuple[str, str] | None:
    """What a zip archive is; None for torch's own, and for one that cannot be listed."""
    try:
        with zipfile.ZipFile(path) as opened:
            names = opened.namelist()[:MOST_MEMBERS]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a damaged zip archive", "fetch it again"
    inner = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return "a TorchScript archive, which is a program", SCRIPT
    if "data.pkl" in inner:
        return None
    if "model.weights.h5" in inner:
        return "a Keras model", "convert it to a PyTorch network's safetensors file"
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive of arrays", EXPORT
    return "a zip archive", "unpack it and name the file in it"
