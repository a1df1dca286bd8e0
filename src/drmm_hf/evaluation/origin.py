"""What an evaluation is of: which weights and input, on which annotations, asked in which way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_json


# Settings of a processor that change nothing of what the network sees: names of classes, and what comes after it.
_NOT_SEEN = {"calibration", "score_threshold", "auto_map", "processor_class"}
_NOT_SEEN |= {"image_processor_type", "feature_extractor_type"}


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
        `dict`: The arguments, with `weights` and `ground_truth`, the digests of weights and annotations, and `input`,
        from `input_settings`: names and paths alone do not tell a model or data from what stood there before.
    """
    return {
        "model": None if model is None else str(model),
        "weights": None if model is None else weights_digest(model),
        "input": None if model is None else input_settings(model),
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


def input_settings(folder: str | Path) -> dict[str, Any] | None:
    """Return the settings of a model folder's processor that decide what the network sees, such as the input size.

    Args:
        folder (`str` or `Path`): Of the model.

    Returns:
        `dict` or None: What `preprocessor_config.json` says of it; None if there is no such file, as of a Hub id.

    Raises:
        ValueError: If the file is no valid json.
    """
    path = Path(folder) / "preprocessor_config.json"
    settings = read_json(path) if path.is_file() else None
    if not isinstance(settings, dict):
        return None
    return {name: value for name, value in sorted(settings.items()) if name not in _NOT_SEEN}


def other_input(about: Mapping[str, Any], folder: str | Path) -> str | None:
    """Say in what an evaluation gave the network another input than the processor of a model folder does now.

    Args:
        about (`Mapping`): From `origin`; files of earlier versions have no `input`.
        folder (`str` or `Path`): Of the model.

    Returns:
        `str` or None: The settings with both values; None if they agree, or if one side is not known.
    """
    then, now = about.get("input"), input_settings(folder)
    if then is None or now is None:
        return None
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return ", ".join(f"{name} {then.get(name)} instead of {now.get(name)}" for name in names) or None


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
