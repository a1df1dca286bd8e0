"""COCO's average precision and recall against untouched annotations, by pycocotools or its faster double hotcoco."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from drmm_hf.data.canonical import Records, area_and_crowd, categories, finite_box, integer

from .files import read_json


if TYPE_CHECKING:
    import datasets
    from pycocotools.cocoeval import COCOeval

logger = logging.getLogger(__name__)

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def ground_truth(dataset: datasets.Dataset) -> dict[str, Any]:
    """Build the annotations of a dataset that has no annotation file.

    Args:
        dataset (`datasets.Dataset`): A dataset in the canonical schema of `drmm_hf.data.coco`.

    Returns:
        `dict`: `images`, `annotations` (crowds, areas and category ids as the dataset has them) and `categories`, as
        in a COCO json file.
    """
    columns = ["image_id", "file_name", "width", "height", "objects"]
    rows = list(dataset.select_columns(columns))
    images = [
        {"id": row["image_id"], "file_name": row["file_name"], "width": row["width"], "height": row["height"]}
        for row in rows
    ]
    annotations = [{**record, "image_id": row["image_id"]} for row in rows for record in row["objects"]]
    return {"images": images, "annotations": annotations, "categories": categories(dataset)}


def load_annotations(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return annotations in COCO's form, those of pictures and categories that it lists: COCO's figures see no others.

    Args:
        source (`str`, `Path` or `Mapping`): A COCO json file, or what it holds. Of a file, what is left out is counted
            in a warning.

    Returns:
        `Mapping`: With `images`, `annotations` and `categories`; the argument itself if nothing is left out.

    Raises:
        ValueError: If one of the three is missing; or if a file has an id, a box, an area or a crowd flag that is no
            number, named with its place. What training data need beyond that does not matter here.
    """
    content = source if isinstance(source, Mapping) else read_json(source)
    missing = {"images", "annotations", "categories"} - set(content if isinstance(content, Mapping) else ())
    if missing:
        name = "annotations" if isinstance(source, Mapping) else str(source)
        raise ValueError(f"{name} has no {', '.join(sorted(missing))}; a COCO file has all three.")
    if not isinstance(source, Mapping):
        _check_records(content, source)
    images, known = ({record["id"] for record in content[name]} for name in ("images", "categories"))
    records = content["annotations"]
    kept = [record for record in records if record["image_id"] in images and record["category_id"] in known]
    if len(kept) == len(records):
        return content
    if not isinstance(source, Mapping):
        lost = f"{len(records) - len(kept)} of {len(records)} annotations"
        logger.warning("%s: %s are of pictures or categories that it does not list, and left out", source, lost)
    return {**content, "annotations": kept}


def _check_records(content: Mapping[str, Any], source: str | Path) -> None:
    """Refuse records of a file that no figure can be computed with."""
    records = Records(str(source), *(content[name] for name in ("images", "annotations", "categories")))
    sections = {"images": ["id"], "categories": ["id"], "annotations": ["image_id", "category_id"]}
    for section, fields in sections.items():
        if not isinstance(content[section], list):
            raise ValueError(f"{source} has no list {section!r}; a COCO file has images, annotations and categories.")
        for position, record in enumerate(content[section]):
            try:
                for field in fields:
                    integer(record, field)
                if section == "annotations":
                    finite_box(record)
                    area_and_crowd(record)
            except ValueError as error:
                raise ValueError(f"{records.where(section, position)}: {error}") from None


