"""Reliability of confidences: the expected calibration error of the paper, its bins, and what others measure.

The paper's figure is `expected_calibration_error` over `drmm_hf.evaluation.matches.match`. The variants answer what it
leaves open: other bins, other IoU thresholds, dependence on place and size (D-ECE), localisation (LaECE, LRP), and how
far the figure would move with other pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .coco_metrics import load_annotations
from .matches import COCO_IOU_THRESHOLDS, Matches, match


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
        names = ("bin_edges", "bin_confidence", "bin_accuracy")
        edges, confidence, accuracy = (np.array(numbers[name], dtype=float) for name in names)
        ece = float("nan") if numbers["ece"] is None else numbers["ece"]
        return cls(ece, edges, confidence, accuracy, np.array(numbers["bin_count"], dtype=int))


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
    scores: np.ndarray,
    correct: np.ndarray,
    num_bins: int = 10,
    min_score: float = 0.0,
    binning: Literal["width", "mass"] = "width",
) -> CalibrationResult:
    """Compare confidence with accuracy in bins.

    ECE = sum over bins of (share of the predictions in the bin) * `|accuracy - mean confidence|`. Bins are (lo, hi]; a
    score of exactly 0 belongs to the first.

    Args:
        scores (`np.ndarray` of shape `(n,)`): Confidences in [0, 1].
        correct (`np.ndarray` of shape `(n,)`): Whether each prediction is correct.
        num_bins (`int`): Number of bins between 0 and 1.
        min_score (`float`): Only scores strictly above it count; 0 counts all, those of exactly 0 too.
        binning (`str`): "width", bins of equal width, or "mass", bins of equally many predictions (fewer bins where
            scores repeat).

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
    if binning == "mass" and len(scores):
        edges = np.unique([0.0, *np.quantile(scores, edges[1:-1], method="inverted_cdf"), 1.0])
        num_bins = len(edges) - 1
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


