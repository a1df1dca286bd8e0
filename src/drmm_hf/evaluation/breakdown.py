"""Where a detector errs: figures by size, aspect ratio and crowding of objects, and the kinds of its errors.

Objects fall into bins, and so do predictions. AP of a bin follows COCO's rule for its area ranges: objects outside the
bin are neither found nor missed, and predictions count if they took an object of the bin, or took none and are
themselves in the bin. Where a prediction alone cannot tell, as of its neighbours, there is recall only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .calibration import expected_calibration_error
from .coco_metrics import Columns, annotation_area, columns, load_annotations, mean_of_defined, run_hotcoco
from .matches import COCO_IOU_THRESHOLDS, match


# Square roots of areas in pixels of the original picture: COCO's small, medium and large, each cut once more.
SIZE_EDGES = (0.0, 16.0, 32.0, 64.0, 96.0, 192.0, math.inf)
# Width over height.
ASPECT_EDGES = (0.0, 1 / 3, 1 / 2, 1 / 1.25, 1.25, 2.0, 3.0, math.inf)
# Number of objects in the picture.
COUNT_EDGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, math.inf)
# Largest IoU with another object of the class.
OVERLAP_EDGES = (0.0, 0.1, 0.2, 0.3, 0.5, math.inf)

# What TIDE calls its errors, in words.
ERRORS = {
    "Cls": "wrong class",
    "Loc": "wrong place",
    "Both": "wrong class and place",
    "Dupe": "duplicate",
    "Bkg": "nothing there",
    "Miss": "missed object",
}


def object_sizes(annotations: Mapping[str, Any]) -> np.ndarray:
    """Return the square root of the area of each object, as COCO has it.

    Args:
        annotations (`Mapping`): Content of a COCO file.

    Returns:
        `np.ndarray` of shape `(n,)`: In pixels.
    """
    return np.sqrt([annotation_area(record) for record in annotations["annotations"]]).reshape(-1)


def aspect_ratios(boxes: np.ndarray) -> np.ndarray:
    """Return width over height.

    Args:
        boxes (`np.ndarray` of shape `(n, 4)`): xywh.

    Returns:
        `np.ndarray` of shape `(n,)`: Infinite for boxes without height.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(boxes[:, 2] / boxes[:, 3], nan=1.0, posinf=np.inf)


def object_counts(annotations: Mapping[str, Any]) -> np.ndarray:
    """Return for each object how many objects its picture has, crowds aside.

    Args:
        annotations (`Mapping`): Content of a COCO file.

    Returns:
        `np.ndarray` of shape `(n,)`: At least 1 for what is no crowd.
    """
    records = annotations["annotations"]
    image_ids = [record["image_id"] for record in records if not record.get("iscrowd")]
    names, counts = np.unique(image_ids, return_counts=True)
    known = dict(zip(names.tolist(), counts.tolist(), strict=True))
    return np.array([known.get(record["image_id"], 0) for record in records], dtype=float)


def neighbour_overlaps(annotations: Mapping[str, Any]) -> np.ndarray:
    """Return for each object its largest IoU with another of its class in the picture, crowds aside.

    Args:
        annotations (`Mapping`): Content of a COCO file.

    Returns:
        `np.ndarray` of shape `(n,)`: In [0, 1].
    """
    import torch
    from torchvision.ops import box_iou

    records = annotations["annotations"]
    corners = columns(records).boxes.copy()
    corners[:, 2:] += corners[:, :2]
    groups: dict[tuple[int, int], list[int]] = {}
    for position, record in enumerate(records):
        if not record.get("iscrowd"):
            groups.setdefault((record["image_id"], record["category_id"]), []).append(position)
    largest = np.zeros(len(records))
    for positions in groups.values():
        if len(positions) > 1:
            boxes = torch.from_numpy(corners[positions])
            largest[positions] = box_iou(boxes, boxes).fill_diagonal_(0).max(dim=1).values.nan_to_num().numpy()
    return largest


