"""COCO metrics: hand-made sets with known answers, and an independent AP50."""

import copy
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from drmm_hf.data.coco import canonical_dataset
from drmm_hf.data.labels import LabelMap
from drmm_hf.evaluation.audit import confidence_audit
from drmm_hf.evaluation.breakdown import breakdown
from drmm_hf.evaluation.calibration import calibration_report
from drmm_hf.evaluation.coco_metrics import METRIC_NAMES, coco_metrics, ground_truth, load_annotations
from drmm_hf.evaluation.compare import picture_errors
from drmm_hf.evaluation.coverage import coverage_report
from drmm_hf.evaluation.detections import Detections
from drmm_hf.evaluation.evaluate import figures
from drmm_hf.evaluation.recalibration import fit_calibrators
from drmm_hf.evaluation.thresholds import confusion_matrix, threshold_curves


def as_detections(annotations, score=0.9):
    return [
        {**{key: record[key] for key in ("image_id", "category_id", "bbox")}, "score": score} for record in annotations
    ]


def iou_xywh(first, second):
    """Return the IoU of two xywh boxes, written out."""
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    return overlap / (first[2] * first[3] + second[2] * second[3] - overlap)


def oracle_average_precision(truth, detections, category_id, threshold=0.5):
    """Return AP of one class without crowds: greedy matching, 101 recall points, written without pycocotools."""
    objects = {}
    for record in truth["annotations"]:
        if record["category_id"] == category_id:
            objects.setdefault(record["image_id"], []).append({"bbox": record["bbox"], "free": True})
    num_objects = sum(map(len, objects.values()))
    if num_objects == 0:
        return None
    hits = []
    mine = [entry for entry in detections if entry["category_id"] == category_id]
    for entry in sorted(mine, key=lambda entry: -entry["score"]):
        free = [one for one in objects.get(entry["image_id"], []) if one["free"]]
        best = max(free, key=lambda one: iou_xywh(one["bbox"], entry["bbox"]), default=None)
        hit = best is not None and iou_xywh(best["bbox"], entry["bbox"]) >= threshold
        if hit:
            best["free"] = False
        hits.append(hit)
    true_positives = np.cumsum(hits)
    recall = true_positives / num_objects
    precision = true_positives / np.arange(1, len(hits) + 1)
    points = [precision[recall >= r].max(initial=0.0) for r in np.linspace(0, 1, 101)]
    return float(np.mean(points))


def test_perfect_detections_have_ap_one(scene):
    truth, _ = scene(1, crowds=False)
    metrics = coco_metrics(truth, as_detections(truth["annotations"]))
    for name in ("AP", "AP50", "AP75", "AR100"):
        assert metrics[name] == pytest.approx(1.0)


def test_no_detections_have_ap_zero(scene):
    truth, _ = scene(1, crowds=False)
    metrics = coco_metrics(truth, [])
    assert metrics["AP"] == 0.0 and metrics["AR100"] == 0.0


def test_wrong_classes_and_duplicates_lower_ap(scene):
    truth, _ = scene(4, crowds=False)
    perfect = as_detections(truth["annotations"], score=0.5)
    shifted = as_detections(truth["annotations"], score=0.9)
    for entry in shifted:
        entry["category_id"] = truth["categories"][0]["id"]
    assert coco_metrics(truth, perfect + as_detections(truth["annotations"], 0.4))["AP"] == pytest.approx(1.0)
    assert coco_metrics(truth, perfect + shifted)["AP"] < 0.9
    worse = [entry | {"score": 0.9 - 0.01 * index} for index, entry in enumerate(perfect)]
    duplicated = [copy_of | {"score": copy_of["score"] - 0.001} for copy_of in worse]
    assert coco_metrics(truth, worse + duplicated)["AP"] < 0.95


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000))
def test_ap50_of_each_class_agrees_with_an_independent_count(scene, seed):
    truth, detections = scene(seed, num_classes=1, crowds=False)
    expected = oracle_average_precision(truth, detections, truth["categories"][0]["id"])
    value = coco_metrics(truth, detections)["AP50"]
    assert value == (None if expected is None else pytest.approx(expected, abs=1e-9))


def test_ap_per_class_averages_to_ap(scene):
    truth, detections = scene(8, num_images=5)
    metrics = coco_metrics(truth, detections)
    values = [value for value in metrics["AP_per_class"].values() if value is not None]
    assert set(metrics["AP_per_class"]) == {record["name"] for record in truth["categories"]}
    assert np.mean(values) == pytest.approx(metrics["AP"])
    assert 0 < metrics["AP"] < 1


