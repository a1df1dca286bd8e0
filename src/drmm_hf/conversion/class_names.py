"""Names and category ids of the classes that a converted detector knows."""

import json
from pathlib import Path
from typing import Any

from ..modeling.configuration_drmm import DrmmConfig


def coco_categories() -> dict[int, str]:
    """Return COCO's 80 classes by category id, 1 to 90 with gaps, in the order of labels."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {index: name for index, name in enumerate(names) if name not in ("__background__", "N/A")}


def class_names(config: DrmmConfig) -> list[str]:
    """Return the names of the classes that a detector knows, in the order of labels."""
    assert config.id2label is not None  # a config has some, whatever it was given
    return [str(name) for name in config.id2label.values()]


def class_fields(labels: str | Path | list[str] | None, num_labels: int) -> dict[str, Any]:
    """Return the fields of the configuration that name the classes.

    Args:
        labels (`str`, `Path`, `list[str]` or `None`): "coco"; a COCO annotation file (`.json`), whose category ids are
            kept; a text file with one name a line; or the names. In the order of labels.
        num_labels (`int`): number of classes that the weights have.

    Returns:
        `dict[str, Any]`: `num_labels` alone if `labels` is None, else `id2label`, and `category_ids` where they are
        known: from the annotation file, or because the names are COCO's.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is no text or has no categories, the number of names is another, or a name occurs
            twice.
    """
    if labels is None:
        return {"num_labels": num_labels}
    coco, ids = coco_categories(), None
    if isinstance(labels, list):
        names = labels
    elif str(labels) == "coco":
        names = list(coco.values())
    elif not Path(labels).is_file():
        raise FileNotFoundError(f'labels {str(labels)!r} is neither a file nor "coco".')
    elif Path(labels).suffix == ".json":
        names, ids = _read_categories(Path(labels))
    else:
        names = [line.strip() for line in _read_text(Path(labels)).splitlines() if line.strip()]
    if len(names) != num_labels or len(set(names)) != num_labels:
        raise ValueError(
            f"the weights know {num_labels} classes, but there are {len(names)} names, {len(set(names))} of them "
            "different: give one name for each class with --labels (labels=...)."
        )
    if ids is None and names == list(coco.values()):
        ids = list(coco)
    return {"id2label": dict(enumerate(names))} | ({} if ids is None else {"category_ids": ids})


def _read_categories(path: Path) -> tuple[list[str], list[int]]:
    """Return names and ids of the categories in a COCO annotation file."""
    try:
        categories = json.loads(_read_text(path))["categories"]
        names, ids = [category["name"] for category in categories], [category["id"] for category in categories]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"labels {str(path)!r} has no categories with id and name, as COCO's files have.") from error
    if not all(isinstance(name, str) for name in names) or not all(isinstance(index, int) for index in ids):
        raise ValueError(f"labels {str(path)!r} has categories whose name is no text or whose id is no integer.")
    return names, ids


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"labels {str(path)!r} is no text in UTF-8.") from error
