"""Audits of scenes where the answer is known, and their score against planted errors."""

import numpy as np
import pytest

from drmm_hf.evaluation.audit import audit, class_strengths, confidence_audit, score_audit, unexplained
from drmm_hf.evaluation.likelihood import Evidence


CATEGORIES = [{"id": 2, "name": "cat"}, {"id": 7, "name": "dog"}]
IMAGES = [{"id": 10, "file_name": "ten.jpg", "width": 200, "height": 200}, {"id": 20, "width": 200, "height": 200}]


def annotation(identity, image_id, category_id, bbox, iscrowd=0):
    area = bbox[2] * bbox[3]
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    return dict(zip(keys, (identity, image_id, category_id, bbox, area, iscrowd), strict=True))


def detection(image_id, category_id, bbox, score, query=0):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score, "query": query}


def make_scene():
    """Return four annotations (fine, moved, relabelled, invented), a crowd, and what a good detector sees."""
    annotations = [
        annotation(1, 10, 2, [10.0, 10.0, 40.0, 40.0]),
        annotation(2, 10, 2, [120.0, 30.0, 40.0, 40.0]),  # seen 20 to the left
        annotation(3, 10, 7, [10.0, 100.0, 40.0, 40.0]),  # seen as a cat
        annotation(4, 20, 2, [150.0, 150.0, 40.0, 40.0]),  # nothing is seen
        annotation(5, 20, 7, [0.0, 0.0, 60.0, 60.0], iscrowd=1),
    ]
    detections = [
        detection(10, 2, [10.0, 10.0, 40.0, 40.0], 0.95, 0),
        detection(10, 2, [100.0, 30.0, 40.0, 40.0], 0.9, 1),
        detection(10, 2, [10.0, 100.0, 40.0, 40.0], 0.85, 2),
        detection(10, 2, [11.0, 11.0, 40.0, 40.0], 0.3, 3),  # a duplicate of the first
        detection(10, 7, [10.0, 100.0, 40.0, 40.0], 0.1, 2),
        detection(20, 7, [20.0, 100.0, 40.0, 40.0], 0.8, 0),  # nobody annotated it
        detection(20, 2, [21.0, 100.0, 40.0, 40.0], 0.6, 1),  # and once more, as a cat
        detection(20, 7, [10.0, 10.0, 20.0, 20.0], 0.7, 2),  # on the crowd
    ]
    return {"images": IMAGES, "annotations": annotations, "categories": CATEGORIES}, detections


def make_evidence():
    boxes = [[10, 10, 50, 50], [100, 30, 140, 70], [10, 100, 50, 140], [20, 100, 60, 140]]
    columns = {
        "nll": [1.0, 20.0, 8.0, 40.0],
        "log_plausibility": np.log([0.9, 0.01, 0.02, 1e-6]),
        "log_box": [-0.1, -4.0, -0.2, -20.0],
        "log_class": [0.0, 0.0, -3.0, -2.0],
        "log_object": np.log([0.95, 0.9, 0.95, 0.8]),
        "scores": [0.95, 0.9, 0.85, 0.8],
        "boxes": np.array(boxes, dtype=float),
    }
    integers = {"annotation_indices": [0, 1, 2, 3], "category_ids": [2, 2, 2, 7], "queries": [0, 1, 2, 0]}
    columns |= {name: np.array(values) for name, values in integers.items()}
    return Evidence(**{name: np.asarray(values) for name, values in columns.items()})


def test_the_least_plausible_come_first_with_what_speaks_against_them():
    annotations, detections = make_scene()
    result = audit(annotations, make_evidence(), detections)
    found = [(entry["annotation_id"], entry["reason"]) for entry in result["annotations"]]
    assert found[:3] == [(4, "nothing there"), (2, "box"), (3, "class")] and found[3][0] == 1
    moved = result["annotations"][1]
    assert moved["suggestion"] == {"category_id": 2, "bbox": [100.0, 30.0, 40.0, 40.0], "score": 0.9} | {
        "iou": pytest.approx(1 / 3)
    }
    assert moved["plausibility"] == pytest.approx(0.01) and moved["nll"] == 20.0
    assert moved["bbox"] == [120.0, 30.0, 40.0, 40.0] and moved["category_id"] == 2 and moved["image_id"] == 10
    assert result["num_images"] == 2 and result["num_crowds"] == 1
    assert [entry["file_name"] for entry in result["annotations"]] == ["image 20", "ten.jpg", "ten.jpg", "ten.jpg"]


@pytest.mark.parametrize("log_class", [-2.0, -50.0])
def test_a_component_elsewhere_is_no_better_box_whatever_speaks_most_against_the_annotation(log_class):
    """Of annotation 4, the most responsible component lies 90 pixels away; its class says nothing of this place."""
    annotations, detections = make_scene()
    evidence = make_evidence()
    evidence.log_class[3] = log_class
    worst, *others = audit(annotations, evidence, detections)["annotations"]
    assert worst["annotation_id"] == 4 and worst["reason"] == "nothing there" and worst["suggestion"] is None
    assert all(entry["suggestion"]["iou"] > 0.3 for entry in others)


