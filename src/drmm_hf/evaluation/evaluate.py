"""One call from a detector and a dataset to its figures: average precision and calibration, written to files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import torch

from drmm_hf.data.canonical import left_out
from drmm_hf.data.labels import LabelMap
from drmm_hf.data.problems import causes

from .calibration import expected_calibration_error, match_predictions
from .coco_metrics import coco_metrics, first_few, ground_truth, load_annotations
from .deduplication import deduplicate
from .detections import Detections
from .output_folder import write_figures
from .parts import predict_parts, remove_parts


if TYPE_CHECKING:
    from accelerate import PartialState


def evaluate(
    model: torch.nn.Module,
    processor: Any,
    dataset: datasets.Dataset | datasets.IterableDataset,
    annotations: str | Path | Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    *,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    top_k: int = 100,
    nms: float | None = None,
    wta: float | None = None,
    processes: PartialState | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Measure a detector: run it over every annotated picture and compare with the untouched annotations.

    Detections are written to `output_dir/parts` as they are found. A call that was killed goes on from there when it
    is repeated; they are removed in the end.

    Args:
        model (`torch.nn.Module`): Any transformers object detector.
        processor (`Any`): Its image processor.
        dataset (`Dataset` or `IterableDataset`): Pictures in the canonical schema of `drmm_hf.data.coco`. A stream is
            read as it goes.
        annotations (`str`, `Path` or `Mapping`, *optional*): The COCO json file of the dataset, or what it holds. By
            default built from the dataset, which of a stream takes a pass of its own.
        output_dir (`str` or `Path`, *optional*): Folder to write `metrics.json` and `detections.json` to.
        batch_size (`int`): Largest number of pictures in a batch; changes no figure.
        device (`str` or `torch.device`, *optional*): Where to run. By default where the model is.
        top_k (`int`): Number of predictions a picture, over all classes, for AP and for the calibration error.
        nms (`float`, *optional*): As in `measure`.
        wta (`float`, *optional*): As in `measure`.
        processes (`accelerate.PartialState`, *optional*): Processes that share the pictures, as
            `drmm_hf.evaluation.parts.launched_processes` returns them. All call this function, with one `output_dir`.
        about (`Mapping`, *optional*): As in `measure`.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `dict`: What `measure` returns. None in all but the main process, which alone measures.

    Raises:
        ValueError: If dataset and annotations do not hold the same pictures, if the model's classes cannot be told
            from its config (see `category_of_label`), or if `nms` or `wta` is not what `measure` takes.
    """
    _check_deduplication(nms, wta)  # before the work
    annotations = ground_truth(dataset) if annotations is None else load_annotations(annotations)
    mapping = category_of_label(model.config, annotations["categories"])
    if isinstance(dataset, datasets.Dataset):
        check_images(annotations, dataset)
    folder = None if output_dir is None else Path(output_dir) / "parts"
    detections = predict_parts(
        model,
        processor,
        dataset,
        annotations["images"],
        folder,
        batch_size=batch_size,
        device=device,
        top_k=top_k,
        processes=processes,
        progress=progress,
    )
    if detections is None:
        return None
    options: dict[str, Any] = {
        "top_k": top_k,
        "nms": nms,
        "wta": wta,
        "calibration": getattr(processor, "calibration", None),
    }
    options["about"] = about
    metrics = measure(detections, annotations, mapping, output_dir, **options)
    if folder is not None:
        remove_parts(folder)
    return metrics


