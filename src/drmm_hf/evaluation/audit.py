"""Errors in annotations: those that a model's density finds unlikely, and predictions that no annotation explains.

A detector with a density can say of any box and class how well it agrees with what the picture shows, also where none
of its own predictions is. `audit` ranks annotations by it. `confidence_audit` ranks them by confidences alone, as one
can with any detector; `score_audit` measures either against errors that were planted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou, nms

from .coco_metrics import coco_metrics, load_annotations
from .likelihood import Evidence
from .matches import match
from .planted_errors import KINDS


# Smallest IoU of two boxes that show the same object, and of an annotation and the component that answers for it.
SAME_OBJECT, SAME_PLACE = 0.5, 0.1
# Score from which a prediction is called confident, and AP below which the model hardly knows a class.
CONFIDENT, KNOWN = 0.5, 0.2


def audit(
    annotations: str | Path | Mapping[str, Any],
    evidence: Evidence,
    detections_coco: Sequence[Mapping[str, Any]],
    top_k: int = 100,
) -> dict[str, Any]:
    """Rank annotations by how little a model finds them plausible, and what it sees but nobody annotated.

    Crowd annotations are left out; predictions on them are, too. A prediction misses an annotation if none of its
    class overlaps it by an IoU of 0.5; of several that overlap one another by as much, the most confident stands. Left
    out are those that answer for an annotation already: their component is the most responsible one of an annotation
    that they overlap by an IoU of 0.1, so they are that annotation's suggestion.

    Args:
        annotations (`str`, `Path` or `Mapping`): The COCO json file, or what it holds.
        evidence (`Evidence`): From `drmm_hf.evaluation.likelihood.gather_evidence`, on these annotations.
        detections_coco (`Sequence[Mapping]`): COCO results of the same model, with `query`.
        top_k (`int`): Number of predictions a picture.

    Returns:
        `dict`: `annotations`, the least plausible first: `annotation_id`, `image_id`, `file_name`, `category_id`,
        `bbox` (xywh, pixels) as annotated, `plausibility` in [0, 1], `nll`, `reason` ("box", "class" or "nothing
        there") and `suggestion`, what the most responsible component would have put there (`category_id`, `bbox`,
        `score`, and `iou` with the annotation); None where it overlaps the annotation by less than an IoU of 0.1, for
        then it shows something else: the reason is "nothing there". `missing`, COCO results by falling score, with
        `file_name`. `classes`, from `class_strengths`. `num_images` and `num_crowds`.
    """
    annotations = load_annotations(annotations)
    files = {record["id"]: record.get("file_name", f"image {record['id']}") for record in annotations["images"]}
    records = [annotations["annotations"][index] for index in evidence.annotation_indices.tolist()]
    category_ids = evidence.category_ids.tolist()
    boxes = box_convert(torch.from_numpy(evidence.boxes), "xyxy", "xywh").tolist()
    entries, taken = [], set()
    for row, record in enumerate(records):
        iou = _iou([record["bbox"]], [boxes[row]]).item()
        suggestion: dict[str, Any] | None = None
        if iou >= SAME_PLACE:
            suggestion = {"category_id": category_ids[row], "bbox": [round(value, 2) for value in boxes[row]]}
            suggestion |= {"score": float(evidence.scores[row]), "iou": iou}
            taken.add((record["image_id"], int(evidence.queries[row])))
        entries.append(
            {
                **_identity(record),
                "file_name": files[record["image_id"]],
                "plausibility": float(np.exp(evidence.log_plausibility[row])),
                "nll": float(evidence.nll[row]),
                "reason": "nothing there" if suggestion is None else _reason(evidence, row),
                "suggestion": suggestion,
            }
        )
    order = np.argsort(evidence.log_plausibility, kind="stable").tolist()
    missing = unexplained(annotations, detections_coco, top_k)
    return {
        "num_images": len(annotations["images"]),
        "num_crowds": sum(bool(record.get("iscrowd")) for record in annotations["annotations"]),
        "classes": class_strengths(annotations, detections_coco),
        "annotations": [entries[index] for index in order],
        "missing": [
            {**entry, "file_name": files[entry["image_id"]]}
            for entry in missing
            if (entry["image_id"], entry["query"]) not in taken
        ],
    }


def class_strengths(
    annotations: Mapping[str, Any], detections_coco: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Measure how well a model knows each class: of one that it does not know, its suspicions are worth nothing.

    Args:
        annotations (`Mapping`): Content of a COCO file.
        detections_coco (`Sequence[Mapping]`): COCO results without a score threshold.

    Returns:
        `list[dict]`: For each class that is annotated, the lowest AP first: `category_id`, `name`, `annotations`
        (their number, without crowds), `AP` on these very annotations (a fraction), `confident` (predictions with a
        score of at least 0.5) and `known`, whether AP is at least 0.2.
    """
    annotated = Counter(record["category_id"] for record in annotations["annotations"] if not record.get("iscrowd"))
    confident = Counter(entry["category_id"] for entry in detections_coco if entry["score"] >= CONFIDENT)
    known = coco_metrics(annotations, detections_coco)["AP_per_class"]
    strengths = []
    for record in annotations["categories"]:
        identity, ap = record["id"], known[record["name"]]
        if ap is not None:
            strengths.append(
                {
                    "category_id": identity,
                    "name": record["name"],
                    "annotations": annotated[identity],
                    "AP": ap,
                    "confident": confident[identity],
                    "known": ap >= KNOWN,
                }
            )
    return sorted(strengths, key=lambda entry: entry["AP"])


