"""Curves over the score threshold and the confusion matrix against plain counting."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drmm_hf.evaluation.matches import match
from drmm_hf.evaluation.thresholds import confusion_matrix, threshold_curves


def counts(entries, threshold):
    """Return how many of (score, right) pairs score at least the threshold, and how many of those are right."""
    kept = [right for score, right in entries if score >= threshold]
    return len(kept), sum(kept)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), decimals=st.sampled_from([1, 2, 6]))
def test_curves_are_counts_over_every_threshold(scene, seed, decimals):
    truth, detections = scene(seed)
    for entry in detections:
        entry["score"] = round(entry["score"], decimals)
    curves = threshold_curves(truth, detections)
    assert json.loads(json.dumps(curves, allow_nan=False)) == curves
    matches = match(truth, detections)
    rows = [
        (detections[index]["category_id"], detections[index]["score"], bool(right))
        for index, right, ignored in zip(matches.indices, matches.correct[0], matches.ignored[0], strict=True)
        if not ignored
    ]
    objects = [record["category_id"] for record in truth["annotations"] if not record["iscrowd"]]
    names = {record["id"]: record["name"] for record in truth["categories"]}
    assert set(curves["classes"]) == {names[category_id] for category_id in objects}
    groups = [(curves["classes"][names[one]], one) for one in set(objects)] + [(curves["all"], None)] * bool(objects)
    for found, category_id in groups:
        mine = [(score, right) for one, score, right in rows if category_id in (None, one)]
        total = len(objects) if category_id is None else objects.count(category_id)
        for place, threshold in enumerate(curves["thresholds"]):
            kept, right = counts(mine, threshold)
            assert found["recall"][place] == pytest.approx(right / total)
            assert found["precision"][place] == pytest.approx(right / kept if kept else 1.0)
            assert found["f1"][place] == pytest.approx(2 * right / (kept + total))
        scored = {}
        for threshold in {score for score, _ in mine}:
            kept, right = counts(mine, threshold)
            scored[threshold] = 2 * right / (kept + total)
        if scored:
            assert found["best_f1"] == pytest.approx(max(scored.values()))
            assert scored[found["best_threshold"]] == pytest.approx(found["best_f1"])
        else:
            assert found["best_threshold"] is None


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.0, 0.3, 0.8]))
def test_the_margins_of_the_confusion_matrix_are_objects_and_predictions(scene, seed, threshold):
    truth, detections = scene(seed)
    confusion = confusion_matrix(truth, detections, threshold)
    matrix = np.array(confusion["matrix"])
    ids = [record["id"] for record in truth["categories"]]
    objects = [record["category_id"] for record in truth["annotations"] if not record["iscrowd"]]
    assert matrix[:-1].sum(axis=1).tolist() == [objects.count(one) for one in ids]
    matches = match(truth, detections, class_aware=False)
    kept = ~matches.ignored[0] & (matches.scores >= threshold)
    predicted = matches.category_ids[kept].tolist()
    assert matrix[:, :-1].sum(axis=0).tolist() == [predicted.count(one) for one in ids]
    assert matrix[:-1, :-1].sum() == matches.correct[0][kept].sum() and matrix[-1, -1] == 0


def test_a_confusion_matrix_by_hand():
    """A cat taken for a dog, a dog found, a dog found twice, a cat missed, a dog invented, one too unsure."""
    names = ("cat", "dog")
    boxes = {"cat": [[0, 0, 10, 10], [50, 50, 10, 10]], "dog": [[20, 0, 10, 10]]}
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
        "annotations": [
            {"id": 10 * row + column, "image_id": 1, "category_id": (3, 8)[row], "bbox": box}
            for row, name in enumerate(names)
            for column, box in enumerate(boxes[name])
        ],
    }
    found = [([0, 0, 10, 9], 0.9), ([20, 0, 10, 10], 0.8), ([20, 0, 10, 9], 0.7), ([80, 0, 9, 9], 0.6)]
    found.append(([50, 50, 10, 10], 0.2))
    detections = [{"image_id": 1, "category_id": 8, "bbox": box, "score": score} for box, score in found]
    confusion = confusion_matrix(truth, detections, 0.5)
    assert confusion["names"] == ["cat", "dog"]
    assert confusion["matrix"] == [[0, 1, 1], [0, 1, 0], [0, 2, 0]]


def test_nothing_annotated_and_nothing_found(scene):
    truth, detections = scene(1)
    empty = threshold_curves(truth | {"annotations": []}, detections)
    assert empty["all"] is None and empty["classes"] == {}
    curves = threshold_curves(truth, [])
    assert curves["all"]["best_threshold"] is None and set(curves["all"]["precision"]) == {1.0}
