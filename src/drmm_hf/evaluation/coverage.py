"""Do the predicted scales say how far the sides of a box are off? Coverage of intervals, and one factor to correct it.

A side's scale belongs to a density about the predicted coordinate: Student's t with some degrees of freedom, 1 for
Cauchy and infinity for Gaussian. Its central intervals of 50, 80, 90, ... % should hold the annotated side of as many
predictions in a hundred. That is asked of correct predictions, by `drmm_hf.evaluation.matches.match` at IoU 0.5: only
they have an annotation to compare with.

The matching selects. A box that is far off is not correct, so the heavy tail that a Cauchy density predicts cannot be
seen: observed coverage of wide intervals lies above the nominal one even if the density is right. What a right density
would show under the same selection is therefore computed and stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .coco_metrics import load_annotations
from .matches import match


EDGES = ("left", "top", "right", "bottom")
# Nominal coverages that are measured, and those of them that are printed.
LEVELS = (*(round(0.05 * index, 2) for index in range(1, 20)), 0.99)
PRINTED_LEVELS = (0.5, 0.8, 0.9, 0.95)

_IOU_THRESHOLD = 0.5
_SMALLEST_SCALE = 1e-9  # pixels, as in the model's density
_NUM_SAMPLES = 256  # of a sequence that fills space evenly, hence few
_ROWS_AT_ONCE = 1024
_FLOOR_SHARE = 0.01  # more scales than this have the smallest ratio by a floor, not by chance


@dataclass(frozen=True)
class MatchedBoxes:
    """Hold the correct predictions of a detector beside the annotations that they took: n pairs.

    Attributes:
        predicted (`np.ndarray` of shape `(n, 4)`): Predicted boxes, xyxy in pixels of the original picture.
        scales (`np.ndarray` of shape `(n, 4)`): Scales of their sides, in pixels.
        annotated (`np.ndarray` of shape `(n, 4)`): Annotated boxes.
        image_ids (`np.ndarray` of shape `(n,)`): Their pictures.
    """

    predicted: np.ndarray
    scales: np.ndarray
    annotated: np.ndarray
    image_ids: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """How many scales each side is off: `(n, 4)`."""
        return np.abs(self.annotated - self.predicted) / self.scales

    @property
    def scale_ratios(self) -> np.ndarray:
        """How large each scale is beside the width or height of its box: `(n, 4)`."""
        return self.scales / np.tile(self.predicted[:, 2:] - self.predicted[:, :2], 2)


def matched_boxes(
    annotations: str | Path | Mapping[str, Any], detections_coco: Sequence[Mapping[str, Any]], top_k: int = 100
) -> MatchedBoxes:
    """Pair correct predictions with their annotations.

    Args:
        annotations (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results with `box_scales`, the scales of left, top, right and
            bottom in pixels, without a score threshold.
        top_k (`int`): Number of predictions a picture.

    Returns:
        `MatchedBoxes`: The pairs.

    Raises:
        ValueError: If a result has no scales, or no prediction is correct.
    """
    lacking = sum("box_scales" not in entry for entry in detections_coco)
    if lacking:
        raise ValueError(f"{lacking} of {len(detections_coco)} detections have no box_scales; D-RMM's mixtures have.")
    annotations = load_annotations(annotations)
    matches = match(annotations, detections_coco, [_IOU_THRESHOLD], top_k)
    correct = matches.correct[0]
    if not correct.any():
        raise ValueError(f"none of {len(detections_coco)} detections is correct; there is nothing to compare with.")
    entries = [detections_coco[index] for index in matches.indices[correct].tolist()]
    records = [annotations["annotations"][index] for index in matches.matched_annotations[0][correct].tolist()]
    scales = np.array([entry["box_scales"] for entry in entries], dtype=float).clip(min=_SMALLEST_SCALE)
    return MatchedBoxes(_corners(entries), scales, _corners(records), matches.image_ids[correct])


def fit_scale_factor(matched: MatchedBoxes, freedom: float = 1.0) -> float | None:
    """Find the factor under which the intervals of 50 % hold half of the annotated sides.

    It is the median error over that of the density. The median hardly feels the selection by the matching, nor the
    tails; no factor can mend their shape.

    Args:
        matched (`MatchedBoxes`): From `matched_boxes`.
        freedom (`float`): Degrees of freedom of the density: 1 is Cauchy, infinity Gaussian.

    Returns:
        `float`: What scales are to be multiplied with; None if half of the sides are predicted exactly.
    """
    from scipy.stats import t

    return float(np.median(matched.errors) / t.ppf(0.75, freedom)) or None


def coverage_report(
    annotations: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    freedom: float = 1.0,
    top_k: int = 100,
    scale_factor: float | None = None,
) -> dict[str, Any]:
    """Measure how often intervals hold the annotated sides.

    Args:
        annotations (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): As in `matched_boxes`.
        freedom (`float`): Degrees of freedom of the density: 1 is Cauchy, infinity Gaussian.
        top_k (`int`): Number of predictions a picture.
        scale_factor (`float`, *optional*): Factor on the scales, fitted on another split, to measure as well.

    Returns:
        `dict`: `num_matched`, `num_ground_truths`, `freedom` (None: infinity), `levels` (nominal coverages),
        `best_scale_factor` (fitted to these very predictions), `smallest_scale_ratio` (of a scale to the width or
        height of its box) and `share_at_smallest`, the share of scales that have this ratio to a thousandth: those
        that a floor such as `min_scale_ratio` holds; and the groups `predicted` and, with `scale_factor`,
        `rescaled`. A group holds `scale_factor`, the observed coverages at the levels of `all` sides and of `left`,
        `top`, `right` and `bottom`, `all_interval` (95 % intervals of `all`, bootstrapped over pictures) and
        `expected`, what `all` would be if the density were right.

    Raises:
        ValueError: If a result has no scales, or no prediction is correct.
    """
    annotations = load_annotations(annotations)
    matched = matched_boxes(annotations, detections_coco, top_k)
    groups = {"predicted": _coverage(matched, freedom) | {"scale_factor": 1.0}}
    if scale_factor is not None:
        rescaled = replace(matched, scales=scale_factor * matched.scales)
        groups["rescaled"] = _coverage(rescaled, freedom) | {"scale_factor": scale_factor}
    ratios = matched.scale_ratios
    return {
        "num_matched": len(matched.predicted),
        "num_ground_truths": sum(not record.get("iscrowd") for record in annotations["annotations"]),
        "freedom": None if np.isinf(freedom) else freedom,
        "levels": list(LEVELS),
        "best_scale_factor": fit_scale_factor(matched, freedom),
        "smallest_scale_ratio": float(ratios.min()),
        "share_at_smallest": float((ratios <= 1.001 * ratios.min()).mean()),
        **groups,
    }


def coverage_table(report: Mapping[str, Any]) -> str:
    """Return coverages as lines of text, in per cent.

    Args:
        report (`Mapping`): From `coverage_report`.

    Returns:
        `str`: A line a printed level and group.
    """
    columns = ("all", *EDGES, "expected")
    titles = "".join(f"{title:>9}" for title in columns)
    lines = [f"{'interval':<18}{titles[:9]}{'95 %':>18}{titles[9:]}"]
    for name in ("predicted", "rescaled"):
        if name not in report:
            continue
        group = report[name]
        if "rescaled" in report:
            lines.append("as predicted" if name == "predicted" else f"scales times {group['scale_factor']:.3f}")
        for place in (report["levels"].index(level) for level in PRINTED_LEVELS):
            values = [f"{100 * group[column][place]:>9.2f}" for column in columns]
            low, high = (f"{100 * end:.2f}" for end in group["all_interval"][place])
            level = f"{100 * report['levels'][place]:g} %"
            lines.append(f"{level:<18}{values[0]}{f'{low} to {high}':>18}{''.join(values[1:])}")
    lines += [
        "",
        f"sides of the {report['num_matched']} correct predictions of {report['num_ground_truths']} objects",
        "expected: of a right density under the same matching",
    ]
    if report["share_at_smallest"] > _FLOOR_SHARE:
        share, ratio = f"{100 * report['share_at_smallest']:.1f}", f"{report['smallest_scale_ratio']:.4g}"
        lines.append(f"{share} % of their scales are at the floor (min_scale_ratio), {ratio} of the box's own side")
    if report["best_scale_factor"] is not None:
        factor = f"{report['best_scale_factor']:.3f}"
        lines.append(f"{factor} is the factor on the scales that would be right for half of these sides")
    return "\n".join(lines)


def _coverage(matched: MatchedBoxes, freedom: float) -> dict[str, Any]:
    """Return observed and expected coverages at the levels."""
    from scipy.stats import t

    reach = t.ppf((1 + np.array(LEVELS)) / 2, freedom)
    covered = matched.errors[..., None] <= reach  # (n, 4, levels)
    sides = {edge: covered[:, index].mean(axis=0).tolist() for index, edge in enumerate(EDGES)}
    return {
        "all": covered.mean(axis=(0, 1)).tolist(),
        "all_interval": _bootstrap(covered.mean(axis=1), matched.image_ids).tolist(),
        **sides,
        "expected": _expected(matched, freedom, reach).tolist(),
    }


def _bootstrap(values: np.ndarray, image_ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return 95 % intervals `(levels, 2)` of the means of `(n, levels)`; whole pictures are drawn."""
    pictures, place = np.unique(image_ids, return_inverse=True)
    sums = np.zeros((len(pictures), values.shape[1]))
    np.add.at(sums, place, values)
    weights = np.random.default_rng(seed).multinomial(len(pictures), np.full(len(pictures), 1 / len(pictures)), 1000)
    means = weights @ sums / (weights @ np.bincount(place))[:, None]
    return np.quantile(means, [0.025, 0.975], axis=0).T


def _expected(matched: MatchedBoxes, freedom: float, reach: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the coverage of boxes drawn from the predicted densities, those with too small an IoU left out.

    Every prediction counts the same, whatever share of its samples remains.
    """
    from scipy.stats import qmc, t

    samples = t.ppf(qmc.Sobol(4, seed=seed).random(_NUM_SAMPLES), freedom)
    inside = (np.abs(samples)[..., None] <= reach).mean(axis=1)  # (samples, levels), a mean over sides
    total, count = np.zeros(len(reach)), 0
    for start in range(0, len(matched.predicted), _ROWS_AT_ONCE):
        predicted = matched.predicted[start : start + _ROWS_AT_ONCE, None]
        drawn = predicted + matched.scales[start : start + _ROWS_AT_ONCE, None] * samples
        kept = _iou(predicted, drawn) >= _IOU_THRESHOLD  # (rows, samples)
        some = kept.any(axis=1)
        total += (kept[some] @ inside / kept[some].sum(axis=1)[:, None]).sum(axis=0)
        count += some.sum()
    return total / max(count, 1)


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes `(..., 4)`; one that is inverted overlaps nothing."""
    overlap = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2], others[..., :2])
    shared = overlap.clip(min=0).prod(axis=-1)
    areas = [(one[..., 2:] - one[..., :2]).clip(min=0).prod(axis=-1) for one in (boxes, others)]
    return shared / np.maximum(areas[0] + areas[1] - shared, np.finfo(float).tiny)


def _corners(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the xywh boxes of records as corners."""
    boxes = np.array([record["bbox"] for record in records], dtype=float)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
