"""Non-maximum suppression and winner-take-all: what the paper measures the MCM loss against. D-RMM needs neither.

Both work on the detections of a picture that would be scored, class by class. They undo duplicates by hand: NMS leaves
them out, winner-take-all also gives their confidences to the box that remains. A sweep over their IoU tells how many
duplicates a detector leaves, and what they cost in precision and calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchvision.ops import box_iou
from tqdm import tqdm

from drmm_hf.data.labels import LabelMap

from .calibration import expected_calibration_error
from .coco_metrics import coco_metrics, load_annotations
from .detections import Detections
from .matches import match


# Those of Figure 7.
IOU_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def nms(detections: Detections, iou_threshold: float) -> Detections:
    """Leave out each box that overlaps a more confident remaining box of its class.

    Args:
        detections (`Detections`): What a detector found.
        iou_threshold (`float`): IoU above which a box is left out, in [0, 1]; 1 leaves out nothing.

    Returns:
        `Detections`: A new object with the remaining boxes, their fields unchanged. Inverted boxes overlap nothing.

    Raises:
        ValueError: If the threshold lies outside [0, 1].

    Source: Sec. 4.3, Figure 7, Table 3 (II).
    """
    return deduplicate(detections, "nms", iou_threshold)[0]


def winner_take_all(detections: Detections, iou_threshold: float) -> Detections:
    """Leave out boxes as `nms` does, and add their confidences to those of the boxes that suppressed them.

    Among several remaining boxes that overlap a suppressed one it is the most confident that suppressed it, and that
    takes the confidence. The paper says "added" and no more; a confidence is a probability, so sums stop at 1. Only
    `scores` change: of a box that took others in, the score is no longer objectness times class probability.

    Args:
        detections (`Detections`): What a detector found.
        iou_threshold (`float`): IoU above which a box is merged into another, in [0, 1].

    Returns:
        `Detections`: A new object with the remaining boxes, sorted by their new scores.

    Raises:
        ValueError: If the threshold lies outside [0, 1].

    Source: Sec. 4.3, Table 3 (III).
    """
    return deduplicate(detections, "wta", iou_threshold)[0]


def deduplicate(detections: Detections, method: Literal["nms", "wta"], iou_threshold: float) -> tuple[Detections, int]:
    """Apply `nms` or `winner_take_all`.

    Args:
        detections (`Detections`): What a detector found.
        method (`str`): "nms" or "wta".
        iou_threshold (`float`): IoU above which a box is left out, in [0, 1].

    Returns:
        `tuple[Detections, int]`: The remaining boxes, and how many sums of confidences were stopped at 1.

    Raises:
        ValueError: If the threshold lies outside [0, 1].
    """
    (winners,) = _winners_of(detections, [iou_threshold])
    return _suppress(detections, winners, method)


def sweep(
    detections: Detections,
    annotations: str | Path | Mapping[str, Any],
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    top_k: int = 100,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure detections as they are, and after NMS and winner-take-all at several IoU thresholds.

    Args:
        detections (`Detections`): Of any detector, with the labels of the annotations (in the order of `categories`).
        annotations (`str`, `Path` or `Mapping`): The COCO json file, or what it holds.
        iou_thresholds (`Sequence[float]`): IoU above which a box is left out; 1 leaves out nothing.
        top_k (`int`): Number of predictions a picture, over all classes. They are chosen before the suppression.
        progress (`bool`): Whether to show a progress bar. It shows after two seconds only.

    Returns:
        `dict`: `none`, the figures without suppression, and `nms` and `wta`, lists of one entry a threshold. An entry
        has `iou_threshold`, `AP`, `AR100`, `ECE`, `ECE_0.1`, `duplicate_rate` (of the predictions scoring above 0.1,
        those that are wrong only because a more confident one took their object at IoU 0.5), `num_detections`,
        `num_removed`, `num_capped` (sums stopped at 1) and `reliability` (bins of the calibration error).
        `best_iou_threshold` is that of the largest AP with NMS. `example` is the picture from which NMS at that IoU
        takes most boxes above 0.1: its `image_id`, and under `none`, `nms` and `wta` its `boxes` (xyxy pixels) and
        `scores`; None without pictures.

    Source: Figures 7 and 8, Table 3; there NMS is tried at IoU 0.5 to 1.
    """
    annotations = load_annotations(annotations)
    label_map = LabelMap.from_categories(annotations["categories"])
    detections = detections.top_k(top_k).bare()
    none = _figures(detections, annotations, label_map, top_k) | {"num_removed": 0, "num_capped": 0}
    swept: dict[str, Any] = {"none": none, "nms": [], "wta": []}
    hidden = None if progress else True  # None: shown on a terminal
    winners = _winners_of(detections, iou_thresholds)
    steps = [(method, *step) for method in ("nms", "wta") for step in zip(iou_thresholds, winners, strict=True)]
    for method, threshold, winner in tqdm(steps, desc="removing duplicates", delay=2, disable=hidden, leave=False):
        kept, num_capped = _suppress(detections, winner, method)
        num_removed = detections.num_boxes - kept.num_boxes
        figures = none if num_removed == 0 else _figures(kept, annotations, label_map, top_k)
        counts = {"num_removed": num_removed, "num_capped": num_capped}
        swept[method].append({"iou_threshold": threshold} | figures | counts)
    best = max(swept["nms"], key=lambda entry: -1.0 if entry["AP"] is None else entry["AP"], default=None)
    best = best and best["iou_threshold"]
    return swept | {"best_iou_threshold": best, "example": _example(detections, best)}


