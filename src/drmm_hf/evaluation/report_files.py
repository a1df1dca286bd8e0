"""Reports as they lie on the disk, read with the rules that they were written by: no text, NaN or hole passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import read_json


_FRACTIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "ECE", "ECE_0.1")
_COUNTS = ("num_images", "num_ground_truths", "num_crowds")
_BINS = ("bin_edges", "bin_confidence", "bin_accuracy", "bin_count")


def read_report(path: str | Path) -> dict[str, Any]:
    """Read a report of training or evaluation and check what tables, figures and cards take from it.

    Args:
        path (`str` or `Path`): `metrics.json`, `duplicates.json` or another of these names.

    Returns:
        `dict`: Its content; {} if there is no such file, or if it says that it could not be measured.

    Raises:
        ValueError: If it is no report of its name, or if a figure in it is missing, no number or out of its range.
    """
    path = Path(path)
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; the rule is an object.")
    if "not_measured" in content:
        return {}
    try:
        wrong = list(_RULES[path.stem](content)) if path.stem in _RULES else []
    except KeyError as error:
        wrong = [str(error.args[0])]
    except (AttributeError, IndexError, TypeError):
        wrong = ["its form"]
    if wrong:
        names = ", ".join(dict.fromkeys(wrong))
        raise ValueError(f"{path}: {names} missing or out of range; the rule is a file as drmm writes it.")
    return content


def _is_number(value: Any, least: float = 0, most: float = math.inf) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value) and least <= value <= most


def _is_fraction(value: Any) -> bool:
    return value is None or _is_number(value, 0, 1 + 1e-6)  # means of scores may be rounded up


def _reliability(content: Mapping[str, Any]) -> Iterator[str]:
    bins = content["reliability"]
    if {len(bins[name]) - (name == "bin_edges") for name in _BINS} != {len(bins["bin_count"])}:
        yield "reliability"
    if not all(map(_is_fraction, (*bins["bin_edges"], *bins["bin_confidence"], *bins["bin_accuracy"], bins["ece"]))):
        yield "reliability"


def _evaluation(content: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(content["split"], str):
        yield "split"
    for name in ("model", "data", "weights", "ground_truth", "annotations"):
        if not isinstance(content.get(name), str | None):
            yield name
    if not isinstance(content.get("input"), dict | None):
        yield "input"
    if not _is_number(content["top_k"], 1):
        yield "top_k"


def _metrics(content: Mapping[str, Any]) -> Iterator[str]:
    yield from (name for name in _FRACTIONS if name not in content or not _is_fraction(content[name]))
    yield from (name for name in _COUNTS if type(content.get(name)) is not int or content[name] < 0)
    if not all(map(_is_fraction, content["AP_per_class"].values())):
        yield "AP_per_class"
    yield from _reliability(content)


def _duplicates(content: Mapping[str, Any]) -> Iterator[str]:
    for entry in (content["none"], *content["nms"], *content["wta"]):
        yield from (name for name in ("AP", "AR100", "ECE", "ECE_0.1") if not _is_fraction(entry[name]))
        yield from _reliability(entry)
    for method in ("nms", "wta"):
        if content["best_iou_threshold"] not in [entry["iou_threshold"] for entry in content[method]]:
            yield "best_iou_threshold"


def _likelihood(content: Mapping[str, Any]) -> Iterator[str]:
    stages = content["all"]
    if len(stages["nll"]) != len(stages["share"]):
        yield "nll or share of a stage"
    yield from ("nll" for value in stages["nll"] if value is not None and not _is_number(value, -math.inf))
    yield from ("share" for value in stages["share"] if not _is_fraction(value))


def _calibration(content: Mapping[str, Any]) -> Iterator[str]:
    for kind in content["kinds"].values():
        yield from _reliability(kind)


def _cost(content: Mapping[str, Any]) -> Iterator[str]:
    names = ("pictures_per_second", "trainable_parameters", "training_memory", "layer_operations")
    yield from (name for name in names if content.get(name) is not None and not _is_number(content[name]))
    if content.get("pictures_per_second") is not None and not isinstance(content["device"], str):
        yield "device"


def _summary(content: Mapping[str, Any]) -> Iterator[str]:
    yield from (name for name in ("steps", "training_seconds") if not _is_number(content[name]))
    if content.get("num_training_images") is not None and not _is_number(content["num_training_images"]):
        yield "num_training_images"


def _assignments(content: Mapping[str, Any]) -> Iterator[str]:
    if not _is_number(content["num_copies"], 1):
        yield "num_copies"
    for image in content["images"]:
        if {"image_id", "ground_truths"} - image.keys() or {"predictions", "matched"} - image["stages"][-1].keys():
            yield "images"


_RULES: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "evaluation": _evaluation,
    "metrics": _metrics,
    "duplicates": _duplicates,
    "likelihood": _likelihood,
    "calibration": _calibration,
    "cost": _cost,
    "summary": _summary,
    "assignments": _assignments,
}
