"""Pictures and films as a user names them: files, folders, patterns, addresses, and standard input."""

from __future__ import annotations

import glob
import re
import shutil
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from .films import FILM_SUFFIXES


# Seconds without an answer after which an address is given up.
_PATIENCE = 30


class PictureFile(NamedTuple):
    """A picture or a film on disk.

    Attributes:
        name (`str`): As the user knows it: path or address, "-" for standard input.
        path (`Path`): Where it lies.
        is_film (`bool`): Whether it has frames.
    """

    name: str
    path: Path
    is_film: bool = False

    @property
    def stem(self) -> str:
        """A name for files that are made of it."""
        if self.name == "-":
            return "stdin"
        if _is_address(self.name):
            return Path(urllib.parse.unquote(urllib.parse.urlsplit(self.name).path)).stem or "picture"
        return self.path.stem


def find_pictures(places: Iterable[str | Path], aside: str | Path) -> list[PictureFile]:
    """List pictures and films, those of folders and patterns in the order of their names.

    Args:
        places (`Iterable[str | Path]`): Files; folders that hold some; patterns such as `shots/**/*.jpg`, for shells
            that do not resolve them; addresses that start with http:// or https://; and "-" for the bytes of standard
            input.
        aside (`str` or `Path`): Folder for what does not lie on disk yet.

    Returns:
        `list[PictureFile]`: Each file once.

    Raises:
        FileNotFoundError: If a place does not exist, or a folder or pattern holds no picture.
        OSError: If an address cannot be fetched.
        ValueError: If a file is no picture.
    """
    found: list[PictureFile] = []
    for place in map(str, places):
        if place == "-" or _is_address(place):
            path = Path(aside) / f"{len(found):06d}{_suffix(place)}"
            with path.open("wb") as file:
                _fetch(place, file)
            found.append(_checked(PictureFile(place, path, path.suffix in FILM_SUFFIXES)))
        elif Path(place).is_dir():
            found += _known(Path(place).iterdir(), f"{place} holds no picture; a folder of images has at least one.")
        elif Path(place).exists():
            found.append(_checked(PictureFile(place, Path(place), _is_film(Path(place)))))
        elif glob.has_magic(place):
            matches = map(Path, glob.glob(place, recursive=True))
            found += _known(matches, f"{place} matches no picture; images are files, folders and patterns.")
        else:
            raise FileNotFoundError(f"{place} does not exist; images are files, folders, patterns and addresses.")
    return list({file.path: file for file in found}.values())


def _known(paths: Iterable[Path], lacking: str) -> list[PictureFile]:
    """Return the files whose ending is that of a picture or a film."""
    known = Image.registered_extensions().keys() | FILM_SUFFIXES
    files = sorted(path for path in paths if path.suffix.lower() in known and path.is_file())
    if not files:
        raise FileNotFoundError(lacking)
    return [PictureFile(str(path), path, _is_film(path)) for path in files]


def _checked(file: PictureFile) -> PictureFile:
    """Refuse what is no picture before a model is loaded; films are opened later."""
    if not file.is_film:
        try:
            Image.open(file.path).close()
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            reason = "" if isinstance(error, UnidentifiedImageError) else f" {error}"
            raise ValueError(f"{file.name} is no picture that Pillow can read.{reason}") from None
    return file


def _fetch(place: str, file) -> None:
    if place == "-":
        shutil.copyfileobj(sys.stdin.buffer, file)
        return
    request = urllib.request.Request(place, headers={"User-Agent": "drmm-hf"})  # some servers refuse Python's own
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            shutil.copyfileobj(answer, file)
    except (OSError, ValueError) as error:  # an answer that is no success, no connection, no valid address
        raise OSError(f"{place} cannot be fetched: {error}") from None


def _suffix(place: str) -> str:
    """Return the ending of an address where it is that of a film, since pictures are known by their content."""
    suffix = Path(urllib.parse.urlsplit(place).path).suffix.lower()
    return suffix if suffix in FILM_SUFFIXES else ""


def _is_film(path: Path) -> bool:
    return path.suffix.lower() in FILM_SUFFIXES


def _is_address(place: str) -> bool:
    return re.match(r"https?://", place, re.IGNORECASE) is not None