def confidence_audit(
    annotations: str | Path | Mapping[str, Any], detections_coco: Sequence[Mapping[str, Any]], top_k: int = 100
) -> dict[str, Any]:
    """Rank annotations by confidences alone: what one can do with any detector.

    Args:
        annotations (`str`, `Path` or `Mapping`): The COCO json file, or what it holds.
        detections_coco (`Sequence[Mapping]`): COCO results without a score threshold.
        top_k (`int`): Number of predictions a picture.

    Returns:
        `dict`: `annotations` and `missing` as in `audit`. The `plausibility` of an annotation is the highest
        confidence among the predictions of its class that overlap it by an IoU of at least 0.5, 0 if there is none.
    """
    annotations = load_annotations(annotations)
    groups = defaultdict(list)
    for entry in _top(detections_coco, top_k):
        groups[entry["image_id"], entry["category_id"]].append(entry)
    entries = []
    for record in annotations["annotations"]:
        if record.get("iscrowd"):
            continue
        mine = groups[record["image_id"], record["category_id"]]
        ious = _iou([record["bbox"]], [entry["bbox"] for entry in mine])[0]
        scores = [entry["score"] for entry, iou in zip(mine, ious.tolist(), strict=True) if iou >= SAME_OBJECT]
        entries.append({**_identity(record), "plausibility": max(scores, default=0.0)})
    entries.sort(key=lambda entry: entry["plausibility"])
    return {"annotations": entries, "missing": unexplained(annotations, detections_coco, top_k)}


def unexplained(
    annotations: Mapping[str, Any], detections_coco: Sequence[Mapping[str, Any]], top_k: int = 100
) -> list[Mapping[str, Any]]:
    """List the predictions that no annotation of their class explains.

    Args:
        annotations (`Mapping`): Content of a COCO file.
        detections_coco (`Sequence[Mapping]`): COCO results.
        top_k (`int`): Number of predictions a picture.

    Returns:
        `list[Mapping]`: Those below an IoU of 0.5 with every annotation of their class and not on a crowd, by falling
        score; of those that overlap one another by as much, whatever their class, the first.
    """
    matches = match(annotations, detections_coco, [SAME_OBJECT], top_k)
    alone = ~matches.correct[0] & ~matches.ignored[0] & (matches.best_ious < SAME_OBJECT)
    groups = defaultdict(list)
    for index in matches.indices[alone].tolist():
        groups[detections_coco[index]["image_id"]].append(detections_coco[index])
    kept = []
    for mine in groups.values():
        boxes = box_convert(torch.tensor([entry["bbox"] for entry in mine], dtype=torch.float64), "xywh", "xyxy")
        scores = torch.tensor([entry["score"] for entry in mine], dtype=torch.float64)
        kept += [mine[index] for index in nms(boxes, scores, SAME_OBJECT).tolist()]
    return sorted(kept, key=lambda entry: -entry["score"])


