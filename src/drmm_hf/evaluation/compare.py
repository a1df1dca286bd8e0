"""Detectors side by side: their figures, how fast each is beside the first, and in which pictures they differ most."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm import tqdm

from drmm_hf.data.labels import LabelMap
from drmm_hf.data.loading import load_image

from .coco_metrics import load_annotations
from .detections import Detections
from .evaluate import category_of_label, evaluate, measure
from .files import read_json, write_json
from .likelihood import has_density, likelihoods
from .matches import match
from .predict import predict
from .thresholds import threshold_curves


_FIGURES = ("AP", "AP50", "ECE", "ECE_0.1")


def compare(
    detectors: Mapping[str, tuple[Any, Any] | Detections],
    dataset: datasets.Dataset,
    annotations: str | Path | Mapping[str, Any],
    output_dir: str | Path,
    *,
    batch_size: int = 1,
    top_k: int = 100,
    num_timed: int = 24,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure several detectors on the same pictures.

    Args:
        detectors (`Mapping`): By name: a model and its image processor, or the detections of a detector, labelled in
            the order of the categories of the annotations. These are neither run nor timed.
        dataset (`datasets.Dataset`): Pictures in the canonical schema of `drmm_hf.data.coco`.
        annotations (`str`, `Path` or `Mapping`): Their COCO json file, or what it holds.
        output_dir (`str` or `Path`): Folder to write `compare.json` to, and `metrics.json` and `detections.json` of
            each detector into a folder named after it, see `folder_name`.
        batch_size (`int`): Largest number of pictures in a batch; changes no figure.
        top_k (`int`): Number of predictions a picture.
        num_timed (`int`): Pictures to time the models on.
        progress (`bool`): Whether to show progress bars.

    Returns:
        `dict`: `models`, by name `AP AP50 ECE ECE_0.1` (see `measure`), `NLL` (of the last stage, in pixels of the
        original picture; None without a density), `parameters`, `dtype` (of the weights), `seconds` a picture
        (median), `speed` (how many times as fast as the first that was timed, median over pictures) and
        `speed_quartiles`; None for what was not run; `threshold`, the score of the best F1 over all classes,
        `input_size` and `folder`. `pictures`, those where the detectors differ most first: `image_id`, `file_name`,
        and `errors`, by name what `picture_errors` finds at the detector's own threshold.

    Raises:
        ValueError: What `evaluate` and `measure` raise; before the work if a model has other classes.
    """
    annotations, output_dir = load_annotations(annotations), Path(output_dir)
    for name, detector in detectors.items():
        if not isinstance(detector, Detections):
            try:
                category_of_label(detector[0].config, annotations["categories"])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    mapping = dict(enumerate(LabelMap.from_categories(annotations["categories"]).category_ids))
    models: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for number, (name, detector) in enumerate(detectors.items(), start=1):
        folder, nll, parameters, size, dtype = output_dir / folder_name(number, name), None, None, None, None
        if isinstance(detector, Detections):
            metrics: Any = measure(detector, annotations, mapping, folder, top_k=top_k)
        else:
            options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
            metrics = evaluate(*detector, dataset, annotations, folder, top_k=top_k, **options)
            parameters = sum(parameter.numel() for parameter in detector[0].parameters())
            size, dtype = input_size(detector[1]), str(next(detector[0].parameters()).dtype).removeprefix("torch.")
            if has_density(detector[0].config):
                found = likelihoods(*detector, dataset, annotations, **options)
                nll = float((found.nll[-1] - found.log_scales).mean())
        entries = read_json(folder / "detections.json")
        curves = threshold_curves(annotations, entries, top_k)["all"]
        threshold = 1.0 if curves is None or curves["best_threshold"] is None else curves["best_threshold"]
        errors[name] = picture_errors(annotations, entries, threshold, top_k)
        models[name] = {figure: metrics[figure] for figure in _FIGURES}
        models[name] |= {"NLL": nll, "threshold": threshold, "parameters": parameters, "input_size": size}
        models[name]["dtype"] = dtype
        models[name]["folder"] = folder.name
        models[name] |= dict.fromkeys(("seconds", "speed", "speed_quartiles"))

    timed = {name: detector for name, detector in detectors.items() if not isinstance(detector, Detections)}
    if timed and num_timed:
        rows = dataset.select(range(min(num_timed, len(dataset))))
        seconds = interleaved_seconds(list(timed.values()), rows, progress)
        for name, column in zip(timed, seconds.T, strict=True):
            ratios = seconds[:, 0] / column
            quartiles = np.quantile(ratios, [0.25, 0.75]).tolist()
            models[name] |= {"seconds": float(np.median(column)), "speed": float(np.median(ratios))}
            models[name] |= {"speed_quartiles": quartiles}
    names = {record["id"]: record.get("file_name", str(record["id"])) for record in annotations["images"]}
    pictures = [
        {"image_id": one, "file_name": names[one], "errors": {name: part[one] for name, part in errors.items()}}
        for one in largest_differences(list(errors.values()))
    ]
    return write_json({"models": models, "pictures": pictures}, output_dir / "compare.json")


