"""COCO's greedy matching, done once for all figures that ask which predictions are correct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from .coco_metrics import check_known, coco_evaluation, load_annotations, run_quietly


COCO_IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * index, 2) for index in range(10))


@dataclass(frozen=True)
class Matches:
    """Hold what became of every prediction: n predictions, T IoU thresholds.

    Attributes:
        iou_thresholds (`np.ndarray` of shape `(T,)`): Smallest IoU of a correct prediction.
        indices (`np.ndarray` of shape `(n,)`): Position of each prediction in the list that was matched.
        scores (`np.ndarray` of shape `(n,)`): Their confidences.
        image_ids (`np.ndarray` of shape `(n,)`): Their pictures.
        category_ids (`np.ndarray` of shape `(n,)`): Their categories.
        correct (`np.ndarray` of shape `(T, n)`): Whether a prediction took a ground truth.
        ignored (`np.ndarray` of shape `(T, n)`): Whether it fell on a crowd region, and is neither right nor wrong.
        ious (`np.ndarray` of shape `(T, n)`): IoU with the ground truth that it took; 0 if none.
        matched_category_ids (`np.ndarray` of shape `(T, n)`): Category of the ground truth that it took; -1 if none.
        annotation_indices (`np.ndarray` of shape `(T, n)`): Its position among the annotations; -1 if none.
        best_ious (`np.ndarray` of shape `(n,)`): Largest IoU with any ground truth of its class, taken or not.
        num_ground_truths (`dict[int, int]`): Number of ground truths of each category, without crowds.
        pictures (`np.ndarray`): Ids of all pictures, those without predictions too.
    """

    iou_thresholds: np.ndarray
    indices: np.ndarray
    scores: np.ndarray
    image_ids: np.ndarray
    category_ids: np.ndarray
    correct: np.ndarray
    ignored: np.ndarray
    ious: np.ndarray
    matched_category_ids: np.ndarray
    annotation_indices: np.ndarray
    best_ious: np.ndarray
    num_ground_truths: dict[int, int]
    pictures: np.ndarray

    @property
    def duplicates(self) -> np.ndarray:
        """Which predictions are wrong only because a more confident one took their object: `(T, n)`."""
        return ~self.correct & ~self.ignored & (self.best_ious >= self.iou_thresholds[:, None])


def match(
    ground_truth: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]],
    iou_thresholds: Sequence[float] = (0.5,),
    top_k: int = 100,
    class_aware: bool = True,
) -> Matches:
    """Decide for each prediction whether it is correct.

    The `top_k` most confident predictions of a picture, over all its classes, are matched class by class as COCO does:
    by falling score, each takes the free ground truth of its class with the largest IoU of at least the threshold. A
    prediction that takes one is correct; one that finds it taken is a duplicate, hence wrong. A prediction that falls
    on a crowd region is neither. Sizes of objects play no part.

    Args:
        ground_truth (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results.
        iou_thresholds (`Sequence[float]`): Smallest IoU of a correct prediction, in (0, 1].
        top_k (`int`): Number of predictions a picture.
        class_aware (`bool`): Whether a prediction has to name the class, too.

    Returns:
        `Matches`: The predictions among the first `top_k`.
    """
    order = sorted(range(len(detections_coco)), key=lambda index: -detections_coco[index]["score"])
    taken: dict[Any, int] = {}
    positions = []
    for index in order:
        image_id = detections_coco[index]["image_id"]
        taken[image_id] = taken.get(image_id, 0) + 1
        if taken[image_id] <= top_k:
            positions.append(index)
    # Most predictions name a class that their picture does not have. They are wrong, and need no matching.
    content = load_annotations(ground_truth)
    place = itemgetter("image_id", "category_id") if class_aware else itemgetter("image_id")
    annotated = {place(record) for record in content["annotations"]}
    hopeful = [index for index in positions if place(detections_coco[index]) in annotated]
    hopeless = [index for index in positions if place(detections_coco[index]) not in annotated]
    check_known(content, [detections_coco[index] for index in hopeless])
    evaluation = coco_evaluation(content, [detections_coco[index] for index in hopeful])
    evaluation.params.iouThrs = np.asarray(iou_thresholds, dtype=float)
    evaluation.params.areaRng = [[0, float("inf")]]
    evaluation.params.areaRngLbl = ["all"]
    evaluation.params.maxDets = [top_k]
    evaluation.params.useCats = int(class_aware)
    run_quietly(evaluation, "matching predictions")

    objects, columns = evaluation.cocoGt.anns, [[] for _ in range(7)]
    for group in evaluation.evalImgs:
        if group is None or not group["dtIds"]:
            continue
        key = (group["image_id"], group["category_id"])
        category_ids = [key[1]] if class_aware else evaluation.params.catIds
        ids = [record["id"] for category_id in category_ids for record in evaluation._gts[key[0], category_id]]
        # One column more, of zeros, is the IoU with no ground truth at all.
        ious = np.zeros((len(group["dtIds"]), len(ids) + 1))
        if ids:
            ious[:, :-1] = evaluation.ious[key]
        matched = group["dtMatches"].astype(int)
        place = {annotation_id: column for column, annotation_id in enumerate(ids)}
        taken_column = np.array([[place.get(one, len(ids)) for one in row] for row in matched.tolist()])
        no_crowd = np.array([not objects[one]["iscrowd"] for one in ids] + [True])
        categories = np.array([objects[one]["category_id"] for one in ids] + [-1])
        ignored = group["dtIgnore"].astype(bool)
        correct = (matched > 0) & ~ignored
        parts = (
            np.array([hopeful[one - 1] for one in group["dtIds"]]),
            correct,
            ignored,
            np.where(correct, ious[np.arange(len(ious)), taken_column], 0.0),
            np.where(correct, categories[taken_column], -1),
            np.where(correct, matched - 1, -1),
            ious[:, no_crowd].max(axis=1),
        )
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
    num_thresholds = len(evaluation.params.iouThrs)
    wrong = np.zeros((num_thresholds, len(hopeless)))
    none = wrong - 1
    parts = (hopeless, wrong, wrong, wrong, none, none, np.zeros(len(hopeless)))
    for column, part in zip(columns, parts, strict=True):
        column.append(np.asarray(part))
    columns = [np.concatenate(column, axis=-1) for column in columns]
    indices, correct, ignored, ious, matched, annotation_indices, best_ious = columns
    indices = indices.astype(int)
    entries = [detections_coco[index] for index in indices.tolist()]
    counts = {record["id"]: 0 for record in evaluation.cocoGt.dataset["categories"]}
    for record in objects.values():
        counts[record["category_id"]] += not record["iscrowd"]
    return Matches(
        iou_thresholds=evaluation.params.iouThrs,
        indices=indices,
        scores=np.array([entry["score"] for entry in entries], dtype=float),
        image_ids=np.array([entry["image_id"] for entry in entries], dtype=int),
        category_ids=np.array([entry["category_id"] for entry in entries], dtype=int),
        correct=correct.astype(bool),
        ignored=ignored.astype(bool),
        ious=ious,
        matched_category_ids=matched.astype(int),
        annotation_indices=annotation_indices.astype(int),
        best_ious=best_ious,
        num_ground_truths=counts,
        pictures=np.array([record["id"] for record in evaluation.cocoGt.dataset["images"]], dtype=int),
    )
