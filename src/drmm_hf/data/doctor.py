"""Look through a whole dataset before training: everything wrong with it, and the figures that settings depend on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from tqdm import tqdm

from .canonical import categories
from .coco import find_splits, plain_split, resolve_split
from .hub_datasets import BoxFormat
from .labels import LabelMap
from .pictures import Picture, inspect_pictures
from .problems import Problems


RARE = 10  # fewer boxes than this teach a class little
_QUANTILES = {"min": 0, "25 %": 25, "median": 50, "75 %": 75, "95 %": 95, "max": 100}
_NAMED = 5  # examples in a note


def examine(
    source: str | Path,
    splits: Collection[str] | None = None,
    *,
    num_queries: int | Callable[[Dataset], int] = 300,
    bbox_format: BoxFormat | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Check every record and decode every picture of a dataset, and count what is there.

    Args:
        source (`str` or `Path`): As in `drmm_hf.data.coco.load_detection_dataset`.
        splits (`Collection[str]`, *optional*): Which splits; by default all.
        num_queries (`int` or `Callable`): Predictions of the model for one picture: more objects cannot all be found.
            A function chooses them for the first split with pictures; that of training is the first.
        bbox_format (`str`, *optional*): Format of boxes that do not prove theirs.
        threads (`int`, *optional*): Pictures decoded side by side; by default one for each core.

    Returns:
        `dict`: `source`, `layout`, `num_queries`, `num_problems`, `splits` (name -> figures and `problems`, which hold
        all messages) and `notes`: what is no error but worth to know, in words. Json as it is.

    Raises:
        ValueError: If the source is not understood or has no such split.
        FileNotFoundError: If it does not exist.
    """
    layout, readers = find_splits(source, bbox_format=bbox_format)
    names = list(readers) if splits is None else [resolve_split(split, readers, source) for split in splits]
    names.sort(key=lambda name: plain_split(name) != "train")  # a picture of two splits is wrong in the other one
    report: dict[str, Any] = {"source": str(source), "layout": layout, "num_queries": None, "splits": {}}
    if isinstance(num_queries, int):
        report["num_queries"] = num_queries
    places: dict[str, tuple[str, str]] = {}  # digest of a picture -> split and name of the first one
    first: list[dict[str, Any]] | None = None
    for split in dict.fromkeys(names):
        problems = Problems(listed=None)
        dataset = _read(readers[split], split, problems)
        if dataset is not None:
            pictures = _pictures(dataset, split, threads)
            if callable(num_queries) and report["num_queries"] is None and len(dataset):
                report["num_queries"] = num_queries(dataset)
            report["splits"][split] = _figures(dataset, pictures, report["num_queries"] or 0)
            report["splits"][split]["duplicates"] = _compare(dataset, pictures, split, places, problems)
            known = sorted(categories(dataset), key=lambda record: record["id"])
            first = known if first is None else first
            if known != first:
                message = f"{_classes(known)}; the first split has {_classes(first)}"
                problems.add("other_categories", split, message)
        report["splits"].setdefault(split, {})["problems"] = problems.found
    found = [entry["count"] for part in report["splits"].values() for entry in part["problems"].values()]
    return report | {"num_problems": sum(found), "notes": _notes(report)}


def _read(reader: Callable[[Problems], Dataset], split: str, problems: Problems) -> Dataset | None:
    try:
        dataset = reader(problems)
        LabelMap.from_categories(categories(dataset))
        return dataset
    except (ValueError, OSError) as error:
        problems.add("unreadable_annotations", split, error)
        return None


def _pictures(dataset: Dataset, split: str, threads: int | None) -> list[Picture]:
    rows = dataset.select_columns(["image", "width", "height"]).cast_column("image", datasets.Image(decode=False))
    threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    pictures = inspect_pictures(rows, decode=True, threads=threads)
    return list(tqdm(pictures, f"decoding {split}", len(rows), leave=False, delay=2, disable=None))


