"""COCO's greedy matching, done once for all figures that ask which predictions are correct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .coco_metrics import Columns, check_known, columns, load_annotations


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
        matched_annotations (`np.ndarray` of shape `(T, n)`): Position of what it took among the annotations that
            `load_annotations` returns; -1 if none.
        matched_category_ids (`np.ndarray` of shape `(T, n)`): Category of the ground truth that it took; -1 if none.
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
    matched_annotations: np.ndarray
    matched_category_ids: np.ndarray
    best_ious: np.ndarray
    num_ground_truths: dict[int, int]
    pictures: np.ndarray

    @property
    def duplicates(self) -> np.ndarray:
        """Which predictions are wrong only because a more confident one took their object: `(T, n)`."""
        return ~self.correct & ~self.ignored & (self.best_ious >= self.iou_thresholds[:, None])


def match(
    ground_truth: str | Path | Mapping[str, Any],
    detections_coco: Sequence[Mapping[str, Any]] | Columns,
    iou_thresholds: Sequence[float] = (0.5,),
    top_k: int = 100,
    class_aware: bool = True,
    set_aside: np.ndarray | None = None,
) -> Matches:
    """Decide for each prediction whether it is correct.

    The `top_k` most confident predictions of a picture, over all its classes, are matched class by class as COCO does:
    by falling score, each takes the free ground truth of its class with the largest IoU of at least the threshold. A
    prediction that takes one is correct; one that finds it taken is a duplicate, hence wrong. A prediction that falls
    on a crowd region is neither. Sizes of objects play no part.

    Args:
        ground_truth (`str`, `Path` or `Mapping`): The untouched COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]` or `Columns`): COCO results.
        iou_thresholds (`Sequence[float]`): Smallest IoU of a correct prediction, in (0, 1].
        top_k (`int`): Number of predictions a picture.
        class_aware (`bool`): Whether a prediction has to name the class, too.
        set_aside (`np.ndarray` of shape `(m,)`, *optional*): Which annotations are neither to be found nor to be
            missed, as those outside an area range of COCO: predictions that find no other object there are ignored.

    Returns:
        `Matches`: The predictions among the first `top_k`.
    """
    content, thresholds = load_annotations(ground_truth), np.asarray(iou_thresholds, dtype=float)
    predictions, objects = columns(detections_coco), columns(content["annotations"])
    check_known(content, predictions)
    places = {record["id"]: place for place, record in enumerate(content["images"])}
    pictures = np.array(list(places), dtype=int)
    crowds = np.array([bool(record.get("iscrowd")) for record in content["annotations"]], dtype=bool)
    aside = crowds if set_aside is None else crowds | set_aside

    known, of_prediction = np.unique(predictions.image_ids, return_inverse=True)
    pictures_of = np.array([places[one] for one in known.tolist()], dtype=int)[of_prediction]
    order = np.lexsort((-predictions.scores, pictures_of))  # stable
    ranks = np.arange(len(order)) - np.searchsorted(pictures_of[order], pictures_of[order])
    indices = np.sort(order[ranks < top_k])
    predictions = Columns(*(column[indices] for column in predictions))

    # Only predictions that share a group, a picture or a class in a picture, with objects can be right.
    annotated = np.array([places[one] for one in objects.image_ids.tolist()], dtype=int)
    groups_of, groups = pictures_of[indices], annotated
    if class_aware:
        category_ids = np.unique([record["id"] for record in content["categories"]])
        groups_of, groups = (
            group * len(category_ids) + np.searchsorted(category_ids, ids)
            for group, ids in ((groups_of, predictions.category_ids), (groups, objects.category_ids))
        )
    matched, ignored, ious, best_ious = _match_groups(
        predictions, groups_of, objects, groups, crowds, aside, thresholds
    )
    counts = {record["id"]: 0 for record in content["categories"]}
    for category_id, number in zip(*np.unique(objects.category_ids[~aside], return_counts=True), strict=True):
        counts[int(category_id)] += int(number)
    return Matches(
        iou_thresholds=thresholds,
        indices=indices,
        scores=predictions.scores,
        image_ids=predictions.image_ids,
        category_ids=predictions.category_ids,
        correct=matched >= 0,
        ignored=ignored,
        ious=ious,
        matched_annotations=matched,
        matched_category_ids=np.append(objects.category_ids, -1)[matched],
        best_ious=best_ious,
        num_ground_truths=counts,
        pictures=pictures,
    )


# How many numbers an intermediate result may have: groups are taken in batches of about this size.
_MOST = 2_000_000


def _match_groups(
    predictions: Columns,
    groups_of: np.ndarray,
    objects: Columns,
    groups: np.ndarray,
    crowds: np.ndarray,
    aside: np.ndarray,
    thresholds: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Match inside groups, all groups at once: first the most confident prediction of each, then the second, ...

    Returns the position of the object that each prediction took (-1: none), whether it fell on a crowd and the IoU
    with what it took, each `(T, n)`, and the largest IoU with any object that is not set aside, `(n,)`.
    """
    shape = (len(thresholds), len(predictions.scores))
    matched, ignored, ious, best = np.full(shape, -1), np.zeros(shape, bool), np.zeros(shape), np.zeros(shape[1])
    least = np.minimum(thresholds, 1 - 1e-10)[:, None, None]  # as in COCO

    rows = np.lexsort((-predictions.scores, groups_of))  # predictions, group by group, each by falling score
    columns = np.argsort(groups, kind="stable")
    names, starts, sizes = np.unique(groups_of[rows], return_index=True, return_counts=True)
    first, last = (np.searchsorted(groups[columns], names, side=side) for side in ("left", "right"))
    widths = last - first
    todo = np.flatnonzero(widths)
    todo = todo[np.lexsort((-sizes[todo], np.ceil(np.log2(widths[todo]))))]  # alike in width, the longest first
    while len(todo):
        width = 2 ** int(np.ceil(np.log2(widths[todo[0]])))
        alike = int(np.searchsorted(np.ceil(np.log2(widths[todo])), np.log2(width), side="right"))
        batch, todo = np.split(todo, [min(alike, max(1, _MOST // (len(thresholds) * width)))])
        places = first[batch, None] + np.arange(width)
        there = places < last[batch, None]
        places = columns[np.minimum(places, len(columns) - 1)]
        boxes, crowd, other = objects.boxes[places], crowds[places] & there, aside[places] & there
        free = np.repeat(there[None], len(thresholds), axis=0)
        for rank in range(sizes[batch[0]]):
            count = int(np.searchsorted(-sizes[batch], -rank, side="left"))  # groups with so many predictions
            row = rows[starts[batch[:count]] + rank]
            overlap = _overlaps(predictions.boxes[row][:, None], boxes[:count], crowd[:count])
            best[row] = np.where(there[:count] & ~other[:count], overlap, 0).max(axis=1)
            within = free[:, :count] & (overlap >= least)
            column, value = _largest(np.where(within & ~other[:count], overlap, -1.0))
            right = value >= 0
            matched[:, row] = np.where(right, places[np.arange(count), column], -1)
            ious[:, row] = np.where(right, value, 0)
            second, value = _largest(np.where(within & other[:count], overlap, -1.0))
            ignored[:, row] = ~right & (value >= 0)
            column = np.where(right, column, second)
            taken = (right | ignored[:, row]) & ~crowd[np.arange(count), column]  # a crowd holds any number
            threshold, group = np.nonzero(taken)
            free[threshold, group, column[threshold, group]] = False
    return matched, ignored, ious, best


def _largest(overlaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return place and value of the largest number of each row; of equal ones COCO takes the last."""
    places = overlaps.shape[-1] - 1 - overlaps[..., ::-1].argmax(axis=-1)
    return places, np.take_along_axis(overlaps, places[..., None], axis=-1)[..., 0]


def _overlaps(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Return pycocotools' IoU of xywh boxes: of a crowd, the share of the box that lies in it."""
    near = np.maximum(boxes[..., :2], others[..., :2])
    far = np.minimum(boxes[..., :2] + boxes[..., 2:], others[..., :2] + others[..., 2:])
    common = (far - near).clip(0).prod(axis=-1)
    area, other = boxes[..., 2:].prod(axis=-1), others[..., 2:].prod(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(common / np.where(crowd, area, area + other - common), posinf=0.0)
