"""YOLO folders: `data.yaml`, pictures under `images`, a text file each under `labels`."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from datasets import Dataset
from PIL import Image

from .canonical import Records, annotation_dataset, with_files
from .pictures import displayed_size
from .problems import Problems


logger = logging.getLogger(__name__)

_SPLITS = ("train", "val", "test")


def yolo_splits(source: Path) -> dict[str, Callable[[Problems], Dataset]] | None:
    """Find the splits of a YOLO folder.

    Args:
        source (`Path`): A folder with a `data.yaml` (or `data.yml`), or such a file of any name. `train`, `val` and
            `test` in it are each a folder, a list of folders, or a text file that lists pictures, relative to `path`
            if that is given, else to the file. All of it must lie in the folder of the file.

    Returns:
        `dict` or None: Split -> function that reads it; None if there is no such file.

    Raises:
        ValueError: If the file is wrong.
    """
    names = (source,) if source.suffix in (".yaml", ".yml") else (source / "data.yaml", source / "data.yml")
    file = next((name for name in names if name.is_file()), None)
    if file is None:
        return None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file} is not valid yaml: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a mapping with names, train and val")
    categories = _categories(content, file)
    places = {split: content[split] for split in _SPLITS if content.get(split)}
    if not places:
        raise ValueError(f"{file} names no split: it needs at least one of {', '.join(_SPLITS)}")
    root = _root(content, file, places)
    return {split: partial(_read, file, root, place, split, categories) for split, place in places.items()}


def _categories(content: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{file}: names is {names!r}, must be a list of class names, or a mapping from class to name")
    if content.get("nc") not in (None, len(names)):
        raise ValueError(f"{file}: nc is {content['nc']!r}, but names has {len(names)} classes")
    if not all(isinstance(number, int) for number in names):
        raise ValueError(f"{file}: names has the classes {list(names)}, must be integers")
    return [{"id": number, "name": str(name)} for number, name in sorted(names.items())]


def _root(content: dict[str, Any], file: Path, places: dict[str, Any]) -> Path:
    """Return the folder that `path` names, or that of the file where `path` is of another machine."""
    folder = Path(os.path.abspath(file.parent))
    root = _within(folder, str(content.get("path") or ""))
    if root is not None and root.is_dir():
        return root
    first = next(iter(places.values()))
    try:
        _pictures(folder, first if isinstance(first, list) else [first], file)
    except (ValueError, FileNotFoundError):
        raise ValueError(
            f"{file}: path {content['path']!r} is no folder within {folder}; move the file to the data, or delete path"
        ) from None
    logger.warning("%s: path %r is no folder within %s, which was taken instead", file, content["path"], folder)
    return folder


def _within(root: Path, name: str) -> Path | None:
    """Return the normalised path if it stays within a folder; links are not followed."""
    path = Path(os.path.normpath(root / name))
    return path if path.is_relative_to(root) else None


def _read(
    file: Path, root: Path, place: Any, split: str, categories: list[dict[str, Any]], problems: Problems
) -> Dataset:
    source = f"{file}, split {split}"
    names = _pictures(root, place if isinstance(place, list) else [place], file)
    labels = {name: _label_file(name) for name in names}
    stamps = [_stamp(root / path) for name in names for path in (name, labels[name])]
    if names and not any(stamps[1::2]):
        raise ValueError(f"{source}: none of the {len(names)} pictures has labels, such as {root / labels[names[0]]}")
    key = repr((1, source, str(root), names, stamps, categories))
    fingerprint = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def read() -> Records:
        return _records(source, root, labels, categories, problems)

    annotations = annotation_dataset(read, problems, fingerprint)
    return with_files(annotations, root, source, problems)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return size and time of a file, None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _pictures(root: Path, places: list[Any], file: Path) -> list[str]:
    """List the pictures of a split, by their names relative to the root."""
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    found: list[str] = []
    for place in places:
        # Exports of Roboflow say ../train/images and mean train/images.
        path = _within(root, str(place)) or _within(root, str(place).removeprefix("../"))
        if path is None:
            raise ValueError(f"{file}: {place!r} leaves the data folder {root}")
        if path.is_dir():
            files = (Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names)
            pictures = sorted(p for p in files if p.suffix.lower() in known)
            found += [picture.relative_to(root).as_posix() for picture in pictures]
        elif path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [_listed(line.strip(), path, root) for line in lines if line.strip()]
        else:
            raise FileNotFoundError(f"{file}: {place!r} is neither a folder nor a file in {root}")
    return list(dict.fromkeys(found))


def _listed(line: str, file: Path, root: Path) -> str:
    """Return a line of a picture list relative to the root; one that leaves it stays as it is, to be refused."""
    beside, below = (_within(root, os.path.join(folder, line)) for folder in (file.parent, root))
    path = beside if beside is not None and (beside.exists() or below is None) else below
    return line if path is None else path.relative_to(root).as_posix()


def _label_file(name: str) -> str:
    """Return the label file of a picture: `labels` in place of the last folder `images`, and `.txt`."""
    parts = list(PurePosixPath(name).with_suffix(".txt").parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return "/".join(parts)


def _records(
    source: str, root: Path, labels: dict[str, str], categories: list[dict[str, Any]], problems: Problems
) -> Records:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, label) in enumerate(labels.items(), start=1):
        where = f"{source}: {name}"
        record: dict[str, Any] = {"id": image_id, "file_name": name, "where": where, "width": 1, "height": 1}
        images.append(record)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            continue  # refused with the other records
        if not (root / name).is_file():
            problems.add("missing_picture", where, "the file does not exist")
            images.pop()
            continue
        try:
            with Image.open(root / name) as image:
                record["width"], record["height"] = displayed_size(image)
        except Exception as error:  # decoders of broken files raise whatever they stumble over
            problems.add("unreadable_picture", where, f"cannot be read: {error}")
            images.pop()
            continue
        try:
            lines = (root / label).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            continue  # a picture without objects
        except (OSError, ValueError) as error:
            problems.add("unreadable_annotations", f"{source}: {label}", error)
            images.pop()
            continue
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{source}: {label}, line {number}"
                try:
                    box = _box(line, record["width"], record["height"])
                except ValueError as error:
                    problems.add("bad_record", place, error)
                    continue
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "where": place, **box})
    return Records(source, images, annotations, categories)


def _box(line: str, width: int, height: int) -> dict[str, Any]:
    """Read a line: class, and centre and extent of the box or corners of a polygon, as fractions of the picture."""
    try:
        number, *values = map(float, line.split())
    except ValueError:
        raise ValueError(f"{line!r} must be numbers: class x_centre y_centre width height") from None
    if not all(map(math.isfinite, (number, *values))):
        return {"category_id": number if math.isfinite(number) else None, "bbox": values}
    if len(values) == 4:
        x, y, w, h = (value * side for value, side in zip(values, (width, height) * 2, strict=True))
        return {"category_id": number, "bbox": [x - w / 2, y - h / 2, w, h]}
    if len(values) < 6 or len(values) % 2:
        raise ValueError(
            f"{line!r} has {len(values)} numbers after the class, must be 4 of a box or pairs of a polygon"
        )
    xs, ys = [value * width for value in values[::2]], [value * height for value in values[1::2]]
    turned = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    area = abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in turned)) / 2
    return {
        "category_id": number,
        "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
        "area": area,
    }
