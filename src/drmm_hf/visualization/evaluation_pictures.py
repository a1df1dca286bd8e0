"""What an evaluation looks like: its diagrams, and a few pictures with what was found in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from .coverage_plot import coverage_diagram
from .draw_boxes import draw_boxes, grid
from .plots import (
    breakdown_diagram,
    confidence_boxes,
    confusion_diagram,
    deduplication_curves,
    reliability_diagram,
    reliability_diagrams,
    threshold_diagram,
)


if TYPE_CHECKING:
    from PIL.Image import Image


def draw_detections(
    entries: Sequence[Mapping[str, Any]],
    annotations: Mapping[str, Any],
    pictures: Sequence[tuple[int, str, Image]],
    path: str | Path,
    thresholds: Mapping[int, float] | None = None,
) -> Path:
    """Draw pictures, annotations on the left and detections on the right.

    Args:
        entries (`Sequence[Mapping]`): COCO results.
        annotations (`Mapping`): The COCO annotations.
        pictures (`Sequence[tuple]`): Id, name and picture of each.
        path (`str` or `Path`): Picture to write; its folder is made.
        thresholds (`Mapping[int, float]`, *optional*): Score of each category id above which detections are drawn, as
            the model's processor has saved them; without, those of 0.3 and more.

    Returns:
        `Path`: The picture.
    """
    if thresholds is None:
        said = "detections scoring 0.3 and more"
        entries = [entry for entry in entries if entry["score"] >= 0.3]
    else:
        limits = sorted({f"{one:.3g}" for one in thresholds.values()}, key=float)
        said = f"detections scoring above the saved {' to '.join(dict.fromkeys((limits[0], limits[-1])))}"
        entries = [entry for entry in entries if entry["score"] > thresholds[entry["category_id"]]]
    names = {record["id"]: record["name"] for record in annotations["categories"]}
    labels = {category_id: label for label, category_id in enumerate(sorted(names))}
    id2label = {label: names[category_id] for category_id, label in labels.items()}
    images, captions = [], []
    for image_id, name, image in pictures:
        for records in (annotations["annotations"], entries):
            mine = [record for record in records if record["image_id"] == image_id]
            boxes = np.array([record["bbox"] for record in mine], dtype=float).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            result = {"boxes": boxes, "labels": [labels[record["category_id"]] for record in mine]}
            if records is entries:
                result["scores"] = [record["score"] for record in mine]
            images.append(draw_boxes(image, result, id2label, threshold=0))
        captions += [f"{name}: annotations", said]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(images, columns=2, captions=captions).save(path, quality=90)
    return path


def draw_report(
    name: str,
    report: Mapping[str, Any],
    output_dir: str | Path,
    picture: Callable[[int], Image] | None = None,
) -> list[str]:
    """Draw one part of an evaluation.

    Args:
        name (`str`): Of the part, a key of `PICTURES`; others have no picture.
        report (`Mapping`): Its figures, the content of `NAME.json`.
        output_dir (`str` or `Path`): Where to write.
        picture (`Callable`, *optional*): From an image id to the picture. None: none are drawn.

    Returns:
        `list[str]`: Names of the files; none without matplotlib.
    """
    from transformers.utils import is_matplotlib_available

    if name not in PICTURES or not is_matplotlib_available():
        return []
    return [path.name for path in PICTURES[name](report, Path(output_dir), picture)]


def _metrics(report: Mapping[str, Any], folder: Path, _: Any) -> list[Path]:
    corrected = ((report.get("calibration") or {}).get("scores") or {}).get("method")
    title = "Reliability" if corrected is None else "Reliability, calibrated"
    return [reliability_diagram(_bins(report), folder / "reliability.png", title)]


def _thresholds(report: Mapping[str, Any], folder: Path, _: Any) -> list[Path]:
    return [
        threshold_diagram(report, folder / "thresholds.png"),
        confusion_diagram(report["confusion"], folder / "confusion.png"),
    ]


def _coverage(report: Mapping[str, Any], folder: Path, _: Any) -> list[Path]:
    return [coverage_diagram(report, folder / "coverage.png")]


def _calibration(report: Mapping[str, Any], folder: Path, _: Any) -> list[Path]:
    kinds = {name.replace("_", " "): kind for name, kind in report["kinds"].items()}
    kinds = dict(sorted(kinds.items(), key=lambda item: item[0] == "confidence"))  # p, o and then p * o
    figures = {"calibration.png": kinds}
    if "calibrated" in report:
        names = {"none": "as predicted"}
        figures["calibrated.png"] = {names.get(name, name): entry for name, entry in report["calibrated"].items()}
    return [
        reliability_diagrams(
            {title: _bins(entry) for title, entry in panels.items()},
            folder / name,
            [_axis(kind, report.get("saved_scores")) for kind in panels] if name == "calibration.png" else None,
            [f"above 0.1: {_per_cent(entry['ECE_0.1'])} %" for entry in panels.values()],
        )
        for name, panels in figures.items()
    ]


def _axis(kind: str, saved_scores: str | None) -> str:
    """Name a confidence or one of its factors, and say which of them is the score."""
    if kind != "confidence":
        return f"{kind}, a factor of the score"
    return "confidence: the score" + (" (calibrated)" if saved_scores else "")


def _duplicates(report: Mapping[str, Any], folder: Path, picture: Callable[[int], Image] | None) -> list[Path]:
    best = report["best_iou_threshold"]
    panels = {"none": ("as predicted", report["none"])}
    for method in ("nms", "wta"):
        entry = next(entry for entry in report[method] if entry["iou_threshold"] == best)
        panels[method] = (f"{method.upper()} at IoU {best:g}", entry)
    results = {title: _bins(entry) for title, entry in panels.values()}
    notes = [f"AP {_per_cent(entry['AP'])} %" for _, entry in panels.values()]
    paths = [
        deduplication_curves(report, folder / "duplicates.png"),
        reliability_diagrams(results, folder / "duplicates_reliability.png", notes=notes),
    ]
    if picture is not None:
        example = report["example"]
        image = picture(example["image_id"])
        drawn = []
        for name, (title, _) in panels.items():
            boxes, scores = (np.array(example[name][field]) for field in ("boxes", "scores"))
            drawn.append((f"{title}, {(scores > 0.1).sum()} boxes above 0.1", image, boxes, scores))
        paths.append(confidence_boxes(drawn, folder / "duplicates_boxes.png"))
    return paths


def _breakdown(report: Mapping[str, Any], folder: Path, _: Any) -> list[Path]:
    return [breakdown_diagram(report, folder / "breakdown.png")]


def _bins(entry: Mapping[str, Any]) -> SimpleNamespace:
    """Return the bins of a calibration error, which json has as lists."""
    reliability = entry["reliability"]
    return SimpleNamespace(**reliability | {"ece": np.nan if reliability["ece"] is None else reliability["ece"]})


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


PICTURES = {
    "metrics": _metrics,
    "thresholds": _thresholds,
    "calibration": _calibration,
    "coverage": _coverage,
    "duplicates": _duplicates,
    "breakdown": _breakdown,
}
