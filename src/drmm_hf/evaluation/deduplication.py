"""Non-maximum suppression and winner-take-all: what the paper measures the MCM loss against. D-RMM needs neither.

Both work on the detections of a picture that would be scored, class by class. They undo duplicates by hand: NMS leaves
them out, winner-take-all also gives their confidences to the box that remains.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torchvision.ops import box_iou

from .detections import Detections


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
    return _merge(detections, iou_threshold, add_scores=False)


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
    return _merge(detections, iou_threshold, add_scores=True)


DEDUPLICATION = {"nms": nms, "wta": winner_take_all}


def _merge(detections: Detections, iou_threshold: float, add_scores: bool) -> Detections:
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; the rule is a number in [0, 1].")
    merged = Detections()
    for image_id in detections:
        result = detections[image_id]
        winners = _winners(result, iou_threshold)
        remains = winners == np.arange(len(winners))
        kept = {name: array[remains] for name, array in result.items()}
        if add_scores:
            sums = np.bincount(winners, weights=result["scores"], minlength=len(winners))
            kept["scores"] = np.minimum(sums, 1.0)[remains]
        merged.add(image_id, kept)
    return merged


def _winners(result: Mapping[str, np.ndarray], iou_threshold: float) -> np.ndarray:
    """Return for each box of a picture, sorted by score, the index of the box that suppresses it; its own if none.

    `torchvision.ops.batched_nms` keeps the same boxes but does not say which one a box was suppressed by. It also
    moves classes apart by the largest coordinate, which boxes over the left or upper border defeat.
    """
    boxes, labels = torch.from_numpy(result["boxes"]), result["labels"]
    overlaps = (box_iou(boxes, boxes).numpy() > iou_threshold) & (labels[:, None] == labels)
    winners = np.full(len(labels), -1)
    for index in range(len(labels)):
        if winners[index] < 0:
            winners[overlaps[index] & (winners < 0)] = index
            winners[index] = index  # also where a box without area does not overlap itself
    return winners
