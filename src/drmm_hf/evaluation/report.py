"""From detections to files: each analysis that `drmm evaluate` knows, and its json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch

from drmm_hf.data.canonical import canonical_stream
from drmm_hf.data.coco import annotation_problems, coco_paths, left_out, load_detection_dataset
from drmm_hf.data.labels import LabelMap
from drmm_hf.data.loading import load_image
from drmm_hf.data.problems import KINDS

from .breakdown import breakdown as measure_breakdown
from .calibration import calibration_report
from .coco_metrics import ground_truth, load_annotations
from .coverage import coverage_report
from .deduplication import sweep
from .detections import Detections
from .evaluate import check_images
from .files import write_json
from .likelihood import likelihoods, summarize
from .recalibration import apply_calibrators, fit_calibrators
from .thresholds import confusion_matrix, threshold_curves


if TYPE_CHECKING:
    from PIL.Image import Image


def load_split(
    source: str,
    split: str = "val",
    *,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    needs_pictures: bool = True,
    streaming: bool = False,
) -> tuple[datasets.Dataset | datasets.IterableDataset | None, Mapping[str, Any]]:
    """Load one split and its untouched annotations.

    A box without area is an error in training data; here it counts in the annotations, as in COCO. Boxes written as
    corners are an error here too: every figure would be of other objects than those in the pictures.

    Args:
        source (`str`): What `drmm_hf.data.coco.load_detection_dataset` takes, or a COCO json file.
        split (`str`): Name of the split.
        images (`str` or `Path`, *optional*): Image folder, where it is not a usual place.
        annotations (`str` or `Path`, *optional*): COCO file, where it is not a usual place.
        needs_pictures (`bool`): Whether a json file needs its pictures, too.
        streaming (`bool`): Whether to read the pictures as they are needed, from the Hub too.

    Returns:
        `tuple[Dataset or IterableDataset, Mapping]`: The pictures, in the canonical schema, and the content of the
        COCO file; built from the pictures where there is none. No pictures for a json file without `images` that needs
        none.

    Raises:
        ValueError: If the split is unknown, the source is not understood, its boxes are [left, top, right, bottom], or
            a local stream lacks annotated pictures.
        FileNotFoundError: If a file is missing.
    """
    if annotations is None and source.endswith(".json"):
        if not needs_pictures and images is None:
            _refuse_corners(annotation_problems(source))
            return None, load_annotations(source)
        annotations, source = source, str(Path(source).parent)
    places: dict[str, Any] = {"images": images, "annotations": annotations}
    paths = coco_paths(source, split, **places)
    is_local = paths is not None or Path(source).exists()
    dataset = load_detection_dataset(source, split, **places, invalid="skip", streaming=streaming and not is_local)
    _refuse_corners(left_out(dataset))
    content = ground_truth(dataset) if paths is None else load_annotations(paths[0])
    if streaming and is_local:
        check_images(content, dataset)  # while its rows can be counted
        dataset = canonical_stream(dataset)
    return dataset, content


def _refuse_corners(found: Mapping[str, Mapping[str, Any]]) -> None:
    if "corners" in found:
        rule = KINDS["corners"][1]
        raise ValueError(f"{found['corners']['first'][0]}; {rule}. Nothing can be measured against such boxes.")


def load_results(path: str | Path, annotations: Mapping[str, Any]) -> tuple[Detections, dict[int, int]]:
    """Read COCO results and tell which picture each belongs to.

    Args:
        path (`str` or `Path`): Json file of any detector.
        annotations (`Mapping`): The COCO annotations. A picture without a result is one in which nothing was found.

    Returns:
        `tuple[Detections, dict[int, int]]`: The detections, and the category id of each of their labels.

    Raises:
        ValueError: If the file holds something else, or a category that the annotations do not have.
    """
    label_map = LabelMap.from_categories(annotations["categories"])
    detections = Detections.load(path, label_map, [record["id"] for record in annotations["images"]])
    return detections, dict(enumerate(label_map.category_ids))


def analyse(
    entries: Sequence[Mapping[str, Any]],
    annotations: Mapping[str, Any],
    output_dir: str | Path,
    top_k: int = 100,
    *,
    thresholds: bool = False,
    calibration: bool = False,
    calibrators: Mapping[str, Any] | None = None,
    duplicates: bool = False,
    breakdown: bool = False,
    coverage: bool = False,
    freedom: float = 1.0,
    saved: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Do what was asked with detections, one analysis after the other, and write the json of each.

    Args:
        entries (`Sequence[Mapping]`): COCO results, the content of `detections.json`.
        annotations (`Mapping`): The COCO annotations.
        output_dir (`str` or `Path`): Where to write.
        top_k (`int`): Number of predictions a picture.
        thresholds (`bool`): Whether to compute `threshold_curves`, with the confusion matrix at the best threshold.
        calibration (`bool`): Whether to compute the `calibration_report`, and fit `calibrators.json`.
        calibrators (`Mapping`, *optional*): Content of `calibrators.json`, to test instead, in `calibrated` of that
            report.
        duplicates (`bool`): Whether to `sweep` over NMS and winner-take-all.
        breakdown (`bool`): Whether to measure by size, aspect ratio and crowding, and count the kinds of errors.
        coverage (`bool`): Whether to measure how often intervals from box scales hold the annotated sides; with the
            factor of `calibrators`, too, where they are given.
        freedom (`float`): Degrees of freedom of the density of the box scales: 1 is Cauchy, infinity Gaussian.
        saved (`Mapping`, *optional*): The calibration that the processor has applied already: nothing is fitted on
            top, and `calibration` and `coverage` say in `saved_scores` and `saved_scale_factor` what they are of.

    Yields:
        `tuple[str, dict]`: Name and content: `thresholds`, `calibration`, `coverage`, `duplicates`, `breakdown`. Where
            no prediction is right, `calibration` says in `not_fitted` why there are no calibrators, and `coverage`
            holds `not_measured` alone.

    Raises:
        ValueError: If the calibrators were fitted on these pictures, or are something else.
    """
    output_dir = Path(output_dir)
    if thresholds:
        report = threshold_curves(annotations, entries, top_k)
        best = None if report["all"] is None else report["all"]["best_threshold"]
        report["confusion"] = confusion_matrix(annotations, entries, 0.5 if best is None else best, top_k)
        yield "thresholds", write_json(report, output_dir / "thresholds.json")
    if calibration or calibrators is not None:
        report = calibration_report(annotations, entries, top_k)
        report["saved_scores"] = ((saved or {}).get("scores") or {}).get("method")
        if calibrators is not None:
            report["calibrated"] = apply_calibrators(calibrators, annotations, entries, top_k)
        elif not saved:
            try:
                fitted = fit_calibrators(annotations, entries, top_k, freedom)
            except ValueError as error:  # nothing was found, or nothing right
                report["not_fitted"] = str(error)
            else:
                write_json(fitted, output_dir / "calibrators.json")
        yield "calibration", write_json(report, output_dir / "calibration.json")
    if coverage:
        factor = None if calibrators is None else calibrators.get("scale_factor")
        try:
            report = coverage_report(annotations, entries, freedom, top_k, factor)
            report["saved_scale_factor"] = (saved or {}).get("scale_factor")
        except ValueError as error:
            report = {"not_measured": str(error)}
        yield "coverage", write_json(report, output_dir / "coverage.json")
    if duplicates:
        label_map = LabelMap.from_categories(annotations["categories"])
        detections = Detections.from_coco(entries, label_map, [record["id"] for record in annotations["images"]])
        yield "duplicates", write_json(sweep(detections, annotations, top_k=top_k), output_dir / "duplicates.json")
    if breakdown:
        report = measure_breakdown(annotations, entries, top_k)
        yield "breakdown", write_json(report, output_dir / "breakdown.json")


