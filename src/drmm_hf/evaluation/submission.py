"""Results for an evaluation server: pictures without annotations, and the file that it wants."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch

from drmm_hf.data.labels import LabelMap

from .evaluate import category_of_label
from .files import read_json, whole_file
from .parts import predict_parts, remove_parts


if TYPE_CHECKING:
    from accelerate import PartialState


# Longest name of a file without its ending; disks take 255 bytes.
_LONGEST = 240
_WORDS = {int: "whole number", str: "text"}


def load_image_info(path: str | Path, images: str | Path) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Load pictures that nobody has annotated, such as those of COCO's test-dev.

    Args:
        path (`str` or `Path`): COCO json file with `images` and `categories`, such as `image_info_test-dev2017.json`.
        images (`str` or `Path`): Folder of the pictures.

    Returns:
        `tuple[Dataset, dict]`: Rows with `image_id`, `file_name`, `width`, `height` and `image`, and the content.

    Raises:
        ValueError: If images or categories are missing, or a record lacks its id, file name, width or height.
        FileNotFoundError: If a picture is missing.
    """
    content = read_json(path)
    lacking = [name for name in ("images", "categories") if not (isinstance(content, Mapping) and content.get(name))]
    if lacking:
        raise ValueError(f"{path} has no {' and no '.join(lacking)}; the rule is a COCO file that lists both.")
    records = content["images"]
    for index, record in enumerate(records):
        for name, kind in (("id", int), ("file_name", str), ("width", int), ("height", int)):
            value = record.get(name) if isinstance(record, Mapping) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(
                    f"{name} of image {index} of {path} is {value!r}; the rule is a {_WORDS[kind]} for every image."
                )
    files = [str(Path(images) / record["file_name"]) for record in records]
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(files)} pictures are missing, such as {missing[0]}")
    columns = {name: [record[name] for record in records] for name in ("file_name", "width", "height")}
    columns |= {"image_id": [record["id"] for record in records], "image": files}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False)), content


def write_submission(
    model: torch.nn.Module,
    processor: Any,
    image_info: str | Path,
    images: str | Path,
    output_dir: str | Path,
    name: str,
    *,
    batch_size: int = 1,
    top_k: int = 100,
    processes: PartialState | None = None,
) -> Path | None:
    """Find the objects in pictures without annotations, and write the file that COCO's server takes.

    Like `drmm_hf.evaluation.evaluate.evaluate`, it works in parts and goes on after a kill.

    Args:
        model (`torch.nn.Module`): Any transformers object detector.
        processor (`Any`): Its image processor.
        image_info (`str` or `Path`): As `path` in `load_image_info`.
        images (`str` or `Path`): Folder of the pictures.
        output_dir (`str` or `Path`): Where to write.
        name (`str`): Name of the method, in the name of the file; anything but letters, digits, dots and hyphens
            becomes a hyphen.
        batch_size (`int`): Largest number of pictures in a batch.
        top_k (`int`): Number of predictions a picture; the server takes 100.
        processes (`accelerate.PartialState`, *optional*): Processes that share the pictures.

    Returns:
        `Path`: `detections_SET_NAME_results.zip`, which holds the json of the same name; SET is what follows
        `image_info_` in the name of the file, such as `test-dev2017`. None in all but the main process.

    Raises:
        ValueError: If the model's classes are not those of the file, or its name would be too long for a disk.
    """
    subset = Path(image_info).stem.removeprefix("image_info_").removeprefix("instances_")
    stem = f"detections_{subset}_{re.sub('[^A-Za-z0-9.-]+', '-', name)}_results"
    if len(os.fsencode(stem)) > _LONGEST:
        raise ValueError(
            f"submission is {name!r}; the rule is one that leaves the file's name within {_LONGEST} bytes."
        )
    dataset, content = load_image_info(image_info, images)
    mapping = category_of_label(model.config, content["categories"])
    parts = Path(output_dir) / "parts"
    options: dict[str, Any] = {"batch_size": batch_size, "top_k": top_k, "processes": processes}
    detections = predict_parts(model, processor, dataset, content["images"], parts, **options)
    if detections is None:
        return None
    label_map = LabelMap.from_categories(content["categories"])
    known = detections.relabel({label: label_map.label(category_id) for label, category_id in mapping.items()})
    keys = ("image_id", "category_id", "bbox", "score")
    entries = [{key: entry[key] for key in keys} for entry in known.to_coco(label_map)]
    path = Path(output_dir) / f"{stem}.zip"
    write_archive(entries, path)
    remove_parts(parts)
    return path


def write_archive(content: Any, path: Path) -> None:
    """Write json as a zip of one file, whole or not at all.

    Args:
        content (`Any`): For json.
        path (`Path`): The zip; what it holds has its name, with the ending json.
    """
    with whole_file(path) as partial_file, zipfile.ZipFile(partial_file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{path.stem}.json", json.dumps(content, allow_nan=False))
