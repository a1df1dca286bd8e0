"""Names and category ids of the classes that a converted detector knows."""

import json
from pathlib import Path
from typing import Any


def coco_categories() -> dict[int, str]:
    """Return COCO's 80 classes by category id, 1 to 90 with gaps, in the order of labels."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {index: name for index, name in enumerate(names) if name not in ("__background__", "N/A")}


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
        ValueError: if the file has no categories, the number of names is another, or a name occurs twice.
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
        content = json.loads(Path(labels).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not content.get("categories"):
            raise ValueError(f"labels {str(labels)!r} has no categories; a json file of labels has COCO's form.")
        categories = content["categories"]
        names, ids = [category["name"] for category in categories], [category["id"] for category in categories]
    else:
        names = [line.strip() for line in Path(labels).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) != num_labels or len(set(names)) != num_labels:
        raise ValueError(
            f"the weights know {num_labels} classes, but there are {len(names)} names, {len(set(names))} of them "
            "different: give one name for each class with --labels (labels=...)."
        )
    if ids is None and names == list(coco.values()):
        ids = list(coco)
    return {"id2label": dict(enumerate(names))} | ({} if ids is None else {"category_ids": ids})
