"""What a score threshold buys: precision, recall and F1 over it, the best one, and which classes are mistaken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .coco_metrics import load_annotations
from .matches import match


# Thresholds of the curves; the best one is looked for among all scores.
GRID = np.arange(101) / 100


def threshold_curves(
    annotations: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    top_k: int = 100,
    iou_threshold: float = 0.5,
) -> dict[str, Any]:
    """Compute precision, recall and F1 of the predictions scoring at least a threshold, for every threshold.

    Args:
        annotations (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results without a score threshold.
        top_k (`int`): Number of predictions a picture.
        iou_threshold (`float`): Smallest IoU of a correct prediction, see `drmm_hf.evaluation.matches.match`.

    Returns:
        `dict`: `thresholds` (0, 0.01, ..., 1), `all` (classes pooled) and `classes` (name to curves). Curves are
        `precision` (1 where nothing scores so high), `recall` and `f1` at the thresholds, and `best_threshold` and
        `best_f1`, over all scores. Classes without ground truths are left out.
    """
    annotations = load_annotations(annotations)
    matches = match(annotations, detections_coco, [iou_threshold], top_k)
    counted = ~matches.ignored[0]
    scores, correct = matches.scores[counted], matches.correct[0][counted]
    category_ids = matches.category_ids[counted]
    curves = {"thresholds": GRID.tolist(), "all": None, "classes": {}}
    if any(matches.num_ground_truths.values()):
        curves["all"] = _curves(scores, correct, sum(matches.num_ground_truths.values()))
    for record in annotations["categories"]:
        total, mine = matches.num_ground_truths[record["id"]], category_ids == record["id"]
        if total:
            curves["classes"][record["name"]] = _curves(scores[mine], correct[mine], total)
    return curves


def best_thresholds(
    annotations: str | Path | Mapping[str, Any], detections_coco: Sequence[Mapping[str, Any]], top_k: int = 100
) -> tuple[float, dict[str, float]]:
    """Find the score thresholds with the largest F1 at IoU 0.5.

    A threshold lies half-way between the lowest score that it keeps and the next one, so that neither rounding nor
    the choice between "above" and "at least" matters.

    Args:
        annotations (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results without a score threshold.
        top_k (`int`): Number of predictions a picture.

    Returns:
        `tuple[float, dict[str, float]]`: The threshold of all classes together, and that of each class by name.
        Classes without objects or predictions have that of all.

    Raises:
        ValueError: If there is no object, or no prediction.
    """
    annotations = load_annotations(annotations)
    curves = threshold_curves(annotations, detections_coco, top_k)
    if curves["all"] is None or curves["all"]["best_threshold"] is None:
        raise ValueError("no object or no prediction; there is no best threshold.")

    def below(best: float, scores: np.ndarray) -> float:
        return float((best + max(scores[scores < best], default=0.0)) / 2)

    scores = np.array([entry["score"] for entry in detections_coco])
    category_ids = np.array([entry["category_id"] for entry in detections_coco])
    overall = below(curves["all"]["best_threshold"], scores)
    each = {}
    for record in annotations["categories"]:
        best = curves["classes"].get(record["name"], {}).get("best_threshold")
        each[record["name"]] = overall if best is None else below(best, scores[category_ids == record["id"]])
    return overall, each


def confusion_matrix(
    annotations: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    threshold: float,
    top_k: int = 100,
    iou_threshold: float = 0.5,
) -> dict[str, Any]:
    """Count which class the predictions name for the objects of each class.

    Predictions take objects by place alone, whatever their class, by falling score.

    Args:
        annotations (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results.
        threshold (`float`): Smallest score that counts.
        top_k (`int`): Number of predictions a picture.
        iou_threshold (`float`): Smallest IoU with the object that a prediction takes.

    Returns:
        `dict`: `threshold`, `names` of the C classes and `matrix`, (C + 1) x (C + 1) counts: rows are the annotated
        class, columns the predicted one; the last row are predictions without an object (duplicates too), the last
        column are objects that were missed. Predictions on crowds are left out.
    """
    annotations = load_annotations(annotations)
    matches = match(annotations, detections_coco, [iou_threshold], top_k, class_aware=False)
    place = {record["id"]: index for index, record in enumerate(annotations["categories"])}
    size = len(place)
    counted = ~matches.ignored[0] & (matches.scores >= threshold)
    predicted = np.array([place[one] for one in matches.category_ids[counted].tolist()], dtype=int)
    taken = matches.matched_category_ids[0][counted].tolist()
    true = np.array([place.get(one, size) for one in taken], dtype=int)
    matrix = np.zeros((size + 1, size + 1), dtype=int)
    np.add.at(matrix, (true, predicted), 1)
    for category_id, total in matches.num_ground_truths.items():
        matrix[place[category_id], size] = total - matrix[place[category_id], :size].sum()
    names = [record["name"] for record in annotations["categories"]]
    return {"threshold": threshold, "names": names, "matrix": matrix.tolist()}


def _curves(scores: np.ndarray, correct: np.ndarray, total: int) -> dict[str, Any]:
    """Return the curves of predictions that `total` ground truths are there for."""
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(correct[order])
    ranks = np.arange(1, len(scores) + 1)
    last = np.append(scores[1:] != scores[:-1], True)[: len(scores)]  # of those that share a score
    f1 = np.where(last, 2 * right / (ranks + total), -1.0)
    best = int(f1.argmax()) if len(f1) else None

    kept = np.searchsorted(-scores, -GRID, side="right")  # how many score at least the threshold
    hits = np.append(0, right)[kept]
    precision = np.where(kept > 0, hits / np.maximum(kept, 1), 1.0)
    return {
        "precision": precision.tolist(),
        "recall": (hits / total).tolist(),
        "f1": (2 * hits / (kept + total)).tolist(),
        "best_threshold": None if best is None else float(scores[best]),
        "best_f1": None if best is None else float(f1[best]),
    }