def test_a_class_that_the_model_does_not_know_is_told_with_its_figures():
    annotations, detections = make_scene()
    cat, dog = class_strengths(annotations, detections)
    # The only dog is found at its place with 0.1, after 0.8 elsewhere and one on the crowd, which does not count:
    # precision 1/2 at all recalls. Of three cats one is found, by the first of all: 34 of 101 points of recall.
    assert dog == {"category_id": 7, "name": "dog", "annotations": 1, "AP": pytest.approx(1 / 2), "confident": 2} | {
        "known": True
    }
    assert cat == {
        "category_id": 2,
        "name": "cat",
        "annotations": 3,
        "AP": pytest.approx(34 / 101),
        "confident": 4,
    } | {"known": True}
    (_, unknown) = sorted(class_strengths(annotations, detections[:4]), key=lambda entry: -entry["AP"])
    assert unknown["name"] == "dog" and unknown["AP"] == unknown["confident"] == 0 and not unknown["known"]
    annotations["annotations"] = annotations["annotations"][:2]
    assert [entry["name"] for entry in class_strengths(annotations, detections)] == ["cat"]


def test_missing_annotations_are_seen_once_and_suggestions_are_not_among_them():
    annotations, detections = make_scene()
    assert [entry["score"] for entry in unexplained(annotations, detections)] == [0.9, 0.85, 0.8]
    # The first two are what was moved and what was relabelled; annotation 4 has the query of the third, elsewhere.
    assert audit(annotations, make_evidence(), detections)["missing"] == [detections[5] | {"file_name": "image 20"}]


def test_confidences_rank_by_the_best_prediction_of_the_class_at_the_place():
    annotations, detections = make_scene()
    result = confidence_audit(annotations, detections)
    found = {entry["annotation_id"]: entry["plausibility"] for entry in result["annotations"]}
    assert found == {1: 0.95, 2: 0.0, 3: 0.1, 4: 0.0}
    assert [entry["plausibility"] for entry in result["annotations"]] == sorted(found.values())
    assert result["missing"] == unexplained(annotations, detections)
    # Of the first two predictions of a picture, none is of annotation 3's class.
    few = {e["annotation_id"]: e["plausibility"] for e in confidence_audit(annotations, detections, 2)["annotations"]}
    assert few == {1: 0.95, 2: 0.0, 3: 0.0, 4: 0.0}


def planted_error(kind, identity, image_id=10, bbox=(0.0, 0.0, 10.0, 10.0), category_id=2):
    return {
        "kind": kind,
        "annotation_id": identity,
        "image_id": image_id,
        "bbox": list(bbox),
        "category_id": category_id,
    }


def ranking(plausibilities, missing=()):
    return {
        "annotations": [{"annotation_id": one, "plausibility": value} for one, value in plausibilities.items()],
        "missing": list(missing),
    }


def test_annotations_are_scored_by_kind():
    planted = [planted_error("moved", 1), planted_error("relabelled", 3), planted_error("moved", 5)]
    scored = score_audit(ranking({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5}), planted)
    assert scored["annotations"]["average_precision"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert scored["annotations"]["recall"] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    assert scored["annotations"]["found_at_num"] == pytest.approx(2 / 3)
    assert scored["moved"]["average_precision"] == pytest.approx((1 + 2 / 4) / 2)  # without the relabelled one
    assert scored["relabelled"]["average_precision"] == pytest.approx(1 / 2)
    assert scored["relabelled"]["num"] == 1 and scored["removed"] is None


def test_entries_of_equal_score_count_together():
    scored = score_audit(ranking({2: 0.0, 1: 0.0, 4: 0.0, 3: 0.5}), [planted_error("moved", 1)])["moved"]
    assert scored["precision"] == pytest.approx([1 / 3, 1 / 4]) and scored["recall"] == [1, 1]
    assert scored["average_precision"] == pytest.approx(1 / 3)


def test_removed_annotations_are_found_once():
    box, elsewhere = (0.0, 0.0, 10.0, 10.0), [50.0, 50.0, 10.0, 10.0]
    planted = [planted_error("removed", 1), planted_error("removed", 2, bbox=(100.0, 0.0, 10.0, 10.0))]
    planted.append(planted_error("moved", 3, bbox=(0.0, 100.0, 10.0, 10.0)))
    missing = [
        detection(10, 2, elsewhere, 0.9),  # a wrong alarm
        detection(10, 2, [0.0, 100.0, 10.0, 10.0], 0.85),  # where the moved one was: neither right nor wrong
        detection(10, 2, [1.0, 0.0, 10.0, 10.0], 0.8),  # found
        detection(10, 2, list(box), 0.7),  # again: neither right nor wrong
        detection(10, 7, [100.0, 0.0, 10.0, 10.0], 0.6),  # of another class: wrong
        detection(20, 2, [100.0, 0.0, 10.0, 10.0], 0.5),  # in another picture: wrong
    ]
    scored = score_audit(ranking({3: 0.5}, missing), planted)["removed"]
    assert scored["num"] == 2 and scored["precision"] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    assert scored["recall"] == [0, 0.5, 0.5, 0.5] and scored["average_precision"] == pytest.approx(0.25)
    assert scored["found_at_num"] == 0.5


def test_an_empty_list_finds_nothing():
    scored = score_audit(ranking({}), [planted_error("removed", 1), planted_error("moved", 2)])
    assert scored["removed"]["average_precision"] == scored["moved"]["average_precision"] == 0
    assert scored["removed"]["recall"] == [] and scored["moved"]["found_at_num"] == 0


def test_average_precision_is_the_area_of_random_rankings():
    """Against the mean of precision at each error's rank, in a plain loop."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.permutation(50) / 50
        errors = rng.choice(50, 12, replace=False).tolist()
        scored = score_audit(
            ranking(dict(enumerate(values.tolist()))), [planted_error("relabelled", one) for one in errors]
        )
        order = np.argsort(values).tolist()
        ranks = sorted(order.index(one) + 1 for one in errors)
        expected = sum((place + 1) / rank for place, rank in enumerate(ranks)) / 12
        assert scored["relabelled"]["average_precision"] == pytest.approx(expected)
        assert scored["annotations"] == scored["relabelled"]