def test_a_crowd_forgives_detections_upon_it():
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [50, 50, 40, 40], "area": 1600, "iscrowd": 1},
        ],
    }
    on_crowd = {"image_id": 1, "category_id": 1, "bbox": [60, 60, 10, 10], "score": 0.9}
    right = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.5}
    assert coco_metrics(truth, [on_crowd, right])["AP"] == pytest.approx(1.0)
    truth["annotations"][1]["iscrowd"] = 0
    assert coco_metrics(truth, [on_crowd, right])["AP"] < 0.3


def test_areas_come_from_the_annotations():
    """A mask's area, not its box's, decides between small and large; without any small object APs is not defined."""
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 200, 200], "area": 900.0, "iscrowd": 0}
        ],
    }
    detection = as_detections(truth["annotations"])
    metrics = coco_metrics(truth, detection)
    assert metrics["APs"] == pytest.approx(1.0) and metrics["APl"] is None
    del truth["annotations"][0]["area"]
    assert coco_metrics(truth, detection)["APl"] == pytest.approx(1.0)


def test_annotation_ids_play_no_part(scene):
    truth, detections = scene(12)
    renumbered = copy.deepcopy(truth)
    for index, record in enumerate(renumbered["annotations"]):
        record["id"] = 1000 - index
    assert coco_metrics(truth, detections) == coco_metrics(renumbered, detections)


def test_arguments_stay_as_they_are_and_stdout_stays_silent(scene, tmp_path, capsys):
    truth, detections = scene(3)
    before = copy.deepcopy((truth, detections))
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(truth))
    from_file = coco_metrics(path, detections)
    assert from_file == coco_metrics(truth, detections)
    assert (truth, detections) == before
    assert capsys.readouterr().out == ""
    assert set(METRIC_NAMES) < set(from_file)


def test_unknown_pictures_and_categories_are_errors(scene):
    truth, detections = scene(3)
    with pytest.raises(ValueError, match="image_id 999, which the annotations do not have"):
        coco_metrics(truth, [detections[0] | {"image_id": 999}])
    with pytest.raises(ValueError, match="category_id 1, which the annotations do not have"):
        coco_metrics(truth, [detections[0] | {"category_id": 1}])
    with pytest.raises(ValueError, match="annotations has no categories"):
        coco_metrics({"images": [], "annotations": []}, [])


def test_ground_truth_of_a_dataset_is_its_annotation_file(scene):
    truth, detections = scene(6)
    rows = [
        {
            **{key: image[key] for key in ("file_name", "width", "height")},
            "image_id": image["id"],
            "image": None,
            "objects": [
                {key: record[key] for key in ("id", "category_id", "bbox", "area", "iscrowd")}
                for record in truth["annotations"]
                if record["image_id"] == image["id"]
            ],
        }
        for image in truth["images"]
    ]
    rebuilt = ground_truth(canonical_dataset(rows, truth["categories"]))
    assert rebuilt["categories"] == truth["categories"] and rebuilt["images"] == truth["images"]
    assert sorted(rebuilt["annotations"], key=lambda record: record["id"]) == truth["annotations"]
    assert coco_metrics(rebuilt, detections) == coco_metrics(truth, detections)


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), num_classes=st.sampled_from([1, 3, 12]), order=st.randoms(use_true_random=False))
def test_the_fast_backend_gives_the_figures_of_pycocotools(scene, seed, num_classes, order):
    """With crowds, ties, records in any order and areas at the boundaries of the sizes."""
    pytest.importorskip("hotcoco")
    truth, detections = scene(seed, num_classes=num_classes)
    for records in truth.values():
        order.shuffle(records)
    for index, record in enumerate(truth["annotations"]):
        record["area"] = (record["area"], 32**2, 96**2, 0.5)[index % 4]
    for entry in detections[::2]:
        entry["score"] = round(entry["score"], 1)
    slow, fast = (coco_metrics(truth, detections, backend) for backend in ("pycocotools", "hotcoco"))
    assert slow.keys() == fast.keys()
    for name in (*METRIC_NAMES, "AP_per_class"):
        assert fast[name] == (None if slow[name] is None else pytest.approx(slow[name], abs=1e-9))


def test_both_backends_say_the_same_of_nothing_and_of_the_unknown(scene, capfd):
    truth, detections = scene(5)
    for backend in ("pycocotools", "hotcoco"):
        if backend == "hotcoco":
            pytest.importorskip("hotcoco")
        assert coco_metrics(truth, [], backend)["AP"] == 0
        nothing = coco_metrics(truth | {"annotations": []}, detections, backend)
        assert all(nothing[name] is None for name in METRIC_NAMES)
        with pytest.raises(ValueError, match="detections have image_id 999"):
            coco_metrics(truth, [detections[0] | {"image_id": 999}], backend)
    assert capfd.readouterr().out == ""


def figures_of(truth, detections):
    detections = Detections.from_coco(
        detections, LabelMap.from_categories(truth["categories"]), [record["id"] for record in truth["images"]]
    )
    labels = dict(enumerate(record["id"] for record in truth["categories"]))
    return figures(detections, truth, labels)


