"""Pictures on disk or in bytes: open them, and say what is wrong with them before they stop a training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image


class Picture(NamedTuple):
    """What a look at a picture tells.

    Args:
        size (`tuple[int, int]` or None): Width and height as displayed; None if it cannot be opened.
        mode (`str` or None): Pillow's mode as stored, such as `RGB`, `L`, `CMYK` or `I;16`.
        turned (`bool`): Whether EXIF turns or mirrors it.
        digest (`str` or None): Hash of size and pixels, where they were decoded.
        problem (`tuple[str, str]` or None): A kind of `drmm_hf.data.problems.KINDS`, and what was found.
    """

    size: tuple[int, int] | None = None
    mode: str | None = None
    turned: bool = False
    digest: str | None = None
    problem: tuple[str, str] | None = None


def open_image(image: Mapping[str, Any]) -> Image.Image:
    """Open an undecoded picture of a dataset; pixels are read on access.

    Args:
        image (`Mapping`): `{"bytes": ..., "path": ...}`, one of them set.

    Returns:
        `PIL.Image.Image`: The picture as stored, before its EXIF orientation is applied.

    Raises:
        OSError: If it is no picture, or has more pixels than Pillow's `Image.MAX_IMAGE_PIXELS` allows.
    """
    try:
        return Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"]))
    except Image.DecompressionBombError as error:
        raise OSError(f"too many pixels: {error}") from error


def displayed_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of a picture once its EXIF orientation is applied.

    Args:
        image (`PIL.Image.Image`): The picture as stored.

    Returns:
        `tuple[int, int]`: Width and height in pixels.
    """
    turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)  # Pillow turns TIFFs itself
    return image.size[::-1] if turned else image.size


def inspect_picture(image: Mapping[str, Any], width: int, height: int, *, decode: bool) -> Picture:
    """Look whether a picture can be decoded and has the annotated size, in either orientation.

    Args:
        image (`Mapping`): `{"bytes": ..., "path": ...}`, one of them set.
        width (`int`): Annotated width in pixels.
        height (`int`): Annotated height in pixels.
        decode (`bool`): Whether to decode all pixels. Otherwise the header is read, and only a picture whose end looks
            cut off is decoded.

    Returns:
        `Picture`: What was found.
    """
    try:
        stored = open_image(image)
        size, turned = displayed_size(stored), _orientation(stored) not in (None, 1)
        if decode or not _ends_well(image, stored.format):
            stored.load()
        pixels = stored.tobytes() if decode else b""
    except Exception as error:  # decoders of broken files raise whatever they stumble over
        return Picture(problem=("unreadable_picture", f"cannot be read: {error or type(error).__name__}"))
    problem = None
    if stored.mode.startswith(("I", "F")):
        problem = ("unsupported_picture", f"pixels of mode {stored.mode!r}, must be of 8 bits")
    elif (width, height) not in (size, stored.size):
        problem = ("wrong_size", f"{size[0]} x {size[1]}, its annotations say {width} x {height}")
    digest = hashlib.blake2b(pixels, digest_size=16, salt=f"{stored.width}x{stored.height}".encode()).hexdigest()
    return Picture(size, stored.mode, turned, digest if decode else None, problem)


def inspect_pictures(rows: Iterable[Mapping[str, Any]], *, decode: bool, threads: int = 8) -> Iterator[Picture]:
    """Look at many pictures at once; decoders work side by side in threads.

    Args:
        rows (`Iterable[Mapping]`): Canonical rows with undecoded `image`, `width` and `height`.
        decode (`bool`): As in `inspect_picture`.
        threads (`int`): Pictures in work at a time.

    Yields:
        `Picture`: One a row, in their order.
    """
    with ThreadPoolExecutor(threads) as pool:
        batch = []
        for row in rows:
            batch.append(pool.submit(inspect_picture, row["image"], row["width"], row["height"], decode=decode))
            if len(batch) == 8 * threads:  # bounds the pictures in memory
                yield from (future.result() for future in batch[:threads])
                batch = batch[threads:]
        yield from (future.result() for future in batch)


def _orientation(image: Image.Image) -> int | None:
    return image.getexif().get(ExifTags.Base.Orientation)


def _ends_well(image: Mapping[str, Any], image_format: str | None) -> bool:
    """Return whether a JPEG or PNG has its end marker; other formats must be decoded to tell."""
    marker = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(image_format or "")
    if marker is None:
        return False
    if image["bytes"] is not None:
        return marker in image["bytes"][-16:]
    with Path(image["path"]).open("rb") as file:
        file.seek(-min(16, file.seek(0, 2)), 2)
        return marker in file.read()
