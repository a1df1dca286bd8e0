"""Errors planted in good annotations, to measure how well an audit finds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


KINDS = ("moved", "relabelled", "removed")
MOVED_IOU = (0.3, 0.6)
_NUM_TRIES = 2000  # boxes drawn at once; about one in four overlaps as it should


def plant_errors(
    annotations: Mapping[str, Any], share: float = 0.1, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Spoil some annotations of a COCO file and keep a record of it.

    Each chosen annotation suffers one error, and each kind as many: the box is moved (its four edges by up to half a
    side each, so that its IoU with the original lies between 0.3 and 0.6, inside the picture), its category becomes
    another one, or it is removed. Crowds are left alone.

    Args:
        annotations (`Mapping`): Content of a COCO file; it is left as it is.
        share (`float`): Fraction of the annotations to spoil, in (0, 1].
        seed (`int`): Seed of the choice.

    Returns:
        `tuple[dict, list[dict]]`: The spoilt content, and for each error `kind` (one of `KINDS`), `annotation_id`,
        `image_id`, and `bbox` (xywh, pixels) and `category_id` as they were.

    Raises:
        ValueError: If `share` lies outside (0, 1], or there is only one category to relabel to.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; the rule is a fraction in (0, 1].")
    category_ids = [record["id"] for record in annotations["categories"]]
    if len(category_ids) < 2:
        raise ValueError("annotations have one category only; relabelling needs another.")
    random = np.random.default_rng(seed)
    sizes = {record["id"]: (record["width"], record["height"]) for record in annotations["images"]}
    records = [dict(record) for record in annotations["annotations"]]
    objects = [record for record in records if not record.get("iscrowd")]
    chosen = random.permutation(len(objects))[: round(share * len(objects))]
    planted, removed = [], set()
    for turn, index in enumerate(chosen.tolist()):
        record, kind = objects[index], KINDS[turn % len(KINDS)]
        kept = {"annotation_id": record["id"], **{key: record[key] for key in ("image_id", "bbox", "category_id")}}
        planted.append({"kind": kind, **kept})
        if kind == "moved":
            record["bbox"] = _moved(record["bbox"], sizes[record["image_id"]], random)
            record["area"] = record["bbox"][2] * record["bbox"][3]
            record.pop("segmentation", None)
        elif kind == "relabelled":
            others = [category_id for category_id in category_ids if category_id != record["category_id"]]
            record["category_id"] = others[random.integers(len(others))]
        else:
            removed.add(record["id"])
    remaining = [record for record in records if record["id"] not in removed]
    return {**annotations, "annotations": remaining}, planted


def read_planted(path: str | Path, annotations: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read a record of planted errors.

    Args:
        path (`str` or `Path`): Json file of what `plant_errors` returns second.
        annotations (`Mapping`): The spoilt content, to which it belongs.

    Returns:
        `list[dict]`: The errors.

    Raises:
        ValueError: If the file holds something else or nothing, or errors in pictures that the annotations lack.
    """
    rule = "the rule is a list of errors with kind, annotation_id, image_id, category_id and bbox"
    try:
        planted = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"planted errors {str(path)!r} are no json: {error}") from error
    if not isinstance(planted, list) or not planted:
        kind = "an empty list" if planted == [] else f"a {type(planted).__name__}"
        raise ValueError(f"planted errors {str(path)!r} are {kind}; {rule}.")
    fields = {"kind", "annotation_id", "image_id", "category_id", "bbox"}
    for entry in planted:
        if not isinstance(entry, dict) or fields - entry.keys() or entry["kind"] not in KINDS:
            raise ValueError(f"planted errors {str(path)!r} hold {entry!r}; {rule}.")
    unknown = {entry["image_id"] for entry in planted} - {record["id"] for record in annotations["images"]}
    if unknown:
        raise ValueError(f"planted errors {str(path)!r} are of other pictures: no picture has the id {min(unknown)}.")
    return planted


def _moved(bbox: list[float], size: tuple[int, int], random: np.random.Generator) -> list[float]:
    """Return an xywh box inside a picture of (width, height) that overlaps the given one by `MOVED_IOU`."""
    left, top, width, height = bbox
    box = np.array([left, top, left + width, top + height])
    frame = np.minimum(0, box[[0, 1, 0, 1]]), np.maximum([*size, *size], box[[2, 3, 2, 3]])  # some boxes leave theirs
    while True:
        boxes = box + random.uniform(-0.5, 0.5, (_NUM_TRIES, 4)) * [width, height, width, height]
        boxes = boxes.clip(*frame)
        sides = (boxes[:, 2:] - boxes[:, :2]).clip(0)
        shared = (np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])).clip(0).prod(axis=1)
        iou = shared / (sides.prod(axis=1) + width * height - shared)
        good = np.flatnonzero((iou >= MOVED_IOU[0]) & (iou <= MOVED_IOU[1]))
        if len(good):
            return [*boxes[good[0], :2].tolist(), *sides[good[0]].tolist()]
