"""Correct confidences and scales afterwards: a temperature, isotonic regression and a factor.

They are fitted on one split and tested on another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .calibration import expected_calibration_error, match_predictions
from .coco_metrics import load_annotations
from .coverage import fit_scale_factor, matched_boxes
from .matches import match
from .origin import annotations_digest
from .thresholds import best_thresholds


# Scores nearer to 0 or 1 than float32 can tell from them have no finite log-odds.
_EDGE = float(np.finfo(np.float32).eps)
_IOU_THRESHOLD = 0.5  # of a correct prediction


@dataclass(frozen=True)
class Calibrator:
    """Map confidences to calibrated ones, never changing their order (isotonic regression makes some equal).

    Attributes:
        method (`str`): "temperature" or "isotonic".
        temperature (`float`, *optional*): What log-odds are divided by; above 1 confidences were too extreme.
        scores (`tuple[float, ...]`): Knots of the isotonic map, rising; between them it is linear, beyond them flat.
        calibrated (`tuple[float, ...]`): Its values at the knots.
    """

    method: Literal["temperature", "isotonic"]
    temperature: float | None = None
    scores: tuple[float, ...] = ()
    calibrated: tuple[float, ...] = ()

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Calibrate confidences.

        Args:
            scores (`np.ndarray` of shape `(n,)`): Confidences in [0, 1].

        Returns:
            `np.ndarray` of shape `(n,)`: In [0, 1].
        """
        if self.method == "isotonic":
            return np.interp(scores, self.scores, self.calibrated)
        scaled = _log_odds(scores) / self.temperature
        return 1 / (1 + np.exp(-scaled))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for json."""
        if self.method == "temperature":
            return {"method": self.method, "temperature": self.temperature}
        return {"method": self.method, "scores": list(self.scores), "calibrated": list(self.calibrated)}

    @classmethod
    def from_dict(cls, numbers: Mapping[str, Any]) -> Calibrator:
        """Read what `to_dict` wrote.

        Args:
            numbers (`Mapping`): The fields.

        Returns:
            `Calibrator`: The map.

        Raises:
            ValueError: If the method is unknown, or a field is missing or not what the method needs.
        """
        method = numbers.get("method")
        if method == "temperature":
            temperature = numbers.get("temperature")
            if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
                raise ValueError(f"temperature is {temperature!r}; the rule is a number above 0.")
            return cls(method, temperature=float(temperature))
        if method == "isotonic":
            scores, calibrated = (tuple(numbers.get(name) or ()) for name in ("scores", "calibrated"))
            rising = all(
                list(values) == sorted(values) and min(values, default=0) >= 0 for values in (scores, calibrated)
            )
            if not scores or len(scores) != len(calibrated) or not rising or max(*scores, *calibrated) > 1:
                raise ValueError("scores and calibrated of an isotonic map are equally many rising numbers in [0, 1].")
            return cls(method, scores=scores, calibrated=calibrated)
        raise ValueError(f"method is {method!r}; the rule is 'temperature' or 'isotonic'.")


def fit_temperature(scores: np.ndarray, correct: np.ndarray) -> Calibrator:
    """Find the temperature under which right and wrong predictions are most likely.

    Args:
        scores (`np.ndarray` of shape `(n,)`): Confidences in [0, 1].
        correct (`np.ndarray` of shape `(n,)`): Whether each prediction is correct.

    Returns:
        `Calibrator`: With a temperature between 1/20 and 20.

    Raises:
        ValueError: If there is no right or no wrong prediction.

    Source: Guo et al., On Calibration of Modern Neural Networks (2017).
    """
    from scipy.optimize import minimize_scalar

    _check(correct)
    log_odds, sign = _log_odds(scores), np.where(correct, -1.0, 1.0)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, sign * log_odds * np.exp(-log_temperature)).mean())

    bound = np.log(20)
    best = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return Calibrator("temperature", temperature=float(np.exp(best.x)))


def fit_isotonic(scores: np.ndarray, correct: np.ndarray) -> Calibrator:
    """Find the rising map from confidence to accuracy with the least squared error.

    Args:
        scores (`np.ndarray` of shape `(n,)`): Confidences in [0, 1].
        correct (`np.ndarray` of shape `(n,)`): Whether each prediction is correct.

    Returns:
        `Calibrator`: Flat on each block of scores, linear in between.

    Raises:
        ValueError: If there is no right or no wrong prediction.

    Source: Zadrozny and Elkan, Transforming Classifier Scores into Accurate Probability Estimates (2002).
    """
    from scipy.optimize import isotonic_regression

    _check(correct)
    knots, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    accuracy = np.bincount(place, weights=correct) / count
    fitted = np.clip(isotonic_regression(accuracy, weights=count).x, 0, 1)
    # Only the ends of a block say something.
    ends = np.append(True, np.diff(fitted) > 0) | np.append(np.diff(fitted) > 0, True)
    return Calibrator("isotonic", scores=tuple(knots[ends].tolist()), calibrated=tuple(fitted[ends].tolist()))


CALIBRATORS = {"temperature": fit_temperature, "isotonic": fit_isotonic}


def fit_calibrators(
    annotations: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    top_k: int = 100,
    freedom: float = 1.0,
) -> dict[str, Any]:
    """Fit both maps to the predictions on one split, and the factor on their scales where they have any.

    Args:
        annotations (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results without a score threshold.
        top_k (`int`): Number of predictions a picture.
        freedom (`float`): Degrees of freedom of the density of `box_scales`, see `drmm_hf.evaluation.coverage`.

    Returns:
        `dict`: Json of each map under its method, `scale_factor` where all results have `box_scales`, and `fitted_on`:
        `num_images` and a fingerprint of the `pictures`.

    Raises:
        ValueError: If there is no right or no wrong prediction.
    """
    annotations = load_annotations(annotations)
    scores, correct = match_predictions(annotations, detections_coco, top_k=top_k)
    fitted: dict[str, Any] = {method: fit(scores, correct).to_dict() for method, fit in CALIBRATORS.items()}
    if all("box_scales" in entry for entry in detections_coco):
        factor = fit_scale_factor(matched_boxes(annotations, detections_coco, top_k), freedom)
        fitted |= {} if factor is None else {"scale_factor": factor}
    fitted_on = {"num_images": len(annotations["images"]), "pictures": annotations_digest(annotations)}
    return fitted | {"fitted_on": fitted_on}


def check_calibrators(fitted: Any, annotations: Mapping[str, Any]) -> None:
    """Refuse what `apply_calibrators` cannot test on a split.

    Args:
        fitted (`Any`): Content of a file.
        annotations (`Mapping`): The content of a COCO file.

    Raises:
        ValueError: If `fitted` is not from `fit_calibrators`, or from there with the same pictures.
    """
    missing = {*CALIBRATORS, "fitted_on"} - {*(fitted if isinstance(fitted, Mapping) else ())}
    if missing:
        raise ValueError(f"the file of calibrators has no {', '.join(sorted(missing))}; --calibration writes one.")
    if same_pictures(fitted, annotations):
        raise ValueError("the calibrators were fitted on these very pictures; the rule is to test on another split.")


def apply_calibrators(
    fitted: Mapping[str, Any],
    annotations: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    top_k: int = 100,
) -> dict[str, dict[str, Any]]:
    """Measure what maps that were fitted on one split do on another.

    Args:
        fitted (`Mapping`): From `fit_calibrators`.
        annotations (`str`, `Path` or `Mapping`): The COCO json file of the other split, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results there.
        top_k (`int`): Number of predictions a picture.

    Returns:
        `dict`: `none`, `temperature` and `isotonic`, each with `ECE`, `ECE_0.1` (of calibrated scores above 0.1) and
        `reliability`.

    Raises:
        ValueError: If the maps were fitted on the same pictures, or `fitted` is something else.
    """
    annotations = load_annotations(annotations)
    check_calibrators(fitted, annotations)
    scores, correct = match_predictions(annotations, detections_coco, top_k=top_k)
    maps = {"none": np.asarray} | {method: Calibrator.from_dict(fitted[method]) for method in CALIBRATORS}
    tested = {}
    for method, calibrate in maps.items():
        reliability = expected_calibration_error(calibrate(scores), correct).to_dict()
        above = expected_calibration_error(calibrate(scores), correct, min_score=0.1).to_dict()
        tested[method] = {"ECE": reliability["ece"], "ECE_0.1": above["ece"], "reliability": reliability}
    return tested


def held_out_errors(
    annotations: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    top_k: int = 100,
    num_folds: int = 5,
) -> dict[str, dict[str, float]]:
    """Measure each map on pictures that it was not fitted on: cross-validation over the pictures of one split.

    Args:
        annotations (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results without a score threshold.
        top_k (`int`): Number of predictions a picture.
        num_folds (`int`): How many parts the pictures are split into; each is held out once.

    Returns:
        `dict`: `none`, `temperature` and `isotonic`, each with `ECE` and `squared_error` (Brier's score: the mean of
        (confidence - correct)^2, which also counts what a map loses by making confidences equal). Empty if there are
        fewer pictures than parts, or some part holds all right or all wrong predictions.
    """
    annotations = load_annotations(annotations)
    matches = match(annotations, detections_coco, [_IOU_THRESHOLD], top_k)
    counted = ~matches.ignored[0]
    scores, correct = matches.scores[counted], matches.correct[0][counted]
    pictures, place = np.unique(matches.image_ids[counted], return_inverse=True)
    folds = (np.random.default_rng(0).permutation(len(pictures)) % num_folds)[place]
    parts = [folds == fold for fold in range(num_folds)]
    if len(pictures) < num_folds or not all(0 < correct[~part].mean() < 1 for part in parts):
        return {}
    errors = {}
    for method, fit in ({"none": lambda *_: np.asarray} | CALIBRATORS).items():
        calibrated = np.empty(len(scores))
        for part in parts:
            calibrated[part] = fit(scores[~part], correct[~part])(scores[part])
        ece = expected_calibration_error(calibrated, correct).ece
        errors[method] = {"ECE": ece, "squared_error": float(np.square(calibrated - correct).mean())}
    return errors


def calibration_fields(
    annotations: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    top_k: int = 100,
    *,
    method: Literal["temperature", "isotonic"] | None = "temperature",
    scales: bool = True,
    threshold: Literal["all", "class"] | None = None,
    freedom: float = 1.0,
) -> dict[str, Any]:
    """Fit what `DrmmImageProcessor` saves and applies.

    Args:
        annotations (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results of the model as it predicts them, neither calibrated nor
            cut by a threshold.
        top_k (`int`): Number of predictions a picture.
        method (`str`, *optional*): Map of the confidences; None leaves them alone.
        scales (`bool`): Whether to correct box scales by a factor.
        threshold (`str`, *optional*): Whether to look for the score threshold of the largest F1, one for all classes
            or one for each; of calibrated scores.
        freedom (`float`): As in `fit_calibrators`.

    Returns:
        `dict`: `calibration` (None if nothing is corrected) and `score_threshold`: None, a number, or with "class"
        a number by name of the class.

    Raises:
        ValueError: If there is no right or no wrong prediction, or scales are asked for and results have none.
    """
    annotations = load_annotations(annotations)
    fitted = fit_calibrators(annotations, detections_coco, top_k, freedom)
    if scales and "scale_factor" not in fitted:
        raise ValueError("the detections have no box_scales that a factor could correct; D-RMM's mixtures have.")
    calibration = {"scores": fitted[method]} if method else {}
    calibration |= {"scale_factor": fitted["scale_factor"]} if scales else {}
    fields = {"calibration": calibration | {"fitted_on": fitted["fitted_on"]} if calibration else None}
    if method:
        calibrated = Calibrator.from_dict(fitted[method])(np.array([entry["score"] for entry in detections_coco]))
        pairs = zip(detections_coco, calibrated.tolist(), strict=True)
        detections_coco = [{**entry, "score": score} for entry, score in pairs]
    overall, each = best_thresholds(annotations, detections_coco, top_k) if threshold else (None, None)
    return fields | {"score_threshold": each if threshold == "class" else overall}


def same_pictures(fitted: Mapping[str, Any], annotations: Mapping[str, Any]) -> bool:
    """Tell whether calibrators were fitted on these very pictures.

    Args:
        fitted (`Mapping`): From `fit_calibrators`, or the `calibration` of a processor.
        annotations (`Mapping`): The content of a COCO file.

    Returns:
        `bool`: True if so.
    """
    return fitted.get("fitted_on", {}).get("pictures") == annotations_digest(annotations)


def _check(correct: np.ndarray) -> None:
    """Refuse predictions from which nothing can be learnt."""
    if np.all(correct) or not np.any(correct):
        raise ValueError(
            f"{int(np.sum(correct))} of {len(correct)} predictions are correct; the rule is some, not all."
        )


def _log_odds(scores: np.ndarray) -> np.ndarray:
    """Return log(s / (1 - s)), finite."""
    scores = np.clip(np.asarray(scores, dtype=np.float64), _EDGE, 1 - _EDGE)
    return np.log(scores) - np.log1p(-scores)