def _figures(dataset: Dataset, pictures: list[Picture], num_queries: int) -> dict[str, Any]:
    """Count what settings depend on. Crowds are counted once, and nowhere else: they are no labels."""
    table = dataset.select_columns(["file_name", "width", "height", "objects"]).with_format("arrow")[:]
    objects = table.column("objects").combine_chunks()
    row = np.asarray(pc.list_parent_indices(objects))
    fields = {
        name: np.asarray(pc.struct_field(objects.flatten(), name)) for name in ("category_id", "area", "iscrowd")
    }
    boxes = np.asarray(pc.struct_field(objects.flatten(), "bbox").flatten()).reshape(-1, 4)
    real = fields["iscrowd"] == 0
    counts = np.bincount(row[real], minlength=len(table))
    areas = fields["area"][real]
    keys = np.column_stack([row[real], fields["category_id"][real], boxes[real]])
    same = len(keys) - len(np.unique(keys, axis=0))
    names = table.column("file_name").to_pylist()
    beyond = np.flatnonzero(counts > num_queries)
    tally = Counter(fields["category_id"][real].tolist())
    modes = Counter(picture.mode for picture in pictures if picture.mode is not None)
    return {
        "pictures": len(table),
        "empty_pictures": int((counts == 0).sum()),
        "boxes": int(real.sum()),
        "crowds": int((~real).sum()),
        "boxes_per_picture": _quantiles(counts),
        "small_boxes": int((areas < 32**2).sum()),
        "medium_boxes": int(((areas >= 32**2) & (areas < 96**2)).sum()),
        "large_boxes": int((areas >= 96**2).sum()),
        "identical_boxes": same,
        "widths": _quantiles(table.column("width").to_numpy()),
        "heights": _quantiles(table.column("height").to_numpy()),
        "beyond_queries": {
            "pictures": [names[index] for index in beyond],
            "boxes": int((counts[beyond] - num_queries).sum()),
        },
        "modes": dict(sorted(modes.items())),
        "turned": sum(picture.turned for picture in pictures),
        "classes": {record["name"]: tally[record["id"]] for record in categories(dataset)},
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {name: float(np.percentile(values, q)) for name, q in _QUANTILES.items()} if len(values) else {}


def _compare(
    dataset: Dataset,
    pictures: Iterable[Picture],
    split: str,
    places: dict[str, tuple[str, str]],
    problems: Problems,
) -> list[list[str]]:
    """Record what is wrong with pictures and which ones earlier splits hold; return pairs of equal ones in this."""
    duplicates = []
    for name, image_id, picture in zip(dataset["file_name"], dataset["image_id"], pictures, strict=True):
        where = f"{split}: {name!r} (image {image_id})"
        if picture.problem is not None:
            problems.add(picture.problem[0], where, picture.problem[1])
        if picture.digest is None:
            continue
        other, twin = places.setdefault(picture.digest, (split, name))
        if other != split:
            problems.add("leaked_picture", where, f"has the pixels of {twin!r} in {other}")
        elif twin != name:
            duplicates.append([twin, name])
    return duplicates


def _classes(records: Collection[Mapping[str, Any]]) -> str:
    listed = ", ".join(f"{record['id']} {record['name']}" for record in list(records)[:_NAMED])
    return f"{len(records)} categories ({listed}{', ...' if len(records) > _NAMED else ''})"


def _notes(report: Mapping[str, Any]) -> list[str]:
    """Say in words what is worth to know before training."""
    notes = []
    parts = {split: part for split, part in report["splits"].items() if "classes" in part}
    for split, part in parts.items():
        absent = [name for name, count in part["classes"].items() if not count]
        rare = [f"{name} {count}" for name, count in part["classes"].items() if 0 < count < RARE]
        if plain_split(split) == "train" and absent:
            notes.append(f"{split}: no boxes of {_few(absent)}, which cannot be learnt")
        elif absent:
            notes.append(f"{split}: no boxes of {_few(absent)}, whose AP is not defined here")
        if rare:
            notes.append(f"{split}: fewer than {RARE} boxes of {_few(rare)}: their figures are noise")
        beyond = part["beyond_queries"]
        if beyond["pictures"]:
            notes.append(
                f"{split}: {len(beyond['pictures'])} pictures have more than {report['num_queries']} boxes "
                f"({beyond['boxes']} beyond): raise num_queries, or cut the pictures up ({_few(beyond['pictures'])})"
            )
        if part["duplicates"]:
            pairs = [" = ".join(pair) for pair in part["duplicates"]]
            notes.append(f"{split}: {len(pairs)} pictures repeat the pixels of another: {_few(pairs)}")
        if part["identical_boxes"]:
            notes.append(f"{split}: {part['identical_boxes']} boxes repeat another of their class in the same picture")
        if part["turned"]:
            notes.append(
                f"{split}: EXIF turns or mirrors {part['turned']} pictures; boxes are taken to be of the pictures as "
                "displayed, unless only the stored one has the annotated size"
            )
        other = [f"{count} {mode}" for mode, count in part["modes"].items() if mode != "RGB"]
        if other:
            notes.append(f"{split}: pictures that are not RGB, and are converted: {_few(other)}")
    holders = {name: [split for split in parts if parts[split]["classes"].get(name)] for name in _names(parts)}
    for split in parts:
        alone = [name for name, found in holders.items() if found == [split]]
        if alone and len(parts) > 1:
            notes.append(f"{split}: the only split with boxes of {_few(alone)}")
    return notes


def _names(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the classes of all splits."""
    return list(dict.fromkeys(name for part in parts.values() for name in part["classes"]))


def _few(names: Collection[str]) -> str:
    return ", ".join(list(names)[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
