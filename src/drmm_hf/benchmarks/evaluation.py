"""Seconds that the evaluation of detections takes, each step by itself, on made-up detections of COCO's size."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..data.labels import LabelMap
from ..evaluation.breakdown import breakdown
from ..evaluation.calibration import calibration_report
from ..evaluation.coco_metrics import coco_metrics
from ..evaluation.deduplication import sweep
from ..evaluation.detections import Detections
from ..evaluation.thresholds import confusion_matrix, threshold_curves


def benchmark_evaluation(num_images: int = 5000, num_classes: int = 80, seed: int = 0) -> dict[str, Any]:
    """Time each step, from the file of detections to the last analysis, in this process.

    Half of the 100 detections a picture are jittered objects, so that there is something to match.

    Args:
        num_images (`int`): Number of pictures.
        num_classes (`int`): Number of classes.
        seed (`int`): Of the detections.

    Returns:
        `dict`: `num_images`, `num_objects`, `num_detections`, `backend` of AP and its version, `file_megabytes`;
        `steps`, name to `core_seconds` and `seconds` (wall clock); `megabytes`, what the process held at most, and
        `megabytes_before` the first step.

    Raises:
        ValueError: If a number is below 1.
    """
    for name, value in (("num_images", num_images), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"{name} is {value}; the rule is at least 1.")
    annotations, detections = made_up_detections(num_images, num_classes, seed)
    label_map = LabelMap.from_categories(annotations["categories"])
    backend = "hotcoco" if find_spec("hotcoco") else "pycocotools"
    steps: dict[str, dict[str, float]] = {}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        core, wall = time.process_time(), time.perf_counter()
        result = step()
        steps[name] = {"core_seconds": time.process_time() - core, "seconds": time.perf_counter() - wall}
        return result

    before = _megabytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detections.json"
        timed("save", lambda: detections.save(path, label_map))
        entries = timed("load", lambda: json.loads(path.read_text()))
        size = path.stat().st_size / 1e6
    timed("AP", lambda: coco_metrics(annotations, entries))
    timed("thresholds", lambda: threshold_curves(annotations, entries))
    timed("confusion", lambda: confusion_matrix(annotations, entries, 0.5))
    timed("calibration", lambda: calibration_report(annotations, entries))
    timed("breakdown and errors", lambda: breakdown(annotations, entries))
    timed("sweep", lambda: sweep(detections, annotations, progress=False))
    return {
        "num_images": num_images,
        "num_objects": len(annotations["annotations"]),
        "num_detections": len(entries),
        "backend": f"{backend} {version(backend)}",
        "file_megabytes": size,
        "steps": steps,
        "megabytes_before": before,
        "megabytes": _megabytes(),
    }


def made_up_detections(num_images: int, num_classes: int, seed: int = 0) -> tuple[dict[str, Any], Detections]:
    """Make annotations and detections without pictures.

    Args:
        num_images (`int`): Number of pictures.
        num_classes (`int`): Number of classes.
        seed (`int`): Of the random numbers.

    Returns:
        `tuple[dict, Detections]`: Seven objects a picture on average, one in a hundred a crowd; 100 detections each,
        with all fields that D-RMM gives.
    """
    rng = np.random.default_rng(seed)
    annotations, detections = [], Detections()
    for image_id in range(num_images):
        count = int(rng.poisson(7))
        boxes = np.concatenate([rng.uniform(0, 400, (count, 2)), rng.lognormal(4, 0.8, (count, 2)).clip(4, 300)], 1)
        classes = rng.integers(num_classes, size=count)
        for box, label in zip(boxes.tolist(), classes.tolist(), strict=True):
            record = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, "bbox": box}
            crowd = int(rng.random() < 0.01)
            annotations.append(record | {"area": box[2] * box[3], "iscrowd": crowd})
        found = np.concatenate([rng.uniform(0, 400, (100, 2)), rng.lognormal(4, 0.8, (100, 2)).clip(4, 300)], 1)
        labels = rng.integers(num_classes, size=100)
        if count:
            source = rng.integers(count, size=50)
            found[:50], labels[:50] = boxes[source] * (1 + rng.normal(0, 0.1, (50, 4))), classes[source]
        found[:, 2:] = found[:, :2] + found[:, 2:].clip(2)
        scores = rng.beta(0.3, 2, 100)
        result = {"boxes": found, "scores": scores, "labels": labels, "query_indices": np.arange(100)}
        result |= {"objectness": np.sqrt(scores), "class_probabilities": np.sqrt(scores)}
        detections.add(image_id, result | {"box_scales": rng.random((100, 4))})
    images = [{"id": index, "file_name": f"{index}.jpg", "width": 640, "height": 480} for index in range(num_images)]
    categories = [{"id": label + 1, "name": f"class {label}"} for label in range(num_classes)]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def _megabytes() -> float:
    """Return the most memory that this process has held."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if sys.platform == "darwin" else 1e3)