REPORTS = {
    "AP": coco_metrics,
    "AP of pycocotools": lambda truth, found: coco_metrics(truth, found, "pycocotools"),
    "figures": figures_of,
    "thresholds": threshold_curves,
    "confusion": lambda truth, found: confusion_matrix(truth, found, 0.3),
    "breakdown": breakdown,
    "calibration": calibration_report,
    "calibrators": fit_calibrators,
    "coverage": coverage_report,
    "differences": lambda truth, found: picture_errors(truth, found, 0.3),
    "audit": lambda truth, found: confidence_audit(truth, found)["annotations"],
}


@pytest.mark.parametrize("report", REPORTS)
def test_annotations_of_pictures_and_categories_that_are_not_listed_change_no_report(scene, report):
    truth, detections = scene(7, num_images=6)
    detections = [entry | {"box_scales": [1.0] * 4, "query": index} for index, entry in enumerate(detections)]
    first = truth["annotations"][0]
    strangers = [
        first | {"id": 1000, "image_id": 999, "iscrowd": 0},
        first | {"id": 1001, "image_id": 999, "iscrowd": 1},
        first | {"id": 1002, "category_id": 3, "iscrowd": 0},  # between two that are listed
        first | {"id": 1003, "category_id": 999, "iscrowd": 1},
    ]
    mixed = truth | {"annotations": [*strangers[:2], *truth["annotations"], *strangers[2:]]}
    before = copy.deepcopy(mixed)
    assert REPORTS[report](mixed, detections) == REPORTS[report](truth, detections)
    assert mixed == before


def test_pycocotools_itself_leaves_them_out(scene):
    truth, detections = scene(7, num_images=6)
    found = coco_metrics(truth, detections)
    mixed = copy.deepcopy(truth)
    for key in ("image_id", "category_id"):
        mixed["annotations"].append(truth["annotations"][0] | {key: 999})
    indices = []
    for records in (mixed["annotations"], detections):
        index = COCO()
        rows = [
            {"iscrowd": 0, "area": record["bbox"][2] * record["bbox"][3]} | record | {"id": place}
            for place, record in enumerate(records, start=1)
        ]
        index.dataset = mixed | {"annotations": rows}
        index.createIndex()
        indices.append(index)
    oracle = COCOeval(*indices, iouType="bbox")
    oracle.evaluate()
    oracle.accumulate()
    oracle.summarize()
    assert oracle.stats.tolist() == pytest.approx(
        [-1 if found[name] is None else found[name] for name in METRIC_NAMES]
    )


def test_a_file_says_how_many_are_left_out(scene, tmp_path, caplog):
    truth, _ = scene(7)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(truth | {"annotations": [truth["annotations"][0] | {"image_id": 999}]}))
    assert load_annotations(path)["annotations"] == []
    assert (
        f"{path}: 1 of 1 annotations are of pictures or categories that it does not list, and left out" in caplog.text
    )


NAN = float("nan")
BAD = [
    ("annotations", {"bbox": [NAN, 1, 2, 3]}, "bbox is [nan, 1, 2, 3], must be 4 finite numbers below 2**63"),
    ("annotations", {"bbox": ["a", 1, 2, 3]}, "bbox is ['a', 1, 2, 3], must be 4 finite numbers below 2**63"),
    ("annotations", {"bbox": [1, 2]}, "bbox is [1, 2], must be 4 finite numbers below 2**63"),
    ("annotations", {"bbox": None}, "bbox is None, must be 4 finite numbers below 2**63"),
    ("annotations", {"area": NAN}, "area is nan, must be a finite number of at least 0"),
    ("annotations", {"iscrowd": "yes"}, "iscrowd is 'yes', must be 0 or 1"),
    ("annotations", {"image_id": "5"}, "image_id is '5', must be an integer"),
    ("annotations", {"category_id": None}, "category_id is None, must be an integer"),
    ("images", {"id": "5"}, "id is '5', must be an integer"),
]


@pytest.mark.parametrize(("section", "change", "said"), BAD)
def test_what_is_no_number_in_a_file_is_named(scene, tmp_path, section, change, said):
    truth, _ = scene(7)
    path = tmp_path / "instances.json"
    truth[section][1] |= change
    path.write_text(json.dumps(truth))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {section}[1] (id {truth[section][1]['id']!r}): {said}")):
        load_annotations(path)


def test_sections_of_a_file_are_lists_of_objects(scene, tmp_path):
    truth, _ = scene(7)
    path = tmp_path / "instances.json"
    for change, said in (
        ({"annotations": None}, "no list 'annotations'"),
        ({"images": [7]}, "images[0]: 7 must be an"),
    ):
        path.write_text(json.dumps(truth | change))
        with pytest.raises(ValueError, match=re.escape(said)):
            load_annotations(path)