def _example(detections: Detections, iou_threshold: float | None) -> dict[str, Any] | None:
    """Return the picture that NMS changes most, before and after."""
    if not len(detections) or iou_threshold is None:
        return None
    (winners,) = _winners_of(detections, [iou_threshold])
    found = {"none": detections} | {method: _suppress(detections, winners, method)[0] for method in ("nms", "wta")}
    confident = {name: {one: int((part[one]["scores"] > 0.1).sum()) for one in part} for name, part in found.items()}
    most = max(detections, key=lambda one: confident["none"][one] - confident["nms"][one])
    fields = {name: part[most] for name, part in found.items()}
    return {"image_id": most} | {
        name: {"boxes": result["boxes"].tolist(), "scores": result["scores"].tolist()}
        for name, result in fields.items()
    }


def _figures(
    detections: Detections, annotations: Mapping[str, Any], label_map: LabelMap, top_k: int
) -> dict[str, Any]:
    """Measure detections."""
    entries = detections.to_coco(label_map)
    metrics, matches = coco_metrics(annotations, entries), match(annotations, entries, top_k=top_k)
    counted = ~matches.ignored[0]
    scores, correct = matches.scores[counted], matches.correct[0][counted]
    reliability = expected_calibration_error(scores, correct).to_dict()
    confident = scores > 0.1
    duplicates = matches.duplicates[0][counted][confident]
    return {
        "AP": metrics["AP"],
        "AR100": metrics["AR100"],
        "ECE": reliability["ece"],
        "ECE_0.1": expected_calibration_error(scores, correct, min_score=0.1).to_dict()["ece"],
        "duplicate_rate": float(duplicates.mean()) if len(duplicates) else None,
        "num_detections": len(matches.scores),
        "reliability": reliability,
    }


def _winners_of(detections: Detections, iou_thresholds: Sequence[float]) -> list[dict[int, np.ndarray]]:
    """Return by picture what `_winners` does, one dict a threshold."""
    for threshold in iou_thresholds:
        if not 0 <= threshold <= 1:
            raise ValueError(f"iou_threshold is {threshold}; the rule is a number in [0, 1].")
    found = {image_id: _winners(detections[image_id], iou_thresholds) for image_id in detections}
    return [{image_id: each[index] for image_id, each in found.items()} for index in range(len(iou_thresholds))]


def _winners(result: Mapping[str, np.ndarray], iou_thresholds: Sequence[float]) -> list[np.ndarray]:
    """Return for each box of a picture, sorted by score, the index of the box that suppresses it; its own if none.

    `torchvision.ops.batched_nms` keeps the same boxes but does not say which one a box was suppressed by. It also
    moves classes apart by the largest coordinate, which boxes over the left or upper border defeat.
    """
    boxes, labels = torch.from_numpy(result["boxes"]), result["labels"]
    ious = np.where(labels[:, None] == labels, box_iou(boxes, boxes).numpy(), 0)
    np.fill_diagonal(ious, 0)
    found = []
    for threshold in iou_thresholds:
        overlaps, winners = ious > threshold, np.arange(len(labels))
        free = np.ones(len(labels), dtype=bool)
        for index in np.flatnonzero(overlaps.any(axis=1)).tolist():  # the others neither suppress nor are suppressed
            if free[index]:
                free[index] = False
                winners[overlaps[index] & free] = index
                free &= ~overlaps[index]
        found.append(winners)
    return found


def _suppress(
    detections: Detections, winners: Mapping[int, np.ndarray], method: Literal["nms", "wta"]
) -> tuple[Detections, int]:
    """Leave out the boxes that others suppress, and tell how many sums of confidences were stopped at 1."""
    merged, num_capped = Detections(), 0
    for image_id, winner in winners.items():
        remains = winner == np.arange(len(winner))
        kept = {name: array[remains] for name, array in detections[image_id].items()}
        if method == "wta":
            sums = np.bincount(winner, weights=detections[image_id]["scores"], minlength=len(winner))
            # Scores have float32's precision: what exceeds 1 by less is rounding.
            num_capped += int((sums > 1 + np.finfo(np.float32).eps).sum())
            kept["scores"] = np.minimum(sums, 1.0)[remains]
        merged.add(image_id, kept)
    return merged, num_capped
