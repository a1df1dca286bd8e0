"""Detectors side by side: errors of pictures by hand, and the order of those that tell them apart."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.data.coco import canonical_dataset
from drmm_hf.data.labels import LabelMap
from drmm_hf.evaluation import compare as module
from drmm_hf.evaluation.calibration import optimal_lrp
from drmm_hf.evaluation.coco_metrics import ground_truth
from drmm_hf.evaluation.compare import (
    compare,
    folder_name,
    input_size,
    interleaved_seconds,
    largest_differences,
    picture_errors,
)
from drmm_hf.evaluation.detections import Detections
from drmm_hf.evaluation.evaluate import evaluate
from drmm_hf.evaluation.likelihood import likelihoods
from drmm_hf.evaluation.matches import match


CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}]


def make_dataset():
    rows = []
    for index, boxes in enumerate(
        ([[10.0, 10.0, 20.0, 20.0], [50.0, 10.0, 20.0, 20.0]], [[0.0, 0.0, 30.0, 30.0]], [])
    ):
        pixels = np.random.default_rng(index).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        objects = [
            {"id": 10 * index + place, "category_id": 7, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for place, box in enumerate(boxes, start=1)
        ]
        row = {"image_id": index, "file_name": f"{index}.png", "image": Image.fromarray(pixels)}
        rows.append(row | {"width": 80, "height": 60, "objects": objects})
    return canonical_dataset(rows, CATEGORIES)


def detection(image_id, bbox, score, category_id=7):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


GOOD = [
    detection(0, [10.0, 10.0, 20.0, 20.0], 0.9),
    detection(0, [50.0, 10.0, 20.0, 20.0], 0.8),
    detection(1, [0.0, 0.0, 30.0, 30.0], 0.7),
    detection(2, [0.0, 0.0, 9.0, 9.0], 0.2),
]
POOR = [detection(0, [10.0, 10.0, 20.0, 15.0], 0.6), detection(2, [0.0, 0.0, 9.0, 9.0], 0.5, 2)]


def test_errors_of_pictures_are_those_of_the_formula():
    content = ground_truth(make_dataset())
    errors = picture_errors(content, POOR, threshold=0.5)
    # Picture 0: one of IoU 0.75, hence 0.5 of the way to wrong, and one missed; 1: missed; 2: one invented.
    assert errors[0] == {"lrp": pytest.approx((0.5 + 1) / 2), "correct": 1, "wrong": 0, "missed": 1}
    assert errors[1] == {"lrp": 1.0, "correct": 0, "wrong": 0, "missed": 1}
    assert errors[2] == {"lrp": 1.0, "correct": 0, "wrong": 1, "missed": 0}
    perfect = picture_errors(content, GOOD, threshold=0.5)
    assert [perfect[one]["lrp"] for one in range(3)] == pytest.approx([0, 0, 0], abs=1e-12)


def test_of_one_picture_and_class_it_is_the_error_that_optimal_lrp_minimises(scene):
    compared = 0
    for seed in range(12):
        annotations, detections = scene(seed, num_images=1, num_classes=1)
        for best, score in optimal_lrp(match(annotations, detections)).values():
            if score is not None:
                (error,) = picture_errors(annotations, detections, score).values()
                assert error["lrp"] == pytest.approx(best)
                compared += 1
    assert compared >= 6


def test_pictures_with_the_largest_range_come_first():
    def errors(*values):
        return {one: {"lrp": value, "correct": one, "wrong": 0, "missed": 0} for one, value in enumerate(values)}

    # Ranges 0.1, 0.8, 0, 0.8: of the equal ones, picture 3 has more objects.
    assert largest_differences([errors(0.5, 0.1, 0.3, 0.9), errors(0.6, 0.9, 0.3, 0.1)]) == [3, 1, 0]


def make_detector(seed):
    torch.manual_seed(seed)
    config = tiny_config(id2label={0: "dog", 1: "cat"}, category_ids=[2, 7])
    return DrmmForObjectDetection(config).eval(), DrmmImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})


def test_every_column_is_what_its_own_measurement_says(tmp_path):
    dataset = make_dataset()
    content = ground_truth(dataset)
    detections = Detections.from_coco(GOOD, LabelMap.from_categories(content["categories"]), dataset["image_id"])
    first, second = make_detector(0), make_detector(1)
    entrants = {"first": first, "file": detections, "second": second}
    result = compare(entrants, dataset, content, tmp_path, num_timed=2, progress=False)
    assert result == json.loads((tmp_path / "compare.json").read_text())
    models = result["models"]
    assert list(models) == ["first", "file", "second"] and models["file"]["AP"] == pytest.approx(1)
    for name, detector in (("first", first), ("second", second)):
        alone = evaluate(*detector, dataset, content, progress=False)
        assert {key: models[name][key] for key in ("AP", "ECE", "ECE_0.1")} == {
            key: alone[key] for key in ("AP", "ECE", "ECE_0.1")
        }
        found = likelihoods(*detector, dataset, content, progress=False)
        assert models[name]["NLL"] == pytest.approx((found.nll[-1] - found.log_scales).mean())
        assert models[name]["parameters"] == sum(value.numel() for value in detector[0].state_dict().values()) - sum(
            value.numel() for value in detector[0].buffers()
        )
        assert models[name]["seconds"] > 0
    assert models["first"]["speed"] == 1 and models["first"]["speed_quartiles"] == [1, 1]
    assert models["file"]["NLL"] is models["file"]["seconds"] is models["file"]["parameters"] is None
    assert models["file"]["threshold"] == pytest.approx(0.7)  # both objects of picture 0 and that of 1, nothing else
    assert {one["image_id"] for one in result["pictures"]} <= {0, 1, 2} and result["pictures"]
    assert result["pictures"][0]["errors"]["file"]["lrp"] == pytest.approx(0, abs=1e-9)
    assert json.loads((tmp_path / "2_file" / "detections.json").read_text()) == GOOD


def test_folders_are_named_after_the_detectors():
    """Each has its own, whatever the names are and whether or not the disk tells cases apart."""
    names = ["runs/a/best", "RUNS/A/best", "../x y.json", "é", "/" + 300 * "long/"]
    folders = [folder_name(number, name) for number, name in enumerate(names, start=1)]
    assert folders[:4] == ["1_runs_a_best", "2_RUNS_A_best", "3_x_y.json", "4_é"]
    assert len(folders[4]) <= 70 and folders[4].endswith("long")


def test_the_input_size_is_what_the_processor_says():
    assert input_size(make_detector(0)[1]) == {"shortest_edge": 48, "longest_edge": 96}
    assert input_size(SimpleNamespace(size={"height": 640, "width": 480})) == {"height": 640, "width": 480}
    assert input_size(SimpleNamespace(size=None)) is None


def test_detectors_are_timed_in_turns(monkeypatch):
    """With a clock that only the detectors move: each picture once a detector, and each detector first as often."""
    now, runs = [0.0], []

    def run(model, processor, rows, progress):
        runs.append((model, rows[0]["image_id"]))
        now[0] += {"slow": 2.0, "fast": 0.5}[model]

    monkeypatch.setattr(module, "predict", run)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    seconds = interleaved_seconds([("slow", None), ("fast", None)], make_dataset().select([0, 1]), progress=False)
    assert seconds.tolist() == [[2.0, 0.5], [2.0, 0.5]]
    assert runs == [("slow", 0), ("fast", 0), ("slow", 0), ("fast", 0), ("fast", 1), ("slow", 1)]
