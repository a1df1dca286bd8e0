"""Read a file of tensors that others wrote, or say in words what the file is instead."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


# First bytes of what is often found under the name of a checkpoint, and what it is.
_IMPOSTORS = {
    b"version https://git-lfs": "a git-LFS pointer and not the file itself: run `git lfs pull` where it was cloned",
    b"<!doctype html": "a web page: the download failed",
    b"<html": "a web page: the download failed",
    b"<?xml": "an XML text: the download failed",
    b"\x1f\x8b": "an archive (gzip): unpack it first",
}
# Safetensors begin with the length of their header, which may be so many bytes.
_LONGEST_HEADER = 100_000_000
# torch.save before PyTorch 1.6 starts a file with the pickle of this number.
_TORCH_NUMBER = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def read_tensor_file(path: str | Path, trust_pickle: bool = False) -> Any:
    """Read a file of safetensors or `torch.save`, whichever its first bytes show, whatever its name.

    No code of the file is run: `torch.load` unpickles tensors and plain values only, unless `trust_pickle` is set.

    Args:
        path (`str` or `Path`): the file.
        trust_pickle (`bool`): unpickle other objects too, which runs code of whoever wrote the file.

    Returns:
        `Any`: of safetensors a `dict[str, torch.Tensor]`, on the CPU; of `torch.save` whatever was saved.

    Raises:
        FileNotFoundError: if there is no file of this name, or it is a folder.
        ValueError: if the file is something else (a pointer of git LFS, a web page, ...), is cut short or damaged, or
            needs `trust_pickle`. The message names file and finding in one line.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{str(path)!r} {found}; it must be a file of tensors.")
    with path.open("rb") as file:
        start = file.read(512)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER:
        return _read_safetensors(path)
    if start.startswith(b"PK\x03\x04"):
        _check_archive(path)
    elif _TORCH_NUMBER not in start[:16]:
        raise ValueError(f"{path} is {_name_impostor(start, path)}.")
    return _unpickle(path, trust_pickle)


def _name_impostor(start: bytes, path: Path) -> str:
    """Say what a file is that begins with these bytes."""
    if not start:
        return "empty (0 bytes): the download or the copy failed"
    known = (words for begin, words in _IMPOSTORS.items() if start.lstrip().lower().startswith(begin))
    if words := next(known, None):
        return words
    if start.startswith(b"\x80"):
        return "a pickle that torch.save did not write"
    size = path.stat().st_size
    return f"neither a file of torch.save nor of safetensors: it has {size} bytes and begins with {start[:24]!r}"


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {_safetensors_problem(path) or error}.") from error


def _safetensors_problem(path: Path) -> str | None:
    """Say how much of a safetensors file is lacking; None if it is not that."""
    size = path.stat().st_size
    with path.open("rb") as file:
        end = 8 + int.from_bytes(file.read(8), "little")  # of the header
        if end <= size:
            try:
                header = json.loads(file.read(end - 8))
                end += max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                return None
    return f"it is cut short, {size} of {end} bytes" if end > size else None


def _check_archive(path: Path) -> None:
    """Raise a `ValueError` unless an archive is whole and laid out as torch.save does."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} is cut short or damaged: {size} bytes of a torch.save archive without its end; get it again."
        ) from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"{path} is a TorchScript program; save the state dict of the model it was made from.")
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"{path} is a zip archive that torch.save did not write: it holds {', '.join(names[:3])}.")


def _unpickle(path: Path, trust: bool) -> Any:
    try:
        with path.open("rb") as file:  # of a path, torch.load would believe the suffix
            return torch.load(file, map_location="cpu", weights_only=not trust)
    except ImportError as error:
        raise ValueError(f"{path} holds objects of a package that is not installed: {error}.") from error
    except Exception as error:  # damaged bytes lead the unpickler to any of them
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused and not trust:
            raise ValueError(
                f"{path} holds more than tensors and plain values: {refused[1]}. Reading it would run code of whoever "
                "wrote the file; if you trust them, say so with --trust-pickle (trust_pickle=True)."
            ) from error
        found = re.search(r"WeightsUnpickler error: (.*)", str(error))
        detail = found[1] if found else str(error).partition("\n")[0]
        reason = f"{type(error).__name__}{': ' if detail else ''}{detail}".rstrip(".")
        raise ValueError(
            f"{path}, of {path.stat().st_size} bytes, cannot be read; is it damaged or cut short? ({reason})"
        ) from error