def score_audit(result: Mapping[str, Any], planted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Measure how well an audit finds planted errors.

    An annotation that was moved or relabelled is found when its own entry comes up; for each of these two kinds, the
    errors of the other are left out. A removed one is found by the first missing prediction of its class with an IoU
    of at least 0.5. Predictions that show it again, or show an annotation as it was before it was moved or relabelled,
    are neither right nor wrong. Real errors of the annotations count as wrong alarms: the figures are lower bounds.

    Args:
        result (`Mapping`): From `audit` or `confidence_audit` of the spoilt annotations.
        planted (`Sequence[Mapping]`): From `drmm_hf.evaluation.planted_errors.plant_errors`.

    Returns:
        `dict`: For `annotations` (moved and relabelled ones together), `moved`, `relabelled` and `removed`: `num`, the
        number of errors; `average_precision`, the area under the staircase of precision over recall; `found_at_num`,
        recall among the first `num` entries of the list; `precision` and `recall` after each entry, entries of equal
        score together. None where there are no errors of a kind.
    """
    kinds = {entry["annotation_id"]: entry["kind"] for entry in planted}
    ranked = result["annotations"]
    suspicion = -np.array([entry["plausibility"] for entry in ranked])
    found = np.array([kinds.get(entry["annotation_id"], "") for entry in ranked], dtype=object)
    counts = {kind: sum(entry["kind"] == kind for entry in planted) for kind in KINDS}
    in_place = [kind for kind in KINDS if kind != "removed"]
    scored = {"annotations": _precision_recall(suspicion, found != "", sum(counts[kind] for kind in in_place))}
    for kind in in_place:
        counted = (found == kind) | (found == "")
        scored[kind] = _precision_recall(suspicion[counted], found[counted] == kind, counts[kind])

    groups = defaultdict(list)
    for entry in planted:
        groups[entry["image_id"], entry["category_id"]].append(entry)
    seen, scores, correct = set(), [], []
    for candidate in result["missing"]:
        errors = groups[candidate["image_id"], candidate["category_id"]]
        ious = _iou([candidate["bbox"]], [entry["bbox"] for entry in errors])[0]
        shown = [entry for entry, iou in zip(errors, ious.tolist(), strict=True) if iou >= SAME_OBJECT]
        new = [e["annotation_id"] for e in shown if e["kind"] == "removed" and e["annotation_id"] not in seen]
        if shown and not new:
            continue
        seen |= set(new[:1])
        scores.append(candidate["score"])
        correct.append(bool(new))
    removed = _precision_recall(np.array(scores), np.array(correct, dtype=bool), counts["removed"])
    return scored | {"removed": removed}


def _precision_recall(scores: np.ndarray, correct: np.ndarray, num: int) -> dict[str, Any] | None:
    """Return precision and recall after each distinct score, and their area."""
    if not num:
        return None
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(correct[order])
    last = np.append(scores[1:] != scores[:-1], True)[: len(scores)]
    precision, recall = (hits / np.arange(1, len(hits) + 1))[last], hits[last] / num
    return {
        "num": num,
        "average_precision": float((precision * np.diff(recall, prepend=0.0)).sum()),
        "found_at_num": float(hits[:num][-1] / num) if len(hits) else 0.0,
        "precision": precision.tolist(),
        "recall": recall.tolist(),
    }


def _reason(evidence: Evidence, row: int) -> str:
    """Say which part of the evidence speaks most against an annotation that the responsible component overlaps."""
    if evidence.log_class[row] <= min(evidence.log_box[row], evidence.log_object[row]):
        return "class"
    return "box" if evidence.log_box[row] <= evidence.log_object[row] else "nothing there"


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what names an annotation in its file."""
    return {"annotation_id": record["id"], **{key: record[key] for key in ("image_id", "category_id", "bbox")}}


def _top(detections_coco: Sequence[Mapping[str, Any]], top_k: int) -> list[Mapping[str, Any]]:
    """Return the most confident predictions of each picture."""
    groups = defaultdict(list)
    for entry in sorted(detections_coco, key=lambda entry: -entry["score"]):
        groups[entry["image_id"]].append(entry)
    return [entry for mine in groups.values() for entry in mine[:top_k]]


def _iou(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> torch.Tensor:
    """Return the IoU of each xywh box with each other, 0 for two without area: `(n, m)`."""
    boxes = [torch.tensor(part, dtype=torch.float64).reshape(-1, 4) for part in (first, second)]
    return box_iou(*(box_convert(part, "xywh", "xyxy") for part in boxes)).nan_to_num()