def bootstrap_interval(
    scores: np.ndarray,
    correct: np.ndarray,
    image_ids: np.ndarray,
    pictures: np.ndarray,
    num_bins: int = 10,
    min_score: float = 0.0,
    level: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Say how far the calibration error would move with other pictures of the same kind.

    Pictures are drawn with replacement, each with all its predictions, which depend on each other.
    The error itself is biased upwards, the more so the fewer predictions a bin has, so it may lie low in its interval.

    Args:
        scores (`np.ndarray` of shape `(n,)`): Confidences in [0, 1].
        correct (`np.ndarray` of shape `(n,)`): Whether each prediction is correct.
        image_ids (`np.ndarray` of shape `(n,)`): Picture of each prediction.
        pictures (`np.ndarray`): All pictures, those without predictions too.
        num_bins (`int`): Number of bins of equal width.
        min_score (`float`): As in `expected_calibration_error`.
        level (`float`): Share of the samples inside the interval.
        num_samples (`int`): How often to draw.
        seed (`int`): Of the draws.

    Returns:
        `tuple[float, float]`: The interval, from percentiles; NaN without predictions.
    """
    counted = scores > min_score if min_score > 0 else np.ones(len(scores), dtype=bool)
    scores, correct, image_ids = scores[counted], correct[counted], image_ids[counted]
    if not len(scores):
        return float("nan"), float("nan")
    rows = np.searchsorted(np.sort(pictures), image_ids) * num_bins + _bins(scores, num_bins)
    size = len(pictures) * num_bins
    # The error of a sample is sum over bins |sum of (correct - score)| / number of predictions.
    gaps = np.bincount(rows, weights=correct - scores, minlength=size).reshape(-1, num_bins)
    counts = np.bincount(rows, minlength=size).reshape(-1, num_bins).sum(axis=1)
    generator = np.random.default_rng(seed)
    errors = np.empty(num_samples)
    for sample in range(num_samples):
        drawn = np.bincount(generator.integers(len(pictures), size=len(pictures)), minlength=len(pictures))
        errors[sample] = np.abs(drawn @ gaps).sum() / max(drawn @ counts, 1)
    low, high = np.quantile(errors, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def detection_calibration_error(
    scores: np.ndarray, correct: np.ndarray, places: np.ndarray, num_bins: int = 5, min_count: int = 8
) -> float:
    """Compute the D-ECE: calibration error in bins of confidence and of place, or size, together.

    A detector can be right on average and wrong at the border of the picture; this error sees it. Bins with few
    predictions, of which there are many, are left out.

    Args:
        scores (`np.ndarray` of shape `(n,)`): Confidences in [0, 1].
        correct (`np.ndarray` of shape `(n,)`): Whether each prediction is correct.
        places (`np.ndarray` of shape `(n, d)`): What else to bin by, such as the centre of the box, in fractions of
            the picture; what lies outside [0, 1] counts at the border.
        num_bins (`int`): Number of bins of each dimension.
        min_count (`int`): Fewest predictions of a bin that counts.

    Returns:
        `float`: Mean over the predictions in bins that count; NaN if there are none.

    Source: Kueppers et al., Multivariate Confidence Calibration for Object Detection (2020).
    """
    cells = np.zeros(len(scores), dtype=int)
    for values in (scores, *places.T):
        cells = cells * num_bins + _bins(values, num_bins)
    _, cells, count = np.unique(cells, return_inverse=True, return_counts=True)
    gap = np.abs(np.bincount(cells, weights=correct - scores, minlength=len(count)))
    counted = count >= min_count
    return float(gap[counted].sum() / count[counted].sum()) if counted.any() else float("nan")


def localization_aware_error(matches: Matches, row: int = 0, num_bins: int = 25) -> float:
    """Compute the LaECE: how far confidence is from the product of precision and IoU, class by class.

    Args:
        matches (`Matches`): At an IoU threshold such as 0.1, which says what counts as found at all.
        row (`int`): Which of its thresholds.
        num_bins (`int`): Number of bins of equal width.

    Returns:
        `float`: Mean over the classes that have predictions; NaN if there are none.

    Source: Oksuz et al., Towards Building Self-Aware Object Detectors (2023). There, predictions below a threshold
        tuned for each class are left out first; here all of the top 100 count.
    """
    counted = ~matches.ignored[row]
    scores, ious, classes = matches.scores[counted], matches.ious[row][counted], matches.category_ids[counted]
    errors = []
    for category_id in np.unique(classes):
        mine = classes == category_id
        gaps = np.bincount(_bins(scores[mine], num_bins), weights=ious[mine] - scores[mine])
        errors.append(np.abs(gaps).sum() / mine.sum())
    return float(np.mean(errors)) if errors else float("nan")


def optimal_lrp(matches: Matches, row: int = 0) -> dict[int, tuple[float, float | None]]:
    """Compute the optimal localisation-recall-precision error of each class, and the threshold that reaches it.

    LRP of the predictions scoring at least s is (sum over the correct of (1 - IoU) / (1 - tau) + false positives +
    misses) / (correct + false positives + misses), tau the IoU threshold; lower is better.

    Args:
        matches (`Matches`): At an IoU threshold below 1, such as 0.5.
        row (`int`): Which of its thresholds.

    Returns:
        `dict[int, tuple[float, float | None]]`: By category id, for those with ground truths: the smallest LRP, in
        [0, 1], and the score s; None if no prediction at all is best.

    Source: Oksuz et al., Localization Recall Precision (2018).
    """
    tau = matches.iou_thresholds[row]
    found = {}
    for category_id, total in matches.num_ground_truths.items():
        if not total:
            continue
        mine = np.flatnonzero((matches.category_ids == category_id) & ~matches.ignored[row])
        mine = mine[np.argsort(-matches.scores[mine], kind="stable")]
        scores, correct = matches.scores[mine], matches.correct[row][mine]
        distance = np.cumsum(np.where(correct, (1 - matches.ious[row][mine]) / (1 - tau), 0.0))
        right, wrong = np.cumsum(correct), np.cumsum(~correct)
        error = (distance + wrong + total - right) / (wrong + total)
        last = np.append(scores[1:] != scores[:-1], True)[: len(scores)]  # of those that share a score
        best = np.argmin(np.where(last, error, np.inf)) if len(error) else None
        found[category_id] = (1.0, None) if best is None or error[best] >= 1 else (error[best], scores[best])
    return {category_id: (float(error), score and float(score)) for category_id, (error, score) in found.items()}


def calibration_report(
    annotations: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    top_k: int = 100,
    num_bins: int = 10,
) -> dict[str, Any]:
    """Measure the reliability of a detector's confidences in every way that this module knows.

    Args:
        annotations (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds, with picture sizes.
        detections_coco (`Sequence[Mapping]`): COCO results without a score threshold. If all have `objectness` and
            `class_probability`, these are measured too, over the same boxes: those of the `top_k` confidences.
        top_k (`int`): Number of predictions a picture.
        num_bins (`int`): Number of bins.

    Returns:
        `dict`: `kinds`, for `confidence` and, where there are any, `class_probability` and `objectness`: `ECE` and
        `ECE_0.1` with their bootstrap intervals of 95 % (`..._interval`), `ECE_mass` with bins of equal mass and
        `reliability`, the bins; `iou_thresholds`, a list with `iou_threshold`, `ECE`, `ECE_0.1`, and both for
        predictions that need not name the class (`ECE_any_class`, `ECE_0.1_any_class`); `D-ECE` with bins of `centre`
        and of `size`, over scores above 0.1; `LaECE`; `oLRP`, the mean over classes, and `best_thresholds`, class name
        to score. What is not defined is None.

    Source: Eq. 9, Figures 8 and 9.
    """
    annotations = load_annotations(annotations)
    aware, agnostic = (
        match(annotations, detections_coco, COCO_IOU_THRESHOLDS, top_k, class_aware) for class_aware in (True, False)
    )
    counted = ~aware.ignored[0]
    entries = [detections_coco[index] for index in aware.indices[counted].tolist()]
    correct, image_ids = aware.correct[0][counted], aware.image_ids[counted]
    kinds: dict[str, dict[str, Any]] = {}
    for name, key in (("confidence", "score"), ("class_probability",) * 2, ("objectness",) * 2):
        if not all(key in entry for entry in detections_coco):
            continue
        scores = np.array([entry[key] for entry in entries], dtype=float)
        reliability = expected_calibration_error(scores, correct, num_bins)
        kinds[name] = {
            "ECE": reliability.ece,
            "ECE_0.1": expected_calibration_error(scores, correct, num_bins, 0.1).ece,
            "ECE_mass": expected_calibration_error(scores, correct, num_bins, binning="mass").ece,
        }
        for title, least in (("ECE_interval", 0.0), ("ECE_0.1_interval", 0.1)):
            interval = bootstrap_interval(scores, correct, image_ids, aware.pictures, num_bins, least)
            kinds[name][title] = [_number(value) for value in interval]
        kinds[name] = {
            key: _number(value) if isinstance(value, float) else value for key, value in kinds[name].items()
        }
        kinds[name]["reliability"] = reliability.to_dict()

    thresholds: list[dict[str, Any]] = []
    for row, threshold in enumerate(COCO_IOU_THRESHOLDS):
        thresholds.append({"iou_threshold": threshold})
        for matches, suffix in ((aware, ""), (agnostic, "_any_class")):
            mine = ~matches.ignored[row]
            for name, least in (("ECE", 0.0), ("ECE_0.1", 0.1)):
                error = expected_calibration_error(matches.scores[mine], matches.correct[row][mine], num_bins, least)
                thresholds[-1][name + suffix] = _number(error.ece)

    scores, sizes = aware.scores[counted], {record["id"]: record for record in annotations["images"]}
    frames = np.array([[sizes[one]["width"], sizes[one]["height"]] for one in image_ids.tolist()]).reshape(-1, 2)
    boxes = np.array([entry["bbox"] for entry in entries], dtype=float).reshape(-1, 4)
    confident = scores > 0.1
    places = {"centre": (boxes[:, :2] + boxes[:, 2:] / 2) / frames, "size": boxes[:, 2:] / frames}
    lrp = optimal_lrp(aware)
    names = {record["id"]: record["name"] for record in annotations["categories"]}
    return {
        "num_predictions": len(scores),
        "kinds": kinds,
        "iou_thresholds": thresholds,
        "D-ECE": {
            name: _number(detection_calibration_error(scores[confident], correct[confident], place[confident]))
            for name, place in places.items()
        },
        "LaECE": _number(localization_aware_error(match(annotations, detections_coco, [0.1], top_k))),
        "oLRP": float(np.mean([error for error, _ in lrp.values()])) if lrp else None,
        "best_thresholds": {names[category_id]: score for category_id, (_, score) in lrp.items()},
    }


def _bins(values: np.ndarray, num_bins: int) -> np.ndarray:
    """Return the bin of equal width of each value, (lo, hi]; what lies outside [0, 1] belongs to the outer ones."""
    edges = np.arange(num_bins + 1) / num_bins
    return np.clip(np.searchsorted(edges, values, side="left") - 1, 0, num_bins - 1)


def _number(value: float) -> float | None:
    """Return None for NaN, which json does not have."""
    return None if np.isnan(value) else float(value)