def measure(
    detections: Detections,
    annotations: str | Path | Mapping[str, Any],
    mapping: Mapping[int, int],
    output_dir: str | Path | None = None,
    *,
    top_k: int = 100,
    nms: float | None = None,
    wta: float | None = None,
    calibration: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compute the figures of detections that are already there, such as those merged from several processes.

    Args:
        detections (`Detections`): A result for each annotated picture, with the labels of the model.
        annotations (`str`, `Path` or `Mapping`): The COCO json file, or what it holds.
        mapping (`Mapping[int, int]`): Category id of each label, from `category_of_label`. Detections with another
            label are left out and counted.
        output_dir (`str` or `Path`, *optional*): Folder to write `metrics.json` and `detections.json` to.
        top_k (`int`): Number of predictions a picture, over all classes.
        nms (`float`, *optional*): IoU of a non-maximum suppression among these predictions, see
            `drmm_hf.evaluation.deduplication.nms`. None, as D-RMM is meant to be used, applies none.
        wta (`float`, *optional*): Likewise of `drmm_hf.evaluation.deduplication.winner_take_all`, instead of `nms`.
        calibration (`Mapping`, *optional*): What the processor has corrected scores and scales with, to be written.
        about (`Mapping`, *optional*): What the figures are of, from `drmm_hf.evaluation.origin.origin`, to be written
            to `evaluation.json`; without it, tables and figures leave them out.

    Returns:
        `dict`: COCO's twelve figures and `AP_per_class` (fractions), `ECE` and `ECE_0.1`, `reliability` (edges,
        confidence, accuracy and count of the bins), and the counts `num_images`, `num_ground_truths`, `num_crowds`,
        `num_detections`, `num_boxes_without_size` and `num_other_labels` (both left out). `deduplication` is None or
        says what was applied: `method` ("nms" or "wta"), `iou_threshold`, `num_removed` and `num_capped` (sums of
        confidences stopped at 1); `calibration` is the argument. What is not defined, such as `APs` without small
        objects, is None.

    Raises:
        ValueError: If detections and annotations do not hold the same pictures, if both `nms` and `wta` are given, or
            if one lies outside [0, 1].

    Source: NMS and WTA are Sec. 4.3's. The paper does not say whether they come before or after the choice of the top
        100; here they come after, so that they need nothing but the saved predictions. Table 3 agrees: with them AR
        falls a little (65.1 to 65.0), though it would profit if other predictions moved up.
    """
    metrics, entries = figures(detections, annotations, mapping, top_k=top_k, nms=nms, wta=wta)
    metrics["calibration"] = calibration
    if output_dir is not None:
        write_figures(metrics, entries, output_dir, about)
    return metrics


def figures(
    detections: Detections,
    annotations: str | Path | Mapping[str, Any],
    mapping: Mapping[int, int],
    *,
    top_k: int = 100,
    nms: float | None = None,
    wta: float | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute what `measure` writes.

    Args:
        detections (`Detections`): As in `measure`.
        annotations (`str`, `Path` or `Mapping`): As in `measure`.
        mapping (`Mapping[int, int]`): As in `measure`.
        top_k (`int`): As in `measure`.
        nms (`float`, *optional*): As in `measure`.
        wta (`float`, *optional*): As in `measure`.

    Returns:
        `tuple[dict, list[dict]]`: The figures, and the COCO results that they are of.

    Raises:
        ValueError: As `measure`.
    """
    _check_deduplication(nms, wta)
    annotations = load_annotations(annotations)
    check_images(annotations, list(detections))
    label_map = LabelMap.from_categories(annotations["categories"])
    detections = detections.top_k(top_k)
    known = detections.relabel({label: label_map.label(category_id) for label, category_id in mapping.items()})
    num_other_labels, deduplication = detections.num_boxes - known.num_boxes, None
    methods: tuple[tuple[Literal["nms", "wta"], float | None], ...] = (("nms", nms), ("wta", wta))
    for method, iou_threshold in methods:
        if iou_threshold is not None:
            num_before = known.num_boxes
            known, num_capped = deduplicate(known, method, iou_threshold)
            counts = {"num_removed": num_before - known.num_boxes, "num_capped": num_capped}
            deduplication = {"method": method, "iou_threshold": iou_threshold} | counts
    entries = known.to_coco(label_map)
    scores, correct = match_predictions(annotations, entries, top_k=top_k)
    reliability = expected_calibration_error(scores, correct)
    crowds = sum(bool(record.get("iscrowd")) for record in annotations["annotations"])

    metrics = coco_metrics(annotations, entries)
    metrics["ECE"] = reliability.to_dict()["ece"]
    metrics["ECE_0.1"] = expected_calibration_error(scores, correct, min_score=0.1).to_dict()["ece"]
    metrics["reliability"] = reliability.to_dict()
    metrics |= {
        "num_images": len(detections),
        "num_ground_truths": len(annotations["annotations"]) - crowds,
        "num_crowds": crowds,
        "num_detections": len(entries),
        "num_boxes_without_size": known.num_boxes_without_size,
        "num_other_labels": num_other_labels,
        "deduplication": deduplication,
        "calibration": None,
    }
    return metrics, entries


