"""What an evaluation is of: which weights, on which annotations, asked in which way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def origin(
    model: str | Path | None,
    data: str | None,
    split: str,
    annotations: Mapping[str, Any],
    *,
    revision: str | None = None,
    annotations_file: str | None = None,
    top_k: int = 100,
    top_k_ratio: float | None = None,
    dtype: str | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Say what an evaluation is of, for `evaluation.json`.

    Args:
        model (`str` or `Path`, *optional*): Folder or Hub id; None of detections from a file.
        data (`str`, *optional*): Where the pictures are from.
        split (`str`): Their split.
        annotations (`Mapping`): Content of their COCO file.
        revision (`str`, *optional*): Commit of a model on the Hub.
        annotations_file (`str`, *optional*): The file, if it is not the data's own.
        top_k (`int`): Predictions a picture.
        top_k_ratio (`float`, *optional*): Share of the queries that were kept.
        dtype (`str`, *optional*): Type of the weights, if not the one that they were saved in.
        step (`int`, *optional*): Step of the training run that chose its best checkpoint by these figures.

    Returns:
        `dict`: The arguments, with `weights` and `ground_truth`, the digests of weights and annotations: names and
        paths alone do not tell a model or data from what stood there before.
    """
    return {
        "model": None if model is None else str(model),
        "weights": None if model is None else weights_digest(model),
        "revision": revision,
        "data": data,
        "split": split,
        "ground_truth": annotations_digest(annotations),
        "annotations": annotations_file,
        "top_k": top_k,
        "top_k_ratio": top_k_ratio,
        "dtype": dtype,
        "step": step,
    }


def weight_files(folder: str | Path) -> list[Path]:
    """List the weights of a model folder, without variants such as `model.raw.safetensors`.

    Args:
        folder (`str` or `Path`): Of the model.

    Returns:
        `list[Path]`: `model.safetensors`, or the parts that it is split into.
    """
    return sorted(path for path in Path(folder).glob("model*.safetensors") if path.name.count(".") == 1)


def weights_digest(folder: str | Path) -> str | None:
    """Return a digest of the weights of a model folder.

    Args:
        folder (`str` or `Path`): Of the model.

    Returns:
        `str` or None: SHA-256 in hexadecimal digits; None if there are none, as of a Hub id.
    """
    digest, files = hashlib.sha256(), weight_files(folder)
    for path in files:
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):  # noqa: B023
                digest.update(block)
    return digest.hexdigest() if files else None


def annotations_digest(annotations: Mapping[str, Any]) -> str:
    """Return a digest of the pictures' names and of all boxes: other splits may hold a 000001.png too.

    Args:
        annotations (`Mapping`): Content of a COCO file.

    Returns:
        `str`: SHA-256 in hexadecimal digits; the order of the records and their ids do not count.
    """
    classes = {record["id"]: record["name"] for record in annotations["categories"]}
    names = {record["id"]: str(record.get("file_name", record["id"])) for record in annotations["images"]}
    lines = [*names.values()]
    for one in annotations["annotations"]:
        kind = names.get(one["image_id"]), classes.get(one["category_id"]), bool(one.get("iscrowd"))
        lines.append(repr((*kind, *map(float, one["bbox"]), one.get("area"))))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