def folder_name(number: int, name: str) -> str:
    """Return the name of a detector's folder: its place in the order, then its name as far as file systems take it.

    Args:
        number (`int`): Its place, from 1.
        name (`str`): Such as "runs/mine/best".

    Returns:
        `str`: Such as "1_runs_mine_best"; the end of a long name.
    """
    plain = re.sub(r"[^\w.-]+", "_", name).strip("._")
    return f"{number}_{plain[-60:]}"


def input_size(processor: Any) -> dict[str, int] | None:
    """Return the size to which an image processor brings pictures.

    Args:
        processor (`Any`): With a `size`, as transformers' have it.

    Returns:
        `dict` or None: Pixels of `shortest_edge` and `longest_edge`, or `height` and `width`; None if it says neither.
    """
    size = dict(getattr(processor, "size", None) or {})
    return {name: value for name, value in size.items() if value is not None} or None


def picture_errors(
    annotations: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    threshold: float,
    top_k: int = 100,
    iou_threshold: float = 0.5,
) -> dict[int, dict[str, float]]:
    """Compute the localisation recall precision error (LRP) of each picture at a score threshold.

    LRP is (sum over the correct of (1 - IoU) / (1 - tau) + wrong + missed) / (correct + wrong + missed), tau the IoU
    threshold: 0 for a picture where all is right to the pixel, 1 where nothing is.

    Args:
        annotations (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results.
        threshold (`float`): Smallest score of a prediction that counts.
        top_k (`int`): Number of predictions a picture.
        iou_threshold (`float`): Smallest IoU of a correct prediction, below 1.

    Returns:
        `dict[int, dict]`: By image id `lrp`, `correct`, `wrong` and `missed`. Crowds and predictions on them do not
        count; of a picture without objects and predictions the error is 0.

    Source: Oksuz et al., Localization Recall Precision (2018), there over the pictures of a class.
    """
    annotations = load_annotations(annotations)
    objects = Counter(record["image_id"] for record in annotations["annotations"] if not record.get("iscrowd"))
    matches = match(annotations, detections_coco, [iou_threshold], top_k)
    counted = (matches.scores >= threshold) & ~matches.ignored[0]
    groups: dict[int, list[int]] = defaultdict(list)
    for index in np.flatnonzero(counted).tolist():
        groups[int(matches.image_ids[index])].append(index)
    errors = {}
    for record in annotations["images"]:
        mine = groups[record["id"]]
        right = matches.correct[0][mine]
        correct, wrong = int(right.sum()), int((~right).sum())
        missed = objects[record["id"]] - correct
        distance = ((1 - matches.ious[0][mine][right]) / (1 - iou_threshold)).sum()
        error = float((distance + wrong + missed) / max(correct + wrong + missed, 1))
        errors[record["id"]] = {"lrp": error, "correct": correct, "wrong": wrong, "missed": missed}
    return errors


def largest_differences(errors: Sequence[Mapping[int, Mapping[str, float]]]) -> list[int]:
    """Order pictures by how much better some detector does than another.

    Args:
        errors (`Sequence[Mapping]`): From `picture_errors`, one a detector, of the same pictures.

    Returns:
        `list[int]`: Image ids by falling range of `lrp` over the detectors; of equal ones the picture with more
        objects comes first. Pictures without any difference are left out.
    """
    ranges = {one: np.ptp([part[one]["lrp"] for part in errors]) for one in errors[0]}
    objects = {one: entry["correct"] + entry["missed"] for one, entry in errors[0].items()}
    return sorted((one for one in ranges if ranges[one] > 0), key=lambda one: (-ranges[one], -objects[one]))


def interleaved_seconds(
    detectors: Sequence[tuple[Any, Any]], rows: Iterable[Mapping[str, Any]], progress: bool = True
) -> np.ndarray:
    """Time detectors in turns, so that a busy machine slows all of them.

    Args:
        detectors (`Sequence[tuple]`): Models and their image processors.
        rows (`Iterable[Mapping]`): Pictures, as `drmm_hf.evaluation.predict.predict` takes them; all are decoded
            first, and the first of them is run once more before the clock starts.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `np.ndarray` of shape `(pictures, detectors)`: Seconds from the decoded picture to its boxes, one at a time.
    """
    if hasattr(rows, "cast_column"):
        rows = rows.cast_column("image", datasets.Image(decode=False))
    rows = [{"image_id": row["image_id"], "image": load_image(row)} for row in rows]
    for model, processor in detectors:
        predict(model, processor, rows[:1], progress=False)
    seconds = np.zeros((len(rows), len(detectors)))
    hidden = None if progress else True  # None: shown on a terminal
    for turn, row in enumerate(tqdm(rows, "timing", delay=2, disable=hidden, leave=False)):
        order = np.roll(np.arange(len(detectors)), turn)  # each is first as often
        for index in order.tolist():
            start = time.perf_counter()
            model, processor = detectors[index]
            predict(model, processor, [row], progress=False)
            seconds[turn, index] = time.perf_counter() - start
    return seconds
