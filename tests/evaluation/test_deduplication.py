"""NMS and winner-take-all against loops in exact fractions, torchvision, and their own laws."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import batched_nms

from drmm_hf.data.labels import LabelMap
from drmm_hf.evaluation.deduplication import nms, sweep, winner_take_all
from drmm_hf.evaluation.detections import Detections
from drmm_hf.evaluation.evaluate import measure


# Eighths, so that the comparison with an IoU of integer boxes is exact in floats and fractions alike.
THRESHOLDS = st.integers(0, 8).map(lambda value: value / 8)
BOXES = st.tuples(*[st.integers(-8, 20)] * 4)  # inverted, empty and over the border too


@st.composite
def pictures(draw, boxes=BOXES, max_size=12):
    """Draw the detections of a picture; `query_indices` are their numbers before sorting."""
    rows = draw(st.lists(st.tuples(boxes, st.integers(0, 64), st.integers(0, 2)), max_size=max_size))
    return {
        "boxes": np.array([row[0] for row in rows], dtype=float).reshape(-1, 4),
        "scores": [row[1] / 64 for row in rows],
        "labels": [row[2] for row in rows],
        "query_indices": list(range(len(rows))),
    }


def detections_of(*results):
    detections = Detections()
    for image_id, result in enumerate(results):
        detections.add(image_id, result)
    return detections


def iou(a, b):
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    shared = Fraction(int(max(sides[0], 0) * max(sides[1], 0)))
    areas = [int((box[2] - box[0]) * (box[3] - box[1])) for box in (a, b)]
    return shared / (sum(areas) - shared) if shared else Fraction(0)


def clusters_by_loops(result, threshold):
    """Suppress as NMS is defined, one box after the other: {number of a remaining box: [numbers it stands for]}."""
    rest = sorted(range(len(result["scores"])), key=lambda i: -result["scores"][i])
    clusters = {}
    while rest:
        best, *others = rest
        same = [
            i
            for i in others
            if result["labels"][i] == result["labels"][best]
            and iou(result["boxes"][i], result["boxes"][best]) > Fraction(threshold)
        ]
        clusters[best] = [best, *same]
        rest = [i for i in others if i not in same]
    return clusters


@given(pictures(), THRESHOLDS)
def test_both_equal_their_definition_as_loops(result, threshold):
    clusters = clusters_by_loops(result, threshold)
    kept = nms(detections_of(result), threshold)[0]
    assert kept["query_indices"].tolist() == list(clusters)
    assert kept["scores"].tolist() == [result["scores"][i] for i in clusters]
    won = winner_take_all(detections_of(result), threshold)[0]
    sums = {i: min(1.0, sum(result["scores"][j] for j in members)) for i, members in clusters.items()}
    assert dict(zip(won["query_indices"].tolist(), won["scores"].tolist(), strict=True)) == sums


@given(pictures(st.tuples(*[st.integers(0, 10)] * 2, *[st.integers(11, 20)] * 2)), THRESHOLDS)
def test_nms_equals_torchvision(result, threshold):
    detections = detections_of(result)
    boxes, scores, labels = (torch.as_tensor(detections[0][name]) for name in ("boxes", "scores", "labels"))
    kept = detections[0]["query_indices"][batched_nms(boxes, scores.double(), labels, threshold).numpy()]
    assert nms(detections, threshold)[0]["query_indices"].tolist() == kept.tolist()


@given(pictures(), THRESHOLDS)
def test_nms_is_an_idempotent_choice_in_order_of_score(result, threshold):
    before = detections_of(result)
    once = nms(before, threshold)
    twice = nms(once, threshold)
    rows = set(once[0]["query_indices"].tolist())
    assert rows <= set(before[0]["query_indices"].tolist()) and len(rows) == once.num_boxes
    assert (np.diff(once[0]["scores"]) <= 0).all()
    assert all(np.array_equal(once[0][name], twice[0][name]) for name in once[0])
    for name, array in once[0].items():  # every field stays with its box
        where = [before[0]["query_indices"].tolist().index(row) for row in once[0]["query_indices"]]
        assert np.array_equal(array, before[0][name][where])


@given(pictures(), THRESHOLDS)
def test_winner_take_all_keeps_the_boxes_of_nms_and_the_confidence_of_each_class(result, threshold):
    detections = detections_of(result | {"scores": [score / 16 for score in result["scores"]]})  # sums stay below 1
    kept, won = nms(detections, threshold)[0], winner_take_all(detections, threshold)[0]
    assert sorted(kept["query_indices"]) == sorted(won["query_indices"])
    assert (np.diff(won["scores"]) <= 0).all()
    for label in range(3):
        before = detections[0]["scores"][detections[0]["labels"] == label]
        assert won["scores"][won["labels"] == label].sum() == pytest.approx(before.sum(), abs=1e-6)


@given(pictures(), st.integers(1, 3))
def test_a_threshold_of_one_changes_nothing(result, copies):
    """As Figure 7 says of NMS: even boxes that coincide stay."""
    repeated = {name: [*values] * copies for name, values in result.items()}
    before = detections_of(repeated)
    for after in (nms(before, 1.0), winner_take_all(before, 1.0)):
        assert all(np.array_equal(after[0][name], before[0][name]) for name in before[0])


@given(pictures(max_size=6), pictures(max_size=6), THRESHOLDS)
def test_pictures_and_classes_do_not_see_each_other(first, second, threshold):
    for function in (nms, winner_take_all):
        together = function(detections_of(first, second), threshold)
        for image_id, alone in enumerate((first, second)):
            found = function(detections_of(alone), threshold)[0]
            assert all(np.array_equal(together[image_id][name], found[name]) for name in found)
            for label in range(3):
                of_class = np.array(alone["labels"], dtype=int) == label
                only = {name: np.array(values)[of_class] for name, values in alone.items()}
                expected = function(detections_of(only), threshold)[0]["query_indices"].tolist()
                assert found["query_indices"][found["labels"] == label].tolist() == expected


def test_classes_stay_apart_on_boxes_over_the_border():
    """The shift that moves classes apart in torchvision lays these two over one another."""
    boxes, labels = [[70.0, 70.0, 100.0, 100.0], [-30.0, -30.0, 0.0, 0.0]], [0, 1]
    detections = detections_of({"boxes": boxes, "scores": [0.9, 0.8], "labels": labels})
    assert len(batched_nms(torch.tensor(boxes), torch.tensor([0.9, 0.8]), torch.tensor(labels), 0.5)) == 1
    assert nms(detections, 0.5).num_boxes == 2


def test_the_papers_figure_6():
    """Three boxes of 0.40, 0.40 and 0.13 on one person become one of 0.93; NMS leaves 0.40."""
    boxes = [[0, 0, 100, 200], [1, 0, 101, 200], [0, 3, 100, 203]]
    detections = detections_of({"boxes": boxes, "scores": [0.40, 0.40, 0.13], "labels": [0, 0, 0]})
    assert nms(detections, 0.7)[0]["scores"].tolist() == pytest.approx([0.40])
    assert winner_take_all(detections, 0.7)[0]["scores"].tolist() == pytest.approx([0.93])


def test_sums_stop_at_one_and_reorder():
    boxes = [[0, 0, 10, 10], [50, 0, 60, 10], [50, 0, 60, 10]]
    detections = detections_of({"boxes": boxes, "scores": [0.75, 0.7, 0.6], "labels": [0, 0, 0]})
    won = winner_take_all(detections, 0.5)[0]
    assert won["scores"].tolist() == [1.0, 0.75] and won["boxes"][:, 0].tolist() == [50, 0]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("function", [nms, winner_take_all])
def test_a_threshold_that_is_no_iou_is_refused(function, threshold):
    with pytest.raises(ValueError, match="iou_threshold is .*; the rule is a number in"):
        function(Detections(), threshold)


@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_a_sweep_has_the_figures_of_each_threshold_alone(scene, seed):
    truth, results = scene(seed)
    label_map = LabelMap.from_categories(truth["categories"])
    detections = Detections.from_coco(results, label_map, [image["id"] for image in truth["images"]])
    mapping = dict(enumerate(label_map.category_ids))
    swept = sweep(detections, truth, (0.3, 0.7, 1.0), top_k=9, progress=False)
    assert json.loads(json.dumps(swept, allow_nan=False)) == swept
    for method in ("nms", "wta"):
        assert [entry["iou_threshold"] for entry in swept[method]] == [0.3, 0.7, 1.0]
        for entry in swept[method]:
            alone = measure(detections, truth, mapping, top_k=9, **{method: entry["iou_threshold"]})
            for name in ("AP", "AR100", "ECE", "ECE_0.1", "num_detections", "reliability"):
                assert entry[name] == (alone[name] if isinstance(alone[name], dict) else pytest.approx(alone[name]))
            for name in ("num_removed", "num_capped"):
                assert entry[name] == alone["deduplication"][name]
        assert swept[method][-1] == {"iou_threshold": 1.0} | swept["none"]
    best = max(entry["AP"] for entry in swept["nms"])
    assert best == next(e["AP"] for e in swept["nms"] if e["iou_threshold"] == swept["best_iou_threshold"])


def test_the_duplicate_rate_counts_confident_predictions_whose_object_is_taken():
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 5, "name": "a"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [0, 0, 10, 10]}],
    }
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9.5], [50, 50, 60, 60], [0, 0, 10, 10], [0, 0, 10, 10]]
    detections = Detections()
    detections.add(1, {"boxes": boxes, "scores": [0.9, 0.8, 0.7, 0.6, 0.05], "labels": [0] * 5})
    swept = sweep(detections, truth, (0.97, 0.5), progress=False)
    assert swept["none"]["duplicate_rate"] == pytest.approx(2 / 4)
    assert swept["nms"][0]["duplicate_rate"] == pytest.approx(1 / 3)  # only the two exact copies go
    assert [entry["num_removed"] for entry in swept["nms"]] == [2, 3]
    assert swept["nms"][1]["duplicate_rate"] == 0
    assert [entry["num_capped"] for entry in swept["wta"]] == [1, 1]
    assert [entry["num_capped"] for entry in swept["nms"]] == [0, 0]