def breakdown(
    annotations: str | Path | Mapping[str, Any], detections_coco: Sequence[Mapping[str, Any]], top_k: int = 100
) -> dict[str, Any]:
    """Measure a detector on objects of each size, aspect ratio and crowding, and count the kinds of its errors.

    Args:
        annotations (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results without a score threshold.
        top_k (`int`): Number of predictions a picture.

    Returns:
        `dict`: `size` (square root of the area, pixels), `aspect_ratio` (width over height), `objects` (in the
        picture) and `overlap` (largest IoU with an object of the class): lists of bins, each with `low`, `high` (the
        bin is [low, high)), `num_ground_truths`, `AP` (COCO's, None where a prediction cannot tell its bin), `recall`
        (of all predictions at IoU 0.5), `AR` (mean over IoU 0.5 to 0.95), and `ECE` and `ECE_0.1` of the bin's
        predictions. `errors` are `tide_errors`, None without hotcoco. What is not defined is None.
    """
    annotations = load_annotations(annotations)
    truth, found = columns(annotations["annotations"]), columns(detections_coco)
    boxes = found.boxes
    counts = dict(zip(truth.image_ids.tolist(), object_counts(annotations).tolist(), strict=True))
    pictures = np.array([counts.get(entry["image_id"], 0.0) for entry in detections_coco])
    axes = {
        "size": (SIZE_EDGES, object_sizes(annotations), np.sqrt(boxes[:, 2:].prod(axis=1))),
        "aspect_ratio": (ASPECT_EDGES, aspect_ratios(truth.boxes), aspect_ratios(boxes)),
        "objects": (COUNT_EDGES, object_counts(annotations), pictures),
        "overlap": (OVERLAP_EDGES, neighbour_overlaps(annotations), None),
    }
    steps = [(name, *edges) for name, axis in axes.items() for edges in zip(axis[0], axis[0][1:], strict=False)]
    report: dict[str, Any] = {name: [] for name in axes}
    for name, low, high in tqdm(steps, desc="breaking down", delay=2, disable=None, leave=False):
        _, objects, predictions = axes[name]
        members = _inside(objects, low, high)
        alike = None if predictions is None else _inside(predictions, low, high)
        figures = bin_figures(annotations, found, members, alike, top_k)
        report[name].append({"low": low, "high": None if math.isinf(high) else high} | figures)
    return report | {"errors": tide_errors(annotations, detections_coco)}


def bin_figures(
    annotations: Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]] | Columns,
    members: np.ndarray,
    alike: np.ndarray | None,
    top_k: int = 100,
) -> dict[str, Any]:
    """Measure one bin.

    Args:
        annotations (`Mapping`): Content of a COCO file.
        detections_coco (`Sequence[Mapping]` or `Columns`): COCO results.
        members (`np.ndarray` of shape `(m,)`): Which annotations are in the bin.
        alike (`np.ndarray` of shape `(n,)`, *optional*): Which predictions are in the bin if they find no object.
            None: it cannot be told, and only recall is measured.
        top_k (`int`): Number of predictions a picture.

    Returns:
        `dict`: `num_ground_truths`, `AP`, `recall`, `AR`, `ECE`, `ECE_0.1`.
    """
    matches = match(annotations, detections_coco, COCO_IOU_THRESHOLDS, top_k, set_aside=~members)
    total = sum(matches.num_ground_truths.values())
    shares = matches.correct.sum(axis=1) / total if total else None
    result: dict[str, Any] = dict.fromkeys(("num_ground_truths", "AP", "recall", "AR", "ECE", "ECE_0.1"))
    result["num_ground_truths"] = total
    if shares is not None:
        result |= {"recall": float(shares[0]), "AR": float(shares.mean())}
    if alike is None:
        return result

    counted = matches.correct | (~matches.ignored & alike[matches.indices])
    precisions = []
    for category_id, number in matches.num_ground_truths.items():
        if number:
            mine = np.flatnonzero(matches.category_ids == category_id)
            mine = mine[np.argsort(-matches.scores[mine], kind="stable")]
            for correct, these in zip(matches.correct[:, mine], counted[:, mine], strict=True):
                precisions.append(average_precision(correct[these], number))
    scores, correct = matches.scores[counted[0]], matches.correct[0][counted[0]]
    result["AP"] = mean_of_defined(np.array(precisions))
    for name, least in (("ECE", 0.0), ("ECE_0.1", 0.1)):
        result[name] = expected_calibration_error(scores, correct, min_score=least).to_dict()["ece"]
    return result


def average_precision(correct: np.ndarray, num_ground_truths: int) -> float:
    """Compute COCO's average precision: the mean over 101 recalls of the largest precision from there on.

    Args:
        correct (`np.ndarray` of shape `(n,)`): Whether each prediction is right, by falling score.
        num_ground_truths (`int`): Number of objects, at least 1.

    Returns:
        `float`: In [0, 1].
    """
    right = np.cumsum(correct)
    precision = right / (np.arange(len(right)) + 1 + np.spacing(1))
    precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    places = np.searchsorted(right / num_ground_truths, np.linspace(0, 1, 101), side="left")
    return float(precision[np.minimum(places, len(right))].mean())


def tide_errors(
    annotations: str | Path | Mapping[str, Any], detections_coco: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Count the kinds of errors, and say how much AP50 each costs, by hotcoco's TIDE.

    Args:
        annotations (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results.

    Returns:
        `dict`, *optional*: `AP50`, `delta` (what AP50 would gain without the errors of a kind) and `counts`, by the
        names of `ERRORS`. None without hotcoco (`pip install "drmm-hf[fast-eval]"`) or without detections.

    Source: Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors (2020).
    """
    if not find_spec("hotcoco") or not detections_coco:
        return None
    found = run_hotcoco(load_annotations(annotations), detections_coco).tide_errors(pos_thr=0.5, bg_thr=0.1)
    return {
        "AP50": float(found["ap_base"]),
        "delta": {name: float(found["delta_ap"][name]) for name in ERRORS},
        "counts": {name: int(found["counts"][name]) for name in ERRORS},
    }


def _inside(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return (values >= low) & (values < high)