def measure_likelihood(
    model: torch.nn.Module,
    processor: Any,
    dataset: datasets.Dataset,
    annotations: Mapping[str, Any],
    output_dir: str | Path,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Average the likelihoods of the annotations and write `likelihood.json`.

    Args:
        model (`torch.nn.Module`): A D-RMM model with mixture heads.
        processor (`Any`): Its image processor.
        dataset (`datasets.Dataset`): The pictures.
        annotations (`Mapping`): Their COCO annotations.
        output_dir (`str` or `Path`): Where to write.
        batch_size (`int`): Largest number of pictures in a batch.

    Returns:
        `dict`: From `drmm_hf.evaluation.likelihood.summarize`.
    """
    found = likelihoods(model, processor, dataset, annotations, batch_size=batch_size)
    return write_json(summarize(found, annotations), Path(output_dir) / "likelihood.json")


def examples(dataset: datasets.Dataset | datasets.IterableDataset, count: int = 4) -> list[tuple[int, str, Image]]:
    """Read a few pictures, spread over a dataset or at the beginning of a stream.

    Args:
        dataset (`Dataset` or `IterableDataset`): Pictures in the canonical schema.
        count (`int`): How many.

    Returns:
        `list[tuple[int, str, PIL.Image.Image]]`: Id, file name and picture of each.
    """
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    if isinstance(dataset, datasets.IterableDataset):
        rows = list(dataset.take(count))
    else:
        count = min(count, len(dataset))
        rows = [dataset[index * len(dataset) // count] for index in range(count)]
    return [(row["image_id"], row["file_name"], load_image(row)) for row in rows]


def read_picture(dataset: datasets.Dataset | datasets.IterableDataset, image_id: int) -> Image:
    """Read one picture.

    Args:
        dataset (`Dataset` or `IterableDataset`): Pictures in the canonical schema.
        image_id (`int`): Its id.

    Returns:
        `PIL.Image.Image`: The picture.
    """
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    if isinstance(dataset, datasets.IterableDataset):
        return load_image(next(row for row in dataset if row["image_id"] == image_id))
    return load_image(dataset[list(dataset["image_id"]).index(image_id)])