def category_of_label(config: Any, categories: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Find the category of the dataset that each class of a model stands for.

    A config with `category_ids` says it itself: the ids must be those of the dataset, under the same names. Otherwise
    the names of `id2label` are looked up among the categories, whatever their case. If these are only transformers'
    placeholders `LABEL_0`, `LABEL_1`, ..., labels are taken for category ids. Classes that the dataset does not have
    (such as the unused `N/A` of many COCO models) stand for none.

    Args:
        config (`PreTrainedConfig`): Config of the model.
        categories (`Sequence[Mapping]`): Records of the dataset with `id` and `name`.

    Returns:
        `dict[int, int]`: Category id of each label.

    Raises:
        ValueError: If the classes disagree: another number, other ids, other names, or a category that no class of the
            model stands for.
    """
    names = {int(label): name for label, name in config.id2label.items()}
    known = {record["id"]: record["name"] for record in categories}
    category_ids = getattr(config, "category_ids", None)
    if category_ids is None:
        if all(re.fullmatch(r"LABEL_\d+", name) for name in names.values()):
            mapping = {label: label for label in names if label in known}
        else:
            by_name = {_plain(name): category_id for category_id, name in known.items()}
            mapping = {label: by_name[_plain(name)] for label, name in names.items() if _plain(name) in by_name}
        lacking = [name for category_id, name in known.items() if category_id not in mapping.values()]
        if lacking:
            raise ValueError(
                f"the model has no class for {len(lacking)} of the {len(known)} categories of the dataset "
                f"({first_few(lacking)}); its {len(names)} classes are {first_few(names.values())}. Set "
                "config.category_ids, or name the classes in config.id2label as the dataset does."
            )
        return mapping

    if len(category_ids) != len(names):
        raise ValueError(
            f"config.category_ids has {len(category_ids)} entries for {len(names)} classes; the rule is one each."
        )
    mapping = {label: category_ids[label] for label in names}
    if set(category_ids) != set(known):
        raise ValueError(
            f"the model was made for {len(category_ids)} categories with the ids {first_few(category_ids)}; "
            f"the dataset has {len(known)} with the ids {first_few(known)}."
        )
    for label, category_id in mapping.items():
        if _plain(names[label]) != _plain(known[category_id]):
            raise ValueError(
                f"category {category_id} is {names[label]!r} in the model and {known[category_id]!r} in the dataset; "
                "the rule is one name."
            )
    return mapping


def saved_thresholds(processor: Any, mapping: Mapping[int, int]) -> dict[int, float] | None:
    """Return the score thresholds that a processor has saved, by the categories of a dataset.

    Args:
        processor (`Any`): Image processor of a model.
        mapping (`Mapping[int, int]`): From `category_of_label`.

    Returns:
        `dict[int, float]` or None: Threshold of each category id; None if none was saved.
    """
    saved = getattr(processor, "score_threshold", None)
    if saved is None:
        return None
    return {category_id: saved[label] if isinstance(saved, list) else saved for label, category_id in mapping.items()}


def class_table(
    config: Any, categories: Sequence[Mapping[str, Any]], mapping: Mapping[int, int], most: int = 100
) -> str:
    """Say in a table which class of a model stands for which category of a dataset.

    Args:
        config (`PreTrainedConfig`): Config of the model.
        categories (`Sequence[Mapping]`): Records of the dataset with `id` and `name`.
        mapping (`Mapping[int, int]`): From `category_of_label`.
        most (`int`): Number of classes that get a line.

    Returns:
        `str`: A line a class, then how many classes of the model stand for none.
    """
    names = {int(label): name for label, name in config.id2label.items()}
    known = {record["id"]: record["name"] for record in categories}
    width = max(len("class"), *(len(names[label]) for label in mapping))
    lines = [f"{'label':>5}  {'class':<{width}}  {'category id':>11}  category"]
    for label, category_id in list(mapping.items())[:most]:
        lines.append(f"{label:>5}  {names[label]:<{width}}  {category_id:>11}  {known[category_id]}")
    if len(mapping) > most:
        lines.append(f"and {len(mapping) - most} more")
    others = len(names) - len(mapping)
    if others:
        lines.append(f"{others} classes of the model are not in the data; detections of them are left out")
    return "\n".join(lines)


def check_images(annotations: Mapping[str, Any], pictures: datasets.Dataset | Sequence[int]) -> None:
    """Check that the annotated pictures are those that a detector sees.

    Args:
        annotations (`Mapping`): Content of a COCO file.
        pictures (`Dataset` or `Sequence[int]`): The pictures in the canonical schema, or their ids alone.

    Raises:
        ValueError: If one side has pictures that the other lacks, or if the annotations have none. Of a dataset, the
            message says what its loader has left out, and why.
    """
    image_ids = {*(pictures["image_id"] if isinstance(pictures, datasets.Dataset) else pictures)}
    annotated = {record["id"]: record.get("file_name", record["id"]) for record in annotations["images"]}
    if not annotated:
        raise ValueError("the annotations have no images; there is nothing to measure.")
    missing = [name for image_id, name in annotated.items() if image_id not in image_ids]
    if missing:
        reasons = causes(left_out(pictures)) if isinstance(pictures, datasets.Dataset) else []
        raise ValueError(
            f"{len(missing)} of {len(annotated)} annotated pictures are not in the dataset ({first_few(missing)}); "
            "each counts in AP, so all must be there. To measure on fewer, give annotations of those alone."
            + (f" Left out: {'; '.join(reasons)}." if reasons else "")
        )
    unknown = sorted(image_ids - set(annotated))
    if unknown:
        raise ValueError(f"{len(unknown)} pictures have no entry in the annotations: image_id {first_few(unknown)}.")


def _check_deduplication(nms: float | None, wta: float | None) -> None:
    """Refuse both at once, and what is no IoU."""
    if nms is not None and wta is not None:
        raise ValueError(f"nms is {nms} and wta is {wta}; the rule is at most one of them.")
    for name, value in (("nms", nms), ("wta", wta)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; the rule is an IoU in [0, 1].")


def _plain(name: str) -> str:
    """Return a class name without case, underscores and hyphens."""
    return " ".join(str(name).lower().replace("_", " ").replace("-", " ").split())
