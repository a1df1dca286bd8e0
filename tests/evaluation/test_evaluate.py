"""From detector and dataset to figures: a stub that knows the answers, and every disagreement in words."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from drmm_hf.data.coco import canonical_dataset
from drmm_hf.evaluation.calibration import calibration
from drmm_hf.evaluation.coco_metrics import METRIC_NAMES, coco_metrics, ground_truth
from drmm_hf.evaluation.detections import Detections
from drmm_hf.evaluation.evaluate import category_of_label, class_table, evaluate, measure
from drmm_hf.evaluation.predict import predict


CATEGORIES = [{"id": 9, "name": "cat"}, {"id": 4, "name": "Traffic Light"}]


class Reader(torch.nn.Module):
    """A detector that reads the number of a picture from its grey level."""

    def __init__(self, config):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = config

    def forward(self, pixel_values):
        return {"logits": pixel_values[:, 0, :1, :1], "pred_boxes": pixel_values.new_zeros(len(pixel_values), 1, 4)}


class Oracle:
    """A processor whose answers are written down, by the number of the picture."""

    def __init__(self, answers):
        self.answers = answers

    def __call__(self, images, return_tensors):
        level = float(images[0].getpixel((0, 0))[0])
        return {"pixel_values": torch.full((1, 3, 2, 2), level)}

    def post_process_object_detection(self, outputs, threshold, target_sizes):
        return [
            {key: torch.tensor(value) for key, value in self.answers[int(level)].items()}
            for level in outputs["logits"][:, 0, 0].tolist()
        ]


def config(names=("cat", "Traffic Light"), category_ids=(9, 4)):
    return SimpleNamespace(id2label=dict(enumerate(names)), category_ids=category_ids and list(category_ids))


@pytest.fixture
def dataset():
    """Return two pictures: a cat and a light; a light and a crowd of cats."""

    def record(annotation_id, category_id, bbox, iscrowd=0):
        area = 0.5 * bbox[2] * bbox[3]
        return {"id": annotation_id, "category_id": category_id, "bbox": bbox, "area": area, "iscrowd": iscrowd}

    objects = [
        [record(0, 9, [10.0, 10.0, 40.0, 40.0]), record(1, 4, [60.0, 10.0, 20.0, 40.0])],
        [record(2, 4, [0.0, 0.0, 30.0, 60.0]), record(3, 9, [50.0, 0.0, 50.0, 50.0], iscrowd=1)],
    ]
    rows = [
        {
            "image_id": 70 + index,
            "file_name": f"{index}.png",
            "image": Image.new("RGB", (100, 80), (index,) * 3),
            "width": 100,
            "height": 80,
            "objects": objects[index],
        }
        for index in range(2)
    ]
    return canonical_dataset(rows, CATEGORIES)


ANSWERS = [
    {
        "boxes": [[10.0, 10.0, 50.0, 50.0], [60.0, 10.0, 80.0, 50.0], [5.0, 5.0, 5.0, 9.0]],
        "scores": [0.9, 0.8, 0.7],
        "labels": [0, 1, 1],
    },
    {"boxes": [[0.0, 0.0, 30.0, 60.0], [60.0, 10.0, 70.0, 20.0]], "scores": [0.7, 0.05], "labels": [1, 0]},
]


def test_a_detector_that_knows_the_answers_is_perfect(dataset, tmp_path):
    metrics = evaluate(Reader(config()), Oracle(ANSWERS), dataset, output_dir=tmp_path / "new", progress=False)
    assert metrics["AP"] == pytest.approx(1.0) and metrics["AP_per_class"] == pytest.approx(
        {"cat": 1.0, "Traffic Light": 1.0}
    )
    # All three right, scored 0.9, 0.8 and 0.7; the detection on the crowd is left out.
    assert metrics["ECE"] == metrics["ECE_0.1"] == pytest.approx(0.2)
    assert metrics["reliability"]["bin_count"] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0]
    counts = {name: metrics[name] for name in metrics if name.startswith("num_")}
    assert counts == {
        "num_images": 2,
        "num_ground_truths": 3,
        "num_crowds": 1,
        "num_detections": 4,
        "num_boxes_without_size": 1,
        "num_other_labels": 0,
    }


def test_the_files_hold_the_figures_and_the_boxes_they_come_from(dataset, tmp_path):
    answers = [ANSWERS[1], ANSWERS[0]]  # the answers of the other picture: some wrong, some right
    metrics = evaluate(Reader(config()), Oracle(answers), dataset, output_dir=tmp_path, progress=False)
    written = json.loads((tmp_path / "metrics.json").read_text())
    entries = json.loads((tmp_path / "detections.json").read_text())
    assert written == metrics and 0 <= metrics["AP"] < 1
    assert {entry["category_id"] for entry in entries} == {9, 4}
    again = coco_metrics(ground_truth(dataset), entries)
    assert {name: metrics[name] for name in METRIC_NAMES} == {name: again[name] for name in METRIC_NAMES}
    assert metrics["ECE"] == calibration(ground_truth(dataset), entries).ece
    assert metrics["ECE_0.1"] == calibration(ground_truth(dataset), entries, min_score=0.1).ece != metrics["ECE"]


def test_the_annotation_file_counts_and_not_the_dataset(dataset, tmp_path):
    annotations = ground_truth(dataset)
    annotations["annotations"] = annotations["annotations"][:1]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(annotations))
    metrics = evaluate(Reader(config()), Oracle(ANSWERS), dataset, path, progress=False)
    assert metrics["num_ground_truths"] == 1 and metrics["AP_per_class"]["Traffic Light"] is None


def test_top_k_cuts_over_all_classes(dataset):
    metrics = evaluate(Reader(config()), Oracle(ANSWERS), dataset, top_k=1, progress=False)
    assert metrics["num_detections"] == 2 and metrics["AP_per_class"]["cat"] == pytest.approx(1.0)
    assert metrics["AP_per_class"]["Traffic Light"] == pytest.approx(51 / 101)


TWICE = {  # a cat found twice, a light found twice over the cat, and the same on nothing
    "boxes": [[10, 10, 50, 50], [11, 10, 51, 50], [60, 10, 80, 50], [60, 11, 80, 51], [0, 60, 9, 79], [0, 60, 9, 79]],
    "scores": [0.75, 0.125, 0.5, 0.25, 0.0625, 0.03125],
    "labels": [0, 0, 1, 1, 1, 5],
}


@pytest.mark.parametrize(
    ("options", "scores", "removed"),
    [({}, TWICE["scores"][:5], 0), ({"nms": 0.7}, [0.75, 0.5, 0.0625], 2), ({"wta": 0.7}, [0.875, 0.75, 0.0625], 2)],
    ids=["none", "nms", "wta"],
)
def test_what_was_done_about_duplicates_is_measured_and_said(dataset, tmp_path, options, scores, removed):
    answers = [TWICE, {"boxes": [], "scores": [], "labels": []}]
    metrics = evaluate(Reader(config()), Oracle(answers), dataset, output_dir=tmp_path, progress=False, **options)
    entries = json.loads((tmp_path / "detections.json").read_text())
    assert sorted((entry["score"] for entry in entries), reverse=True) == sorted(scores, reverse=True)
    assert metrics["num_other_labels"] == 1 and metrics["num_detections"] == len(scores)
    expected = [{"method": m, "iou_threshold": t, "num_removed": removed, "num_capped": 0} for m, t in options.items()]
    assert metrics["deduplication"] == (expected[0] if options else None)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["ECE"] == calibration(ground_truth(dataset), entries).ece


def test_only_what_is_measured_is_deduplicated(dataset):
    """NMS comes after the choice of the `top_k`: nothing moves up in place of a duplicate."""
    answers = [TWICE, {"boxes": [], "scores": [], "labels": []}]
    metrics = evaluate(Reader(config()), Oracle(answers), dataset, top_k=3, nms=0.7, progress=False)
    assert metrics["num_detections"] == 2 and metrics["deduplication"]["num_removed"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nms": 0.5, "wta": 0.5}, "nms is 0.5 and wta is 0.5; the rule is at most one"),
        ({"nms": 50}, r"nms is 50; the rule is an IoU in \[0, 1\]"),
        ({"wta": float("nan")}, "wta is nan; the rule is an IoU"),
    ],
)
def test_thresholds_are_checked_before_the_work(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(None, None, None, **options)


def test_detections_of_several_processes_are_measured_as_those_of_one(dataset):
    alone = evaluate(Reader(config()), Oracle(ANSWERS), dataset, top_k=2, progress=False)
    shares = []
    for indices in ([0, 1], [1]):  # the second process repeats a picture
        shares.append(predict(Reader(config()), Oracle(ANSWERS), dataset.select(indices), progress=False))
    merged = Detections.merge(shares)
    assert measure(merged, ground_truth(dataset), {0: 9, 1: 4}, top_k=2) == alone


def test_labels_in_another_order_are_matched_by_name(dataset):
    """As a Hub model without category_ids has them: other order, other case, unused classes between."""
    by_name = config(("N/A", "traffic_light", "N/A", "CAT"), category_ids=None)
    swapped = [{**answer, "labels": [{0: 3, 1: 1}[label] for label in answer["labels"]]} for answer in ANSWERS]
    swapped[1]["labels"][1] = 2
    metrics = evaluate(Reader(by_name), Oracle(swapped), dataset, progress=False)
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["num_other_labels"] == 1 and metrics["num_detections"] == 3


def test_category_of_label_follows_the_ids_of_the_config():
    assert category_of_label(config(("Traffic Light", "cat"), (4, 9)), CATEGORIES) == {0: 4, 1: 9}


def test_placeholders_for_names_are_taken_for_category_ids():
    placeholders = config([f"LABEL_{label}" for label in range(11)], None)
    mapping = category_of_label(placeholders, CATEGORIES)
    assert mapping == {4: 4, 9: 9}
    table = class_table(placeholders, CATEGORIES, mapping).splitlines()
    assert [line.split(maxsplit=3) for line in table[1:3]] == [
        ["4", "LABEL_4", "4", "Traffic Light"],
        ["9", "LABEL_9", "9", "cat"],
    ]
    assert table[3] == "9 classes of the model are not in the data; detections of them are left out"


def test_a_class_table_ends_somewhere():
    names = config(("traffic_light", "CAT"), None)
    table = class_table(names, CATEGORIES, category_of_label(names, CATEGORIES), most=1).splitlines()
    assert table[1].split(maxsplit=3) == ["0", "traffic_light", "4", "Traffic Light"] and table[2:] == ["and 1 more"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (config(("LABEL_0", "LABEL_1"), None), "no class for 2 of the 2 categories .*LABEL_0, LABEL_1. Set config"),
        (config(("cat",), None), r"no class for 1 of the 2 categories of the dataset \(Traffic Light\)"),
        (config(("cat", "Traffic Light", "dog")), "category_ids has 2 entries for 3 classes"),
        (config(category_ids=(9, 5)), "with the ids 9, 5; the dataset has 2 with the ids 9, 4"),
        (config(("Traffic Light", "cat")), "category 9 is 'Traffic Light' in the model and 'cat' in the dataset"),
    ],
)
def test_classes_that_disagree_are_named(dataset, wrong, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Reader(wrong), Oracle(ANSWERS), dataset, progress=False)


def test_pictures_that_disagree_are_named(dataset):
    annotations = ground_truth(dataset)
    with pytest.raises(ValueError, match=r"1 of 2 annotated pictures are not in the dataset \(1.png\)"):
        evaluate(Reader(config()), Oracle(ANSWERS), dataset.select([0]), annotations, progress=False)
    annotations["images"] = annotations["images"][:1]
    with pytest.raises(ValueError, match="1 pictures have no entry in the annotations: image_id 71"):
        evaluate(Reader(config()), Oracle(ANSWERS), dataset, annotations, progress=False)


def test_a_label_beyond_the_config_is_left_out_and_counted(dataset):
    answers = [{**ANSWERS[0], "labels": [0, 1, 5]}, ANSWERS[1]]
    metrics = evaluate(Reader(config()), Oracle(answers), dataset, progress=False)
    assert metrics["num_other_labels"] == 1
