"""Figures by size against pycocotools' area ranges; every other bin against counting by hand."""

import contextlib
import io
import math

import numpy as np
import pytest

from drmm_hf.evaluation import breakdown as module
from drmm_hf.evaluation.breakdown import (
    ERRORS,
    aspect_ratios,
    average_precision,
    bin_figures,
    breakdown,
    neighbour_overlaps,
    object_counts,
    tide_errors,
)
from drmm_hf.evaluation.coco_metrics import coco_evaluation, coco_metrics
from drmm_hf.evaluation.tables import breakdown_table


EDGES = (0.0, 15.0, 22.0, 30.0, math.inf)


@pytest.mark.parametrize("seed", range(12))
def test_a_bin_of_sizes_is_an_area_range_of_coco(scene, seed, monkeypatch):
    monkeypatch.setattr(module, "SIZE_EDGES", EDGES)
    truth, detections = scene(seed, num_images=8)
    evaluation = coco_evaluation(truth, detections)
    evaluation.params.areaRng = [[low**2, min(high, 1e5) ** 2] for low, high in zip(EDGES, EDGES[1:], strict=False)]
    evaluation.params.areaRngLbl = list(range(4))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    for index, one in enumerate(breakdown(truth, detections)["size"]):
        precision = evaluation.eval["precision"][:, :, :, index, 2]
        defined = precision[precision > -1]
        assert one["AP"] == (pytest.approx(defined.mean(), abs=1e-9) if defined.size else None)
        # COCO's recall is a mean over classes; all objects together are counted in its matches.
        groups = [
            group for group in evaluation.evalImgs if group and group["aRng"] == evaluation.params.areaRng[index]
        ]
        found = sum(int(((group["dtMatches"][0] > 0) & ~group["dtIgnore"][0].astype(bool)).sum()) for group in groups)
        total = sum(int((~np.array(group["gtIgnore"]).astype(bool)).sum()) for group in groups)
        assert one["num_ground_truths"] == total
        assert one["recall"] == (pytest.approx(found / total) if total else None)


def test_one_bin_for_everything_is_the_whole(scene):
    truth, detections = scene(3, num_images=6)
    everything = np.ones(len(truth["annotations"]), dtype=bool)
    whole = bin_figures(truth, detections, everything, np.ones(len(detections), dtype=bool))
    assert whole["AP"] == pytest.approx(coco_metrics(truth, detections)["AP"], abs=1e-9)
    nothing = bin_figures(truth, detections, ~everything, np.zeros(len(detections), dtype=bool))
    assert nothing == {"num_ground_truths": 0} | dict.fromkeys(("AP", "recall", "AR", "ECE", "ECE_0.1"))


def test_the_bins_hold_each_object_once_and_recall_adds_up(scene):
    truth, detections = scene(4, num_images=6, crowds=False)
    report = breakdown(truth, detections)
    for name in ("size", "aspect_ratio", "objects", "overlap"):
        assert sum(one["num_ground_truths"] for one in report[name]) == len(truth["annotations"])
        assert all((one["AP"] is None) == (name == "overlap" or not one["num_ground_truths"]) for one in report[name])


def test_what_objects_are_sorted_by():
    def record(image_id, category_id, bbox, iscrowd=0):
        return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": iscrowd}

    annotations = {
        "annotations": [
            record(1, 1, [0, 0, 10, 10]),
            record(1, 1, [5, 0, 10, 10]),
            record(1, 2, [5, 0, 10, 20]),
            record(1, 1, [0, 0, 10, 10], iscrowd=1),
            record(2, 1, [5, 0, 10, 10]),
        ]
    }
    assert object_counts(annotations).tolist() == [3, 3, 3, 3, 1]
    assert neighbour_overlaps(annotations) == pytest.approx([1 / 3, 1 / 3, 0, 0, 0])
    boxes = np.array([record["bbox"] for record in annotations["annotations"]] + [[0, 0, 5, 0]], dtype=float)
    assert aspect_ratios(boxes).tolist() == [1, 1, 0.5, 1, 1, math.inf]


def test_average_precision_by_hand():
    assert average_precision(np.array([], dtype=bool), 3) == 0
    assert average_precision(np.array([True, True]), 2) == pytest.approx(1)
    # Precision 1 up to recall 1/2, then 2/3.
    assert average_precision(np.array([True, False, True]), 2) == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_each_kind_of_error_is_told():
    """One picture a kind; the object of the last one is missed."""
    box = [10.0, 10.0, 40.0, 40.0]
    kinds = {"right": (1, box), "Cls": (2, box), "Loc": (1, [30.0, 10.0, 40.0, 40.0])}
    kinds |= {"Both": (2, [30.0, 10.0, 40.0, 40.0]), "Bkg": (1, [60.0, 60.0, 9.0, 9.0]), "Miss": None}
    truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    detections = []
    for image_id, (kind, found) in enumerate(kinds.items(), start=1):
        truth["images"].append({"id": image_id, "width": 100, "height": 100})
        truth["annotations"].append({"id": image_id, "image_id": image_id, "category_id": 1, "bbox": box})
        if found:
            detections.append({"image_id": image_id, "category_id": found[0], "bbox": found[1], "score": 0.9})
        if kind == "right":
            detections.append(detections[-1] | {"score": 0.5})
    errors = tide_errors(truth, detections)
    assert errors["counts"] == {"Cls": 1, "Loc": 1, "Both": 1, "Dupe": 1, "Bkg": 1, "Miss": errors["counts"]["Miss"]}
    assert errors["counts"]["Miss"] >= 1 and errors["delta"].keys() == ERRORS.keys()
    assert errors["AP50"] == pytest.approx(coco_metrics(truth, detections)["AP50"])


def test_without_hotcoco_the_table_says_what_to_install(scene, monkeypatch):
    truth, detections = scene(5)
    assert "wrong place" in breakdown_table(breakdown(truth, detections))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    report = breakdown(truth, detections)
    assert report["errors"] is None
    assert breakdown_table(report).endswith('for the kinds of errors: pip install "drmm-hf[fast-eval]"')
