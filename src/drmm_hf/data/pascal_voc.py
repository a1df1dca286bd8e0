"""Pascal VOC folders: `Annotations/*.xml`, `JPEGImages`, and lists of pictures in `ImageSets/Main`.

Corners are indices of pixels counted from 1, the last one included, as the development kit defines them: a box from 1
to the width of the picture covers all of it. Difficult objects become crowds, since VOC's evaluation ignores them
too: they are no labels, and detections of them are neither right nor wrong. Truncated objects are objects.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from datasets import Dataset
from PIL import Image

from .canonical import Records, annotation_dataset, leaves_folder, with_files
from .pictures import displayed_size
from .problems import Problems


_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


def voc_splits(
    folder: Path, given: Iterable[Mapping[str, Any]] | None = None
) -> dict[str, Callable[[Problems], Dataset]] | None:
    """Find the splits of a Pascal VOC folder.

    Args:
        folder (`Path`): With `Annotations`, `JPEGImages` and `ImageSets/Main/<split>.txt`, one name a line. Lists of
            one class, which have a second column, are no splits.
        given (`Iterable[Mapping]`, *optional*): Categories, records with `id` and `name`. By default the names in all
            annotation files, by alphabet from 0, so that the splits agree.

    Returns:
        `dict` or None: Split -> function that reads it; None if the folder is none of VOC.

    Raises:
        ValueError: If no list is there.
    """
    if not (folder / "Annotations").is_dir():
        return None
    lists = {}
    for path in sorted((folder / "ImageSets" / "Main").glob("*.txt")):
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if all(len(line) == 1 for line in lines):
            lists[path.stem] = [line[0] for line in lines]
    if not lists:
        raise ValueError(f"{folder / 'ImageSets' / 'Main'} has no list of pictures, such as train.txt")
    given = None if given is None else list(given)
    return {split: partial(_read, folder, split, names, given) for split, names in lists.items()}


def _read(
    folder: Path, split: str, names: list[str], given: list[Mapping[str, Any]] | None, problems: Problems
) -> Dataset:
    source = f"{folder}, split {split}"
    files = (entry for entry in os.scandir(folder / "Annotations") if entry.name.endswith(".xml"))
    stamps = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in files)
    pictures = {name: _picture(folder, name) for name in names}
    key = repr((1, source, given, stamps, pictures))
    fingerprint = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def read() -> Records:
        return _records(source, folder, pictures, given, problems)

    annotations = annotation_dataset(read, problems, fingerprint)
    return with_files(annotations, folder / "JPEGImages", source, problems)


def _picture(folder: Path, name: str) -> str:
    """Return the file name of a picture that a list names without its ending."""
    if leaves_folder(name):
        return name
    found = (f"{name}{suffix}" for suffix in _SUFFIXES if (folder / "JPEGImages" / f"{name}{suffix}").is_file())
    return next(found, f"{name}.jpg")


def _records(
    source: str,
    folder: Path,
    pictures: dict[str, str],
    given: list[Mapping[str, Any]] | None,
    problems: Problems,
) -> Records:
    if given is None:
        names: set[str] = set()
        for path in (folder / "Annotations").glob("*.xml"):
            try:
                names |= {entry.findtext("name", "").strip() for entry in _parse(path).findall("object")}
            except ValueError:  # an error of the split that lists the picture
                continue
        given = [{"id": number, "name": name} for number, name in enumerate(sorted(names - {""}))]
    ids = {record["name"]: record["id"] for record in given}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, file_name) in enumerate(pictures.items(), start=1):
        where = f"{source}: Annotations/{name}.xml"
        if leaves_folder(name):
            images.append({"id": image_id, "file_name": name, "width": 1, "height": 1, "where": where})
            continue
        try:
            content = _parse(folder / "Annotations" / f"{name}.xml")
            width, height = _size(content, folder / "JPEGImages" / file_name)
        except FileNotFoundError:
            problems.add("missing_annotation", where, f"does not exist, but {source} lists {name!r}")
            continue
        except ValueError as error:
            problems.add("bad_record", where, error)
            continue
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height, "where": where})
        for number, entry in enumerate(content.findall("object"), start=1):
            place = f"{where}, object {number}"
            class_name = entry.findtext("name", "").strip()
            if class_name not in ids:
                problems.add("unknown_category", place, f"name {class_name!r} is not among {sorted(ids)}")
                continue
            try:
                box = _box(entry)
            except ValueError as error:
                problems.add("bad_record", place, error)
                continue
            fields = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[class_name]}
            crowd = int(entry.findtext("difficult", "0").strip() == "1")
            annotations.append({**fields, "bbox": box, "iscrowd": crowd, "where": place})
    return Records(source, images, annotations, given)


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"is not valid xml: {error}") from None


def _size(content: ElementTree.Element, picture: Path) -> tuple[int, int]:
    """Return width and height from the xml, or from the picture where the xml has none."""
    try:
        width, height = (int(float(content.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"size: {error}") from None
    if width > 0 and height > 0:
        return width, height
    try:
        with Image.open(picture) as image:
            return displayed_size(image)
    except Exception as error:  # decoders of broken files raise whatever they stumble over
        raise ValueError(f"has no size, and {picture.name} cannot be read: {error}") from None


def _box(entry: ElementTree.Element) -> list[float]:
    corners = {key: entry.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")}
    try:
        left, top, right, bottom = (float(value or "") for value in corners.values())
    except ValueError:
        raise ValueError(f"bndbox is {corners}, must be 4 numbers") from None
    return [left - 1, top - 1, right - left + 1, bottom - top + 1]