class Columns(NamedTuple):
    """Hold records of COCO, annotations or results, as arrays: n of them.

    Attributes:
        image_ids (`np.ndarray` of shape `(n,)`): Their pictures.
        category_ids (`np.ndarray` of shape `(n,)`): Their categories.
        boxes (`np.ndarray` of shape `(n, 4)`): xywh, pixels.
        scores (`np.ndarray` of shape `(n,)`): Confidences; 1 for annotations.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


def columns(records: Sequence[Mapping[str, Any]] | Columns) -> Columns:
    """Return records of COCO as arrays.

    Args:
        records (`Sequence[Mapping]` or `Columns`): Annotations or results; columns are returned as they are.

    Returns:
        `Columns`: In the same order.
    """
    if isinstance(records, Columns):
        return records
    return Columns(
        np.array([record["image_id"] for record in records], dtype=np.int64),
        np.array([record["category_id"] for record in records], dtype=np.int64),
        np.array([record["bbox"] for record in records], dtype=np.float64).reshape(-1, 4),
        np.array([record.get("score", 1.0) for record in records], dtype=np.float64),
    )


def coco_evaluation(source: str | Path | Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> COCOeval:
    """Prepare pycocotools' evaluation of boxes, without a word on stdout and without changing its arguments.

    Annotations are numbered anew from 1, since pycocotools takes a match with annotation 0 for no match. A missing
    `area` is the area of the box and a missing `iscrowd` is 0. An empty list of detections is allowed.

    Args:
        source (`str`, `Path` or `Mapping`): Annotations, see `load_annotations`.
        detections (`Sequence[Mapping]`): COCO results with `image_id`, `category_id`, `bbox` (xywh pixels), `score`.

    Returns:
        `COCOeval`: Not yet run. The detection at position `i` has the id `i + 1`.

    Raises:
        ValueError: If a detection belongs to a picture or a category that the annotations do not have.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content = load_annotations(source)
    check_known(content, detections)
    annotations = _annotation_records(content)
    results = [
        {
            **{key: entry[key] for key in ("image_id", "category_id", "bbox", "score")},
            "id": index,
            "area": entry["bbox"][2] * entry["bbox"][3],
            "iscrowd": 0,
        }
        for index, entry in enumerate(detections, start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        indices = []
        for records in (annotations, results):
            index = COCO()
            index.dataset = {
                "images": list(content["images"]),
                "annotations": records,
                "categories": list(content["categories"]),
            }
            index.createIndex()
            indices.append(index)
        return COCOeval(*indices, iouType="bbox")


def run_quietly(evaluation: COCOeval, description: str) -> None:
    """Run pycocotools' matching with a progress bar in place of its own lines.

    Args:
        evaluation (`COCOeval`): From `coco_evaluation`; `evaluation.evalImgs` is filled.
        description (`str`): What the bar says. It shows after two seconds only.
    """
    match = evaluation.evaluateImg
    params = evaluation.params
    total = len(set(params.imgIds)) * len(set(params.catIds)) * len(params.areaRng)
    bar = tqdm(total=total, desc=description, delay=2, disable=None, leave=False)  # None: only on a terminal
    with bar, contextlib.redirect_stdout(io.StringIO()):

        def match_and_count(*arguments: Any) -> Any:
            bar.update()
            return match(*arguments)

        evaluation.evaluateImg = match_and_count
        evaluation.evaluate()
    evaluation.evaluateImg = match


def coco_metrics(
    annotation_source: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    backend: Literal["pycocotools", "hotcoco"] | None = None,
) -> dict[str, Any]:
    """Compute COCO's twelve figures and the AP of each class.

    Args:
        annotation_source (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds; `ground_truth`
            makes it from a dataset without a file.
        detections_coco (`Sequence[Mapping]`): COCO results.
        backend (`str`, *optional*): "pycocotools", or "hotcoco", which computes the same figures some fifty times
            faster. By default hotcoco where it is installed.

    Returns:
        `dict`: `AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl` and `AP_per_class` (name to AP), all as
        fractions. A figure that no ground truth takes part in, such as `APs` without small objects, is None.

    Raises:
        ValueError: If a detection belongs to a picture or a category that the annotations do not have.
    """
    content = load_annotations(annotation_source)
    if backend is None:
        backend = "hotcoco" if find_spec("hotcoco") else "pycocotools"
    if backend == "hotcoco" and detections_coco:  # it refuses an empty list
        found = run_hotcoco(content, detections_coco).eval
        precision, recall = found["precision"], found["recall"]
    else:
        evaluation = coco_evaluation(content, detections_coco)
        run_quietly(evaluation, "computing AP")
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.accumulate()
        precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]

    # (IoU thresholds, recalls, classes, areas, maximal detections) and the same without recalls
    parts = {
        "AP": precision[..., 0, 2],
        "AP50": precision[0, ..., 0, 2],
        "AP75": precision[5, ..., 0, 2],
        "APs": precision[..., 1, 2],
        "APm": precision[..., 2, 2],
        "APl": precision[..., 3, 2],
        "AR1": recall[..., 0, 0],
        "AR10": recall[..., 0, 1],
        "AR100": recall[..., 0, 2],
        "ARs": recall[..., 1, 2],
        "ARm": recall[..., 2, 2],
        "ARl": recall[..., 3, 2],
    }
    metrics: dict[str, Any] = {name: mean_of_defined(parts[name]) for name in METRIC_NAMES}
    names = {record["id"]: record["name"] for record in content["categories"]}
    metrics["AP_per_class"] = {
        names[category_id]: mean_of_defined(precision[:, :, index, 0, 2])
        for index, category_id in enumerate(sorted(names))
    }
    return metrics


def mean_of_defined(values: np.ndarray) -> float | None:
    """Average figures of pycocotools, whose -1 means that no ground truth takes part.

    Args:
        values (`np.ndarray`): Precisions or recalls.

    Returns:
        `float`, *optional*: The mean; None if all are -1.
    """
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def annotation_area(record: Mapping[str, Any]) -> float:
    """Return the area by which COCO sorts an annotation into small, medium and large.

    Args:
        record (`Mapping`): An annotation with `bbox` and, possibly, `area`.

    Returns:
        `float`: `area`, that of the mask in COCO's files, in square pixels; the area of the box if it names none.
    """
    area = record.get("area")
    return float(np.prod(record["bbox"][2:])) if area is None else area


def first_few(values: Iterable[Any], count: int = 5) -> str:
    """Name the first few of many values, for a message.

    Args:
        values (`Iterable`): What to name.
        count (`int`): How many of them.

    Returns:
        `str`: The names, and an ellipsis if there are more.
    """
    values = list(values)
    return ", ".join(map(str, values[:count])) + (", ..." if len(values) > count else "")


def check_known(content: Mapping[str, Any], detections: Sequence[Mapping[str, Any]] | Columns) -> None:
    """Refuse detections in pictures or of categories that the annotations do not have.

    Args:
        content (`Mapping`): What a COCO json file holds.
        detections (`Sequence[Mapping]` or `Columns`): COCO results.

    Raises:
        ValueError: If there is one; the message names some.
    """
    given = {"image_id": content["images"], "category_id": content["categories"]}
    for index, (key, known) in enumerate(given.items()):
        if isinstance(detections, Columns):
            found = np.unique(detections[index]).tolist()
        else:
            found = [entry[key] for entry in detections]
        unknown = {*found} - {record["id"] for record in known}
        if unknown:
            raise ValueError(
                f"detections have {key} {first_few(sorted(unknown))}, which the annotations do not have: "
                f"they hold {len(known)} of them, such as {first_few(record['id'] for record in known)}."
            )


def _annotation_records(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return annotations with all that the evaluation reads, numbered from 1."""
    return [
        {**record, "id": index, "area": annotation_area(record), "iscrowd": int(record.get("iscrowd") or 0)}
        for index, record in enumerate(content["annotations"], start=1)
    ]


def run_hotcoco(content: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> Any:
    """Let hotcoco match and accumulate.

    Args:
        content (`Mapping`): What a COCO json file holds.
        detections (`Sequence[Mapping]`): COCO results, at least one.

    Returns:
        `hotcoco.COCOeval`: Its `eval` is that of pycocotools. Ids of pictures are their ranks among all ids.
    """
    from hotcoco import COCO, COCOeval

    check_known(content, detections)
    fields = ("id", "category_id", "bbox", "area", "iscrowd")
    # Ids of pictures go through float64, which has no room for large ones. Their order breaks ties between scores.
    places = {image_id: place for place, image_id in enumerate(sorted(record["id"] for record in content["images"]))}
    truth = {
        "images": [{"id": place, "width": 0, "height": 0, "file_name": ""} for place in places.values()],
        "annotations": [
            {"image_id": places[record["image_id"]]} | {name: record[name] for name in fields}
            for record in _annotation_records(content)
        ],
        "categories": [{"id": record["id"], "name": record["name"]} for record in content["categories"]],
    }
    found = columns(detections)
    image_ids = [places[image_id] for image_id in found.image_ids.tolist()]
    rows = np.column_stack([image_ids, found.boxes, found.scores, found.category_ids])
    reference = COCO(truth)
    evaluation = COCOeval(reference, reference.load_res(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation
