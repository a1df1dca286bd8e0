"""Reliability of confidences: the expected calibration error of the paper, and its bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .matches import match


@dataclass(frozen=True)
class CalibrationResult:
    """Hold the calibration error and what each bin of confidences contributes.

    Attributes:
        ece (`float`): Expected calibration error, in [0, 1]; NaN if there is no prediction.
        bin_edges (`np.ndarray` of shape `(num_bins + 1,)`): Bin m is the half-open interval (edge m, edge m + 1].
        bin_confidence (`np.ndarray` of shape `(num_bins,)`): Mean score of the predictions of a bin; NaN if empty.
        bin_accuracy (`np.ndarray` of shape `(num_bins,)`): Share of correct predictions of a bin; NaN if empty.
        bin_count (`np.ndarray` of shape `(num_bins,)`): Number of predictions of a bin.
    """

    ece: float
    bin_edges: np.ndarray
    bin_confidence: np.ndarray
    bin_accuracy: np.ndarray
    bin_count: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for json, with None for what is not defined."""
        return {
            "ece": _number(self.ece),
            "bin_edges": self.bin_edges.tolist(),
            "bin_confidence": [_number(value) for value in self.bin_confidence.tolist()],
            "bin_accuracy": [_number(value) for value in self.bin_accuracy.tolist()],
            "bin_count": self.bin_count.tolist(),
        }

    @classmethod
    def from_dict(cls, numbers: Mapping[str, Any]) -> CalibrationResult:
        """Read what `to_dict` wrote."""
        bins = [np.array(numbers[name], dtype=float) for name in ("bin_edges", "bin_confidence", "bin_accuracy")]
        ece = float("nan") if numbers["ece"] is None else numbers["ece"]
        return cls(ece, *bins, np.array(numbers["bin_count"], dtype=int))


def match_predictions(
    ground_truth: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    iou_threshold: float = 0.5,
    top_k: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """Tell which predictions are correct, by `drmm_hf.evaluation.matches.match`.

    Args:
        ground_truth (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results.
        iou_threshold (`float`): Smallest IoU of a correct prediction.
        top_k (`int`): Number of predictions a picture.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: `scores` `(n,)` and `correct` `(n,)` of all pictures and classes, without the
        predictions that fall on crowds.

    Source: "accuracy" in Eq. (9); the paper names neither the matching nor the IoU, so COCO's rule stands in.
    """
    matches = match(ground_truth, detections_coco, [iou_threshold], top_k)
    counted = ~matches.ignored[0]
    return matches.scores[counted], matches.correct[0][counted]


def expected_calibration_error(
    scores: np.ndarray, correct: np.ndarray, num_bins: int = 10, min_score: float = 0.0
) -> CalibrationResult:
    """Compare confidence with accuracy in bins of equal width.

    ECE = sum over bins of (share of the predictions in the bin) * |accuracy - mean confidence|. Bins are (lo, hi]; a
    score of exactly 0 belongs to the first.

    Args:
        scores (`np.ndarray` of shape `(n,)`): Confidences in [0, 1].
        correct (`np.ndarray` of shape `(n,)`): Whether each prediction is correct.
        num_bins (`int`): Number of bins between 0 and 1.
        min_score (`float`): Only scores strictly above it count; 0 counts all, those of exactly 0 too.

    Returns:
        `CalibrationResult`: The error and the bins.

    Raises:
        ValueError: If a score lies outside [0, 1].

    Source: Eq. (9).
    """
    scores = np.asarray(scores, dtype=np.float64)
    correct = np.asarray(correct, dtype=bool)
    if ((scores < 0) | (scores > 1) | np.isnan(scores)).any():
        raise ValueError(f"scores lie between {scores.min()} and {scores.max()}; confidences lie in [0, 1].")
    if min_score > 0:
        scores, correct = scores[scores > min_score], correct[scores > min_score]

    edges = np.arange(num_bins + 1) / num_bins
    bins = np.clip(np.searchsorted(edges, scores, side="left") - 1, 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bins, weights=scores, minlength=num_bins) / count
        accuracy = np.bincount(bins, weights=correct, minlength=num_bins) / count
    filled = count > 0
    gap = np.abs(accuracy - confidence)[filled]
    ece = float((count[filled] * gap).sum() / len(scores)) if len(scores) else float("nan")
    return CalibrationResult(ece, edges, confidence, accuracy, count)


def calibration(
    ground_truth: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    iou_threshold: float = 0.5,
    num_bins: int = 10,
    top_k: int = 100,
    min_score: float = 0.0,
) -> CalibrationResult:
    """Compute the expected calibration error of a detector, pooled over pictures and classes.

    Args:
        ground_truth (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results without a score threshold.
        iou_threshold (`float`): Smallest IoU of a correct prediction, see `match_predictions`.
        num_bins (`int`): Number of bins between 0 and 1.
        top_k (`int`): Number of predictions a picture.
        min_score (`float`): Only scores strictly above it count. Most of the top 100 score near 0, where accuracy is
            near 0 too, so an error over all predictions flatters: look at `min_score=0.1` beside it.

    Returns:
        `CalibrationResult`: The error and the bins.

    Source: Eq. (9).
    """
    scores, correct = match_predictions(ground_truth, detections_coco, iou_threshold, top_k)
    return expected_calibration_error(scores, correct, num_bins, min_score)


def _number(value: float) -> float | None:
    """Return None for NaN, which json does not have."""
    return None if np.isnan(value) else float(value)
